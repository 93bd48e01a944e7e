//! The probe: a bare-metal guest, started through its PVH entry point (boot.s) and run in ring 3.
#![no_std]
#![no_main]

mod console;
mod machine;
mod ram;
mod start_info;

use guest_rt as _;

use probe::options::{self, Options};
use probe::pace::Frequency;
use probe::text::Lines;
use probe::worker::Worker;

use console::{Console, say};
use machine::now;
use ram::Ram;
use start_info::StartInfo;

/// Exit status when the probe could not run as asked, or met a fault.
const STATUS_FAILED: u8 = 2;

/// Where boot.s leaves ring 0. `start_info` is what the VMM left in EBX.
#[unsafe(no_mangle)]
extern "C" fn probe_main(start_info: u64) -> ! {
    let start = now();
    say(format_args!("probe: up"));
    machine::catch_exceptions();

    // SAFETY: PVH promises that EBX holds the address of a start info structure, which lies in the first GiB, and nothing has
    // written to memory yet.
    let info = unsafe { StartInfo::read(start_info) };
    let options = match Options::parse(info.command_line()) {
        Ok(options) => options,
        Err(error) => fail(format_args!("command line: {error}")),
    };
    let Some(frequency) = Frequency::from_khz(options.tsc_khz).or_else(machine::tsc_frequency) else {
        fail(format_args!(
            "no TSC frequency from CPUID 0x40000010 or KVM's clock; give tsc_khz="
        ));
    };
    let memory = Ram::map(info.ranges());
    if options.fill_pages > memory.pages() {
        fail(format_args!(
            "fill and wss ask for {} pages, there are {}",
            options.fill_pages,
            memory.pages()
        ));
    }
    say(format_args!(
        "probe: tsc_khz={} pages={}",
        frequency.khz(),
        memory.pages()
    ));

    let last_words = options::last_words(info.command_line());
    if let Some(text) = last_words.filter(|_| options.seconds == 0) {
        machine::fail(text);
    }

    let mut worker = Worker::new(memory, options, frequency, start);
    let mut lines = Lines::default();
    let mut console = Console::default();
    loop {
        if let Some(reading) = machine::kvm_clock() {
            worker.clock(reading);
        }
        worker.step(now(), &mut lines);
        if let Some(microseconds) = worker.gap_to_tell() {
            machine::write_port_u32(machine::GUEST_GAP, microseconds);
        }
        console.pump(&mut lines);
        if let Some(status) = worker.exit_status().filter(|_| lines.is_empty()) {
            match last_words {
                Some(text) => machine::fail(text),
                None => machine::power_off(status),
            }
        }
    }
}

/// Where boot.s goes, in ring 3, after any CPU exception.
#[unsafe(no_mangle)]
extern "C" fn probe_exception(vector: u64, error_code: u64, rip: u64, address: u64) -> ! {
    // The argument order is boot.s's: RDI, RSI, RDX, RCX.
    fail(format_args!(
        "exception {vector} error={error_code:#x} rip={rip:#x} address={address:#x}"
    ));
}

fn fail(reason: core::fmt::Arguments<'_>) -> ! {
    say(format_args!("probe: error: {reason}"));
    machine::power_off(STATUS_FAILED);
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    fail(format_args!("{info}"));
}
