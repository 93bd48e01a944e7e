//! Floating-point and vector registers, all that the CPU has: kept over switches, signals, forks and faults, clean after exec.

use std::arch::asm;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, Signal};

use crate::check::{Check, Outcome, Stop, check};
use crate::sys::{Child, handle};
use crate::{ensure, ensure_eq, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("fp.switches", switches),
    check("fp.processes", processes),
    check("fp.signals", signals),
    check("fp.fork", fork),
    check("fp.faults", faults),
    check("fp.x87", x87),
    check("fp.exec", exec),
    check("fp.arithmetic", arithmetic),
];

/// Which registers there are, and what of them is a register's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Sse,
    Avx,
    Avx512,
}

fn width() -> Width {
    // What is detected is what the CPU has and the kernel has enabled.
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        Width::Avx512
    } else if is_x86_feature_detected!("avx") {
        Width::Avx
    } else {
        Width::Sse
    }
}

/// Room for 32 registers of 64 bytes and 8 mask registers.
const WORDS: usize = 32 * 8 + 8;

#[repr(C, align(64))]
#[derive(Debug, Clone, PartialEq, Eq)]
struct Registers([u64; WORDS]);

impl Registers {
    fn pattern(seed: u64) -> Self {
        let mut random = crate::sys::Random::new(seed);
        Self(std::array::from_fn(|_| random.next_word()))
    }

    fn empty() -> Self {
        Self([0; WORDS])
    }

    /// Where both should hold the same and do not.
    fn difference(&self, other: &Self, width: Width) -> Option<usize> {
        (0..WORDS).find(|&word| {
            let (register, part) = (word / 8, word % 8);
            let counts = match width {
                Width::Sse => register < 16 && part < 2,
                Width::Avx => register < 16 && part < 4,
                // k0 is not used.
                Width::Avx512 => word != 32 * 8,
            };
            // Of 16 registers each begins at its place among 32.
            counts && self.0[word] != other.0[word]
        })
    }
}

/// Loads all registers, does something, and stores them. What is done may change rax, rcx, rdx, rsi, rdi, r8 to r11.
macro_rules! keep {
    ($width:expr, $from:expr, $to:expr, $between:literal $(, $($operands:tt)*)?) => {
        match $width {
            Width::Sse => keep!(@ $from, $to,
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15; movdqu xmm\\i, [r12 + 64*\\i]; .endr",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15; movdqu [r13 + 64*\\i], xmm\\i; .endr",
                $between $(, $($operands)*)?),
            Width::Avx => keep!(@ $from, $to,
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15; vmovdqu ymm\\i, [r12 + 64*\\i]; .endr",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15; vmovdqu [r13 + 64*\\i], ymm\\i; .endr; vzeroupper",
                $between $(, $($operands)*)?),
            Width::Avx512 => keep!(@ $from, $to,
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31; \
                 vmovdqu64 zmm\\i, [r12 + 64*\\i]; .endr; .irp i,1,2,3,4,5,6,7; kmovq k\\i, [r12 + 2048 + 8*\\i]; .endr",
                ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31; \
                 vmovdqu64 [r13 + 64*\\i], zmm\\i; .endr; .irp i,1,2,3,4,5,6,7; kmovq [r13 + 2048 + 8*\\i], k\\i; .endr; vzeroupper",
                $between $(, $($operands)*)?),
        }
    };
    (@ $from:expr, $to:expr, $load:literal, $store:literal, $between:literal $(, $($operands:tt)*)?) => {
        // SAFETY: both have room for all registers, which are named as changed, as are those of what is done in between; the CPU
        // has the instructions, and the kernel has enabled them.
        unsafe {
            asm!($load, $between, $store, in("r12") $from.0.as_ptr(), in("r13") $to.0.as_mut_ptr(),
                clobber_abi("sysv64"), $($($operands)*)?)
        }
    };
}

