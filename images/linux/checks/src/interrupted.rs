//! What signals and ticks interrupt is as it was: registers, flags, and the stack below its pointer.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, Signal};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::check::{Check, Outcome, check};
use crate::sys::{Mapping, PAGE, handle};
use crate::{ensure, ensure_eq, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("interrupted.registers", registers),
    check("interrupted.red-zone", red_zone),
    check("interrupted.flags", flags),
];

static COUNT: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    COUNT.fetch_add(1, SeqCst);
}

/// SIGALRM at a high rate until the guard is gone.
#[derive(Debug)]
struct Alarms;

impl Alarms {
    fn start(handler: crate::sys::Handler, micros: i64) -> Outcome<Self> {
        COUNT.store(0, SeqCst);
        handle(Signal::SIGALRM, SaFlags::SA_RESTART, handler)?;
        set_alarm(micros)?;
        Ok(Self)
    }
}

impl Drop for Alarms {
    fn drop(&mut self) {
        let _ = set_alarm(0);
    }
}

/// SIGALRM every so many microseconds; never again if 0.
///
/// # Errors
/// setitimer(2)'s.
pub fn set_alarm(micros: i64) -> nix::Result<()> {
    let period = *TimeVal::microseconds(micros).as_ref();
    let timer = libc::itimerval {
        it_interval: period,
        it_value: period,
    };
    syscall!(SYS_setitimer, libc::ITIMER_REAL, &raw const timer, 0usize).map(drop)
}

/// A loop that compares all general registers with what they were set to.
fn registers() -> Outcome {
    /// Changes what it can.
    extern "C" fn wipe(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        COUNT.fetch_add(1, SeqCst);
        // SAFETY: the C ABI leaves these to the callee.
        unsafe {
            std::arch::asm!(
                "mov rax, -1",
                "mov rcx, -1",
                "mov rdx, -1",
                "mov rsi, -1",
                "mov rdi, -1",
                "mov r8, -1",
                "mov r9, -1",
                "mov r10, -1",
                "mov r11, -1",
                clobber_abi("sysv64")
            );
        }
    }
    let _alarms = Alarms::start(wipe, 2000)?;
    let mut wrong = 0u64;
    while COUNT.load(SeqCst) < 40 && wrong == 0 {
        // SAFETY: RBX and RBP are saved on the stack and restored; all else is named.
        unsafe {
            std::arch::asm!(
                "push rbx", "push rbp",
                "mov rax, 0x1000001", "mov rbx, 0x1000002", "mov rcx, 0x1000003", "mov rdx, 0x1000004", "mov rsi, 0x1000005",
                "mov rdi, 0x1000006", "mov rbp, 0x1000007", "mov r8, 0x1000008", "mov r9, 0x1000009", "mov r10, 0x100000a",
                "mov r11, 0x100000b", "mov r12, 0x100000c", "mov r13, 0x100000d", "mov r14, 0x100000e",
                "mov r15d, 20000",
                "2:",
                "cmp rax, 0x1000001", "jne 3f", "cmp rbx, 0x1000002", "jne 3f", "cmp rcx, 0x1000003", "jne 3f",
                "cmp rdx, 0x1000004", "jne 3f", "cmp rsi, 0x1000005", "jne 3f", "cmp rdi, 0x1000006", "jne 3f",
                "cmp rbp, 0x1000007", "jne 3f", "cmp r8, 0x1000008", "jne 3f", "cmp r9, 0x1000009", "jne 3f",
                "cmp r10, 0x100000a", "jne 3f", "cmp r11, 0x100000b", "jne 3f", "cmp r12, 0x100000c", "jne 3f",
                "cmp r13, 0x100000d", "jne 3f", "cmp r14, 0x100000e", "jne 3f",
                "dec r15d", "jnz 2b",
                "xor eax, eax", "jmp 4f",
                "3:", "mov eax, 1",
                "4:", "pop rbp", "pop rbx",
                out("rax") wrong, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _, out("r8") _, out("r9") _,
                out("r10") _, out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _
            );
        }
    }
    ensure_eq!(wrong, 0, "a register after {} signals", COUNT.load(SeqCst));
    Ok(())
}

/// The 128 bytes below the stack pointer are the program's.
fn red_zone() -> Outcome {
    let _alarms = Alarms::start(count, 2000)?;
    let mut wrong = 0u64;
    let mut value = 1u64;
    while COUNT.load(SeqCst) < 40 && wrong == 0 {
        value += 1;
        // SAFETY: the red zone is stepped over first, so that what the compiler keeps there stays.
        unsafe {
            std::arch::asm!(
                "sub rsp, 256",
                "mov ecx, 20000",
                "2:",
                "mov [rsp - 8], {value}", "mov [rsp - 64], {value}", "mov [rsp - 128], {value}",
                "pause",
                "cmp [rsp - 8], {value}", "jne 3f", "cmp [rsp - 64], {value}", "jne 3f", "cmp [rsp - 128], {value}", "jne 3f",
                "dec ecx", "jnz 2b",
                "jmp 4f",
                "3:", "mov {wrong}, 1",
                "4:", "add rsp, 256",
                value = in(reg) value, wrong = inout(reg) wrong, out("ecx") _
            );
        }
    }
    ensure_eq!(wrong, 0, "the red zone after {} signals", COUNT.load(SeqCst));
    Ok(())
}

/// Flags that a program may set: they stay, and the kernel and handlers do not run with them.
fn flags() -> Outcome {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    extern "C" fn look(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        let now: u64;
        // SAFETY: reads the flags by way of the stack.
        unsafe { std::arch::asm!("pushfq", "pop {}", out(reg) now) };
        SEEN.fetch_or(now, SeqCst);
        COUNT.fetch_add(1, SeqCst);
    }
    /// Direction, nested task, alignment check, ID. NT may be lost (KVM without hardware virtualization drops it).
    const FLAGS: [(&str, u64); 4] = [("DF", 1 << 10), ("NT", 1 << 14), ("AC", 1 << 18), ("ID", 1 << 21)];
    const DIRECTION: u64 = 1 << 10;
    let fresh = Mapping::private(64 * PAGE)?;
    for (name, flag) in FLAGS {
        let _alarms = Alarms::start(look, 1000)?;
        let (mut kept, mut page) = (flag, 0);
        while COUNT.load(SeqCst) < 10 && (kept == flag || name == "NT") {
            let address = fresh.address() + page * PAGE;
            // SAFETY: the flag is set and cleared again; ticks, signals, a page fault and a system call come in between.
            unsafe {
                std::arch::asm!(
                    "pushfq", "or [rsp], {flag}", "popfq",
                    "mov ecx, 5000", "2:", "pause", "dec ecx", "jnz 2b",
                    "mov qword ptr [{address}], 1",
                    "mov eax, 39", "syscall",
                    "pushfq", "pop {kept}", "and {kept}, {flag}",
                    "pushfq", "not {flag}", "and [rsp], {flag}", "popfq",
                    "cld",
                    flag = inout(reg) flag => _, kept = out(reg) kept, address = in(reg) address,
                    out("rax") _, out("rcx") _, out("r11") _
                );
            }
            page = (page + 1) % 64;
        }
        ensure!(
            kept == flag || name == "NT",
            "{name} is lost after {} signals",
            COUNT.load(SeqCst)
        );
    }
    ensure_eq!(SEEN.load(SeqCst) & DIRECTION, 0, "DF in a handler");
    Ok(())
}
