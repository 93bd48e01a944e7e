use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Address as _, Bytes as _, GuestAddress};

use super::*;
use crate::arch::tables::{BootMode, boot_registers};
use crate::console::Console;
use crate::memory::GuestMemory;
use crate::vcpu::install_kick_handler;
use crate::vm::{VmError, VmHooks};

const MIB: f64 = 1024.0 * 1024.0;
const CODE_AT: GuestAddress = GuestAddress(0x10_0000);
const COUNTER: GuestAddress = GuestAddress(0x20_0000);
/// `inc qword [0x200000]; jmp` back to it.
const COUNT: [u8; 10] = [0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf6];
/// `ud2`: without an interrupt table a triple fault.
const FAULT: [u8; 2] = [0x0f, 0x0b];

/// A VM whose boot CPU runs `code`, not yet resumed. `None` where a test may do without KVM.
fn vm(code: &[u8], cpus: u32) -> Option<Vm> {
    let kvm = match crate::build::open_kvm() {
        Ok(kvm) => kvm,
        Err(error) if std::env::var_os("SHOAL_SKIP_KVM").is_some() => {
            eprintln!("skipped without KVM: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    install_kick_handler().expect("a signal handler");
    let memory = GuestMemory::new(8 << 20).expect("map");
    memory.mmap().write_slice(code, CODE_AT).expect("inside");
    let hooks = VmHooks {
        guest_gap: Arc::default(),
        console: Arc::new(Console::new(false)),
        ended: Box::new(|_| {}),
    };
    let vm = Vm::new(&kvm, memory, cpus, None, hooks).expect("a VM");
    {
        let fd = vm.boot_vcpu().fd();
        let reset = fd.get_sregs().expect("registers");
        let (regs, sregs) =
            boot_registers(vm.memory(), BootMode::Linux64, CODE_AT, reset).expect("room for tables");
        assert_eq!(regs.rip, CODE_AT.raw_value());
        fd.set_sregs(&sregs).expect("registers");
        fd.set_regs(&regs).expect("registers");
    }
    Some(vm)
}

fn counter(vm: &Vm) -> u64 {
    vm.memory().mmap().read_obj(COUNTER).expect("inside")
}

/// Waits for what must come; a test that waits for ever is stopped from outside.
fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !happened() {
        assert!(Instant::now() < deadline, "waited a minute for {what}");
        std::thread::yield_now();
    }
}

fn until_it_counts(vm: &Vm) {
    let before = counter(vm);
    until("the guest to run", || counter(vm) > before);
}

fn stops(vm: &Vm) -> u64 {
    total(&vm.brakes()).stops
}

#[test]
fn a_throttled_guest_is_stopped_again_and_again_and_still_runs() {
    let Some(vm) = vm(&COUNT, 2) else { return };
    vm.resume();
    until_it_counts(&vm);
    let throttle = Throttle::start(&vm).expect("a thread");
    assert_eq!((throttle.permille(), stops(&vm)), (0, 0));
    for permille in [200, 990, 500, 1000] {
        throttle.set(permille);
        assert_eq!(throttle.permille(), permille.min(MAX_PERMILLE));
        let (before, taken) = (stops(&vm), throttle.taken());
        until("more stops", || stops(&vm) >= before + 20);
        assert!(throttle.taken() > taken);
        until_it_counts(&vm);
    }
    throttle.set(0);
    until_it_counts(&vm);
    throttle.set(600);
    drop(throttle);
    let last = stops(&vm);
    for _ in 0..20 {
        until_it_counts(&vm);
    }
    assert_eq!(stops(&vm), last, "stopped after the throttle was gone");
}

#[test]
fn pausing_and_throttling_do_not_undo_each_other() {
    let Some(vm) = vm(&COUNT, 1) else { return };
    vm.resume();
    let throttle = Throttle::start(&vm).expect("a thread");
    throttle.set(700);
    for _ in 0..100 {
        vm.pause();
        let at_pause = counter(&vm);
        // The descriptor of a paused vCPU is free, throttled or not.
        let _registers = vm.boot_vcpu().fd().get_regs().expect("registers");
        assert_eq!(counter(&vm), at_pause);
        vm.resume();
        until_it_counts(&vm);
    }
    vm.pause();
    let at_pause = counter(&vm);
    drop(throttle);
    let again = Throttle::start(&vm).expect("a thread");
    again.set(500);
    assert_eq!(again.taken(), Duration::ZERO);
    drop(again);
    assert_eq!(counter(&vm), at_pause, "a throttle let a paused guest run");
    vm.resume();
    until_it_counts(&vm);
}

#[test]
fn a_guest_that_is_resumed_meanwhile_holds_up_neither_who_pauses_it_nor_who_saves_it() {
    let Some(vm) = vm(&COUNT, 1) else { return };
    for _ in 0..50 {
        std::thread::scope(|scope| {
            // As the guard of a pause does that lasts too long: at any moment.
            scope.spawn(|| vm.resume());
            vm.pause();
            match vm.save() {
                Ok(_) | Err(VmError::NotPaused(0)) => {}
                Err(error) => panic!("{error}"),
            }
        });
        vm.resume();
        until_it_counts(&vm);
    }
    until("a save that finds it running", || {
        matches!(vm.save(), Err(VmError::NotPaused(0)))
    });
    vm.pause();
    vm.save().expect("it is paused");
}

#[test]
fn a_panic_leaves_the_guest_running() {
    let Some(vm) = vm(&COUNT, 1) else { return };
    vm.resume();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let throttle = Throttle::start(&vm).expect("a thread");
        throttle.set(990);
        until("a stop", || stops(&vm) > 0);
        panic!("on purpose");
    }));
    assert!(outcome.is_err());
    let last = stops(&vm);
    for _ in 0..20 {
        until_it_counts(&vm);
    }
    assert_eq!(stops(&vm), last);
}