/// Keeps the registers busy for a while.
fn spin(width: Width, seed: u64, rounds: u32) -> Outcome {
    let pattern = Registers::pattern(seed);
    for round in 0..rounds {
        let mut found = Registers::empty();
        if round % 8 == 0 {
            // sched_yield(2), with the registers loaded.
            keep!(width, pattern, found, "mov eax, 24; syscall");
        } else {
            keep!(width, pattern, found, "mov ecx, 3000; 2: pause; dec ecx; jnz 2b");
        }
        if let Some(word) = pattern.difference(&found, width) {
            return Err(Stop::Fail(format!(
                "{width:?}: word {word} of the registers was lost in round {round}"
            )));
        }
    }
    Ok(())
}

fn switches() -> Outcome {
    let width = width();
    let threads: Vec<_> = (1..=4)
        .map(|seed| std::thread::spawn(move || spin(width, seed, 300)))
        .collect();
    threads.into_iter().try_for_each(|thread| {
        thread
            .join()
            .map_err(|_| Stop::Fail("a thread panicked".into()))?
    })
}

fn processes() -> Outcome {
    let mut children = Vec::new();
    for (seed, width) in (11..).zip([width(), Width::Sse, width(), Width::Sse]) {
        children.push(Child::start(move || spin(width, seed, 300))?);
    }
    children.into_iter().try_for_each(Child::join)
}

/// A handler that changes them all.
fn signals() -> Outcome {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static WRONG: AtomicBool = AtomicBool::new(false);
    extern "C" fn change(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        let width = width();
        let other = Registers::pattern(COUNT.fetch_add(1, SeqCst) + 1000);
        let mut found = Registers::empty();
        keep!(width, other, found, "nop");
        if other.difference(&found, width).is_some() {
            WRONG.store(true, SeqCst);
        }
    }
    handle(Signal::SIGALRM, SaFlags::SA_RESTART, change)?;
    let period = libc::timeval {
        tv_sec: 0,
        tv_usec: 1000,
    };
    let timer = libc::itimerval {
        it_interval: period,
        it_value: period,
    };
    syscall!(SYS_setitimer, libc::ITIMER_REAL, &raw const timer, 0usize)?;
    let width = width();
    while COUNT.load(SeqCst) < 30 {
        spin(width, 5, 16)?;
    }
    ensure!(!WRONG.load(SeqCst), "registers were lost in a handler");
    Ok(())
}

/// fork(2) with the registers loaded: both have them.
fn fork() -> Outcome {
    let width = width();
    for round in 0..20 {
        let pattern = Registers::pattern(round);
        let mut found = Registers::empty();
        let pid: u64;
        keep!(width, pattern, found, "mov eax, 57; syscall", lateout("rax") pid);
        let same = pattern.difference(&found, width).is_none();
        if pid == 0 {
            crate::sys::exit(if same { 0 } else { 1 });
        }
        ensure!(same, "the parent's registers");
        let child = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
        let status = crate::sys::retry(|| nix::sys::wait::waitpid(child, None))?;
        ensure_eq!(
            status,
            nix::sys::wait::WaitStatus::Exited(child, 0),
            "the child's registers"
        );
    }
    Ok(())
}

/// Page faults, and a system call whose copying may use the registers itself.
fn faults() -> Outcome {
    let width = width();
    let (from, to) = std::io::pipe()?;
    let (input, output) = (
        crate::sys::raw(&from).unsigned_abs(),
        crate::sys::raw(&to).unsigned_abs(),
    );
    for round in 0..40 {
        let pages = crate::sys::Mapping::private(16 * crate::sys::PAGE)?;
        let pattern = Registers::pattern(round);
        let mut found = Registers::empty();
        // Touches 16 fresh pages, writes them to a pipe and reads them back.
        keep!(
            width, pattern, found,
            "mov r8, r14; mov ecx, 16; 2: mov qword ptr [r8], 7; add r8, 4096; dec ecx; jnz 2b; \
             mov eax, 1; mov rdi, r10; mov rsi, r14; mov edx, 65536; syscall; \
             xor eax, eax; mov rdi, r15; mov rsi, r14; mov edx, 65536; syscall",
            in("r14") pages.address(), in("r10") u64::from(output), in("r15") u64::from(input)
        );
        ensure_eq!(pattern.difference(&found, width), None, "round {round}, word");
        ensure_eq!(pages.get(15 * crate::sys::PAGE), 7, "what went through the pipe");
    }
    Ok(())
}