#[test]
fn a_guest_that_ends_while_it_is_throttled_has_ended() {
    let Some(vm) = vm(&FAULT, 1) else { return };
    let throttle = Throttle::start(&vm).expect("a thread");
    throttle.set(990);
    vm.resume();
    until("the guest to end", || vm.guest_end().is_some());
    vm.pause();
    drop(throttle);
    vm.resume();
    let brakes = vm.brakes();
    drop(vm);
    // Their vCPUs are gone.
    for brake in &brakes {
        brake.hold();
        brake.release();
    }
}

fn measured(dirty_rate: f64, link_rate: f64, permille: u32) -> Measured {
    Measured {
        dirty_rate,
        link_rate,
        permille,
        budget: Duration::from_millis(50),
        shortest_pass: Duration::from_millis(20),
    }
}

/// Passes of a guest that writes random pages among `working_set` bytes at `rate`, until the pause fits.
fn passes_until_it_fits(rate: f64, working_set: f64, link: f64) -> Option<u32> {
    let (mut dirty, mut permille) = (working_set, 0);
    for pass in 1..200 {
        let seconds = (dirty / link).max(0.02);
        let written = rate * (1.0 - f64::from(permille) / 1000.0) * seconds;
        dirty = working_set * (1.0 - (-written / working_set).exp());
        if dirty / link <= 0.05 {
            return Some(pass);
        }
        permille = needed(&measured(dirty / seconds, link, permille));
    }
    None
}

#[test]
fn nothing_is_taken_from_a_guest_that_the_link_keeps_up_with() {
    assert_eq!(needed(&measured(60.0 * MIB, 100.0 * MIB, 0)), 0);
    assert_eq!(
        needed(&measured(10.0 * MIB, 100.0 * MIB, 800)),
        0,
        "slack is given back"
    );
    assert_eq!(needed(&measured(0.0, 0.0, 500)), 0);
}