/// The x87 stack, its control word and MXCSR.
fn x87() -> Outcome {
    let threads: Vec<_> = (0..4u16)
        .map(|number| {
            std::thread::spawn(move || -> Outcome {
                let control = 0x037f & !0x0c00 | (number << 10); // rounding
                let mxcsr = 0x1f80 & !0x6000 | u32::from(number) << 13;
                for _ in 0..100 {
                    let (mut value, mut control_now, mut mxcsr_now) = (0.0f64, 0u16, 0u32);
                    let input = f64::from(number) + 0.5;
                    // SAFETY: the stack is empty before and after, and control words are as before.
                    unsafe {
                        asm!(
                            "fninit", "fldcw [{control}]", "ldmxcsr [{mxcsr}]", "fld qword ptr [{input}]", "fld1", "faddp",
                            "mov eax, 24", "syscall", "mov ecx, 500", "2: pause", "dec ecx", "jnz 2b",
                            "fstp qword ptr [{value}]", "fnstcw [{control_now}]", "stmxcsr [{mxcsr_now}]", "fninit",
                            "push 0x1f80", "ldmxcsr [rsp]", "pop rax",
                            control = in(reg) &raw const control, mxcsr = in(reg) &raw const mxcsr, input = in(reg) &raw const input,
                            value = in(reg) &raw mut value, control_now = in(reg) &raw mut control_now,
                            mxcsr_now = in(reg) &raw mut mxcsr_now, out("rax") _, out("rcx") _, out("r11") _,
                            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
                            out("st(6)") _, out("st(7)") _
                        );
                    }
                    let same = value.to_bits() == (input + 1.0).to_bits();
                    ensure!(same, "{value} on the stack of thread {number}");
                    ensure_eq!((control_now, mxcsr_now & 0xffc0), (control, mxcsr), "control words of thread {number}");
                }
                Ok(())
            })
        })
        .collect();
    threads.into_iter().try_for_each(|thread| {
        thread
            .join()
            .map_err(|_| Stop::Fail("a thread panicked".into()))?
    })
}

/// A new program finds nothing of the old one.
fn exec() -> Outcome {
    let child = Child::start(|| {
        let mxcsr = 0x7f80u32;
        // SAFETY: rounding towards zero, until the exec.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr) };
        Err(Command::new("/proc/self/exe").arg("fresh-fp").exec().into())
    })?;
    child.join()
}

/// What [`exec`] runs.
///
/// # Errors
/// If the control words are not those that a program starts with.
pub fn fresh() -> Outcome {
    let (mut control, mut mxcsr) = (0u16, 0u32);
    // SAFETY: stores both.
    unsafe { asm!("fnstcw [{}]", "stmxcsr [{}]", in(reg) &raw mut control, in(reg) &raw mut mxcsr) };
    ensure_eq!((control, mxcsr & 0xffc0), (0x037f, 0x1f80), "control words");
    Ok(())
}

fn arithmetic() -> Outcome {
    let mut children = Vec::new();
    for _ in 0..3 {
        children.push(Child::start(|| {
            let (mut sum, mut product) = (0.0f64, 1.0f64);
            for n in 1..=300_000u32 {
                sum += 1.0 / (f64::from(n) * f64::from(n));
                product *= 1.0 + 1.0 / (f64::from(n) * f64::from(n));
            }
            ensure!((sum - 1.644_930_733_524).abs() < 1e-9, "sum of 1/n^2: {sum}");
            ensure!(
                (product - 3.676_065_656_7).abs() < 1e-5,
                "product of 1+1/n^2: {product}"
            );
            Ok(())
        })?);
    }
    children.into_iter().try_for_each(Child::join)
}