#[test]
fn what_is_taken_is_what_is_needed() {
    assert_eq!(needed(&measured(100.0 * MIB, 100.0 * MIB, 0)), 334);
    assert_eq!(needed(&measured(1000.0 * MIB, 100.0 * MIB, 0)), 934);
    assert_eq!(needed(&measured(1.0, 0.0, 0)), MAX_PERMILLE);
    let no_room = Measured {
        budget: Duration::ZERO,
        ..measured(1.0 * MIB, 100.0 * MIB, 0)
    };
    assert_eq!(needed(&no_room), MAX_PERMILLE);
}

#[test]
fn guests_that_outrun_their_link_converge() {
    for (rate, working_set, link) in [
        (200.0, 512.0, 100.0),
        (3000.0, 256.0, 110.0),
        (4000.0, 4096.0, 110.0),
        (101.0, 8192.0, 100.0),
    ] {
        let passes = passes_until_it_fits(rate * MIB, working_set * MIB, link * MIB);
        assert!(
            passes.is_some_and(|passes| passes < 60),
            "{rate} {working_set} {link}: {passes:?}"
        );
    }
}

proptest! {
    #[test]
    fn enough_is_taken_and_not_more(dirty in 0f64..1e11, link in 0f64..1e11, permille in 0u32..1200) {
        let share = needed(&measured(dirty, link, permille));
        let unthrottled = dirty / (1.0 - f64::from(permille.min(MAX_PERMILLE)) / 1000.0);
        let rate_at = |share: u32| unthrottled * (1.0 - f64::from(share) / 1000.0);
        let bearable = link * PASS_RATIO * (1.0 + 1e-9);
        prop_assert!(share <= MAX_PERMILLE);
        prop_assert!(share == MAX_PERMILLE || rate_at(share) <= bearable);
        prop_assert!(share == 0 || rate_at(share - 1) > link * PASS_RATIO * (1.0 - 1e-9));
    }

    #[test]
    fn more_writes_or_a_slower_link_never_need_less(dirty in 0f64..1e11, more in 0f64..1e11, link in 0f64..1e11, less in 0f64..1.0, permille in 0u32..1000) {
        let share = needed(&measured(dirty, link, permille));
        prop_assert!(needed(&measured(dirty + more, link, permille)) >= share);
        prop_assert!(needed(&measured(dirty, link * less, permille)) >= share);
    }

    #[test]
    fn whatever_was_measured_gives_a_share(dirty: f64, link: f64, permille: u32, budget_us: u32, pass_us: u32) {
        let strange = Measured {
            dirty_rate: dirty,
            link_rate: link,
            permille,
            budget: Duration::from_micros(budget_us.into()),
            shortest_pass: Duration::from_micros(pass_us.into()),
        };
        prop_assert!(needed(&strange) <= MAX_PERMILLE);
    }

    #[test]
    fn the_guest_is_never_held_for_long_at_once(permille in 1u32..1200) {
        let (run, hold) = period(permille);
        prop_assert!(!run.is_zero() && !hold.is_zero());
        let longest = if permille <= 990 { LONGEST_PERIOD } else { 5 * LONGEST_PERIOD };
        prop_assert!(run + hold <= longest + Duration::from_nanos(10));
        prop_assert!(permille <= 990 || run + Duration::from_nanos(10) >= LEAST_RUN);
        let share = hold.as_secs_f64() / (run + hold).as_secs_f64() * 1000.0;
        prop_assert!((share - f64::from(permille.min(MAX_PERMILLE))).abs() < 1.0);
    }

    #[test]
    fn what_the_guest_ran_too_long_is_made_up_for_within_limits(permille in 1u32..1000, late_us in 0u64..1_000_000) {
        let (run, hold) = period(permille);
        prop_assert_eq!(made_up(run, run, hold), Duration::ZERO);
        let late = Duration::from_micros(late_us);
        let more = made_up(run + late, run, hold);
        prop_assert!(more <= LONGEST_MAKING_UP);
        let share = (hold + more).as_secs_f64() / (run + late + hold + more).as_secs_f64() * 1000.0;
        prop_assert!(more == LONGEST_MAKING_UP || (share - f64::from(permille.min(MAX_PERMILLE))).abs() < 1.0);
    }
}
