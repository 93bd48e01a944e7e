//! Signals: when they come, in which order, and that what they interrupt is as it was.

use std::io::{Read as _, Write as _};
use std::os::unix::thread::JoinHandleExt as _;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigSet, SigmaskHow, Signal, kill, raise, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::getpid;

use crate::check::{Check, Outcome, check};
use crate::interrupted::set_alarm;
use crate::sys::{Child, Mapping, handle, unhandle, until};
use crate::{ensure, ensure_eq, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("signals.nested", nested),
    check("signals.mask", mask),
    check("signals.restart", restart),
    check("signals.real-time-queue", real_time_queue),
    check("signals.changed-context", changed_context),
    check("signals.to-threads", to_threads),
    check("signals.of-children", of_children),
    check("signals.stop-and-go-on", stop_and_go_on),
    check("signals.descriptor", descriptor),
    check("signals.storm", storm),
];

static COUNT: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    COUNT.fetch_add(1, SeqCst);
}

/// Handlers that interrupt handlers, on their own stack and not.
fn nested() -> Outcome {
    static DEPTH: AtomicI32 = AtomicI32::new(0);
    static DEEPEST: AtomicI32 = AtomicI32::new(0);
    static LEFT: AtomicI32 = AtomicI32::new(49);
    extern "C" fn again(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
        let depth = DEPTH.fetch_add(1, SeqCst) + 1;
        DEEPEST.fetch_max(depth, SeqCst);
        if LEFT.fetch_sub(1, SeqCst) > 0 {
            let other = if signal == libc::SIGUSR1 {
                Signal::SIGUSR2
            } else {
                Signal::SIGUSR1
            };
            let _ = raise(other);
        }
        DEPTH.fetch_sub(1, SeqCst);
    }
    handle(Signal::SIGUSR1, SaFlags::SA_NODEFER, again)?;
    handle(Signal::SIGUSR2, SaFlags::SA_NODEFER, again)?;
    raise(Signal::SIGUSR1)?;
    ensure_eq!((DEEPEST.load(SeqCst), DEPTH.load(SeqCst)), (50, 0), "depth");
    // Deferred, its own signal waits for the end of the handler.
    handle(Signal::SIGUSR1, SaFlags::empty(), again)?;
    handle(Signal::SIGUSR2, SaFlags::empty(), again)?;
    DEEPEST.store(0, SeqCst);
    LEFT.store(9, SeqCst);
    raise(Signal::SIGUSR1)?;
    ensure_eq!(
        (DEEPEST.load(SeqCst), DEPTH.load(SeqCst), LEFT.load(SeqCst)),
        (2, 0, -1),
        "depth when deferred"
    );
    // Once.
    handle(Signal::SIGUSR1, SaFlags::SA_RESETHAND, count)?;
    raise(Signal::SIGUSR1)?;
    let child = Child::start(|| {
        raise(Signal::SIGUSR1)?;
        Ok(())
    })?;
    let status = child.wait()?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGUSR1, _)),
        "{status:?}"
    );
    Ok(())
}

fn mask() -> Outcome {
    COUNT.store(0, SeqCst);
    handle(Signal::SIGUSR1, SaFlags::empty(), count)?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
    for _ in 0..3 {
        raise(Signal::SIGUSR1)?;
    }
    ensure_eq!(COUNT.load(SeqCst), 0, "signals while blocked");
    let mut pending = 0u64;
    syscall!(SYS_rt_sigpending, &raw mut pending, 8)?;
    ensure_eq!(pending, 1 << (libc::SIGUSR1 - 1), "pending");
    // Blocked signals can be waited for.
    let mut raised = set;
    raised.add(Signal::SIGUSR2);
    ensure_eq!(raised.wait()?, Signal::SIGUSR1, "sigwait");
    raise(Signal::SIGUSR1)?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    ensure_eq!(COUNT.load(SeqCst), 1, "signals once unblocked");
    // sigsuspend: not lost if it comes before.
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    raise(Signal::SIGUSR1)?;
    ensure_eq!(before.suspend(), Ok(()), "sigsuspend");
    ensure_eq!(COUNT.load(SeqCst), 2, "signals by sigsuspend");
    ensure!(
        SigSet::thread_get_mask()?.contains(Signal::SIGUSR1),
        "blocked again"
    );
    // Blocked or not makes no difference to these.
    let fatal = Child::start(|| {
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None)?;
        raise(Signal::SIGKILL)?;
        Ok(())
    })?;
    let status = fatal.wait()?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
        "{status:?}"
    );
    Ok(())
}

/// A read that a signal interrupts goes on by itself, or says so.
fn restart() -> Outcome {
    for flags in [SaFlags::SA_RESTART, SaFlags::empty()] {
        COUNT.store(0, SeqCst);
        handle(Signal::SIGUSR1, flags, count)?;
        let (mut from, mut to) = std::io::pipe()?;
        let parent = getpid();
        let reader_waits = move || -> Outcome<bool> {
            let stat = std::fs::read_to_string(format!("/proc/{parent}/stat"))?;
            Ok(stat
                .rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with('S')))
        };
        let child = Child::start(move || {
            until("a reader that waits", &reader_waits)?;
            kill(parent, Signal::SIGUSR1)?;
            std::thread::sleep(Duration::from_millis(20));
            to.write_all(b"x")?;
            Ok(())
        })?;
        let mut byte = [0];
        let mut interrupted = 0;
        let first = loop {
            // By hand, as the library would go on by itself.
            match nix::unistd::read(&from, &mut byte) {
                Err(Errno::EINTR) => interrupted += 1,
                other => break other,
            }
        };
        ensure_eq!(first, Ok(1), "read");
        child.join()?;
        ensure_eq!(COUNT.load(SeqCst), 1, "signals");
        let expected = i32::from(flags.is_empty());
        ensure!(
            interrupted <= expected,
            "{interrupted} interruptions with {flags:?}"
        );
        ensure_eq!(from.read(&mut byte)?, 0, "the end");
    }
    // What is left of a sleep is told.
    handle(Signal::SIGALRM, SaFlags::empty(), count)?;
    set_alarm(20_000)?;
    let request = crate::sys::as_timespec(Duration::from_secs(20));
    let mut left = crate::sys::as_timespec(Duration::ZERO);
    let slept = syscall!(SYS_nanosleep, &raw const request, &raw mut left);
    set_alarm(0)?;
    ensure_eq!(slept, Err(Errno::EINTR), "nanosleep");
    ensure!((1..20).contains(&left.tv_sec), "{} s left of 20", left.tv_sec);
    Ok(())
}

/// All that are sent come, lowest number first, each with its value, in the order in which they were sent.
fn real_time_queue() -> Outcome {
    static VALUES: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
    static NEXT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn take(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
        // SAFETY: this is the handler of queued signals, which have these.
        let (value, from) = unsafe {
            (
                (*info).si_value().sival_ptr.expose_provenance() as u64,
                (*info).si_pid(),
            )
        };
        let own = from == getpid().as_raw();
        let index = NEXT.fetch_add(1, SeqCst);
        if let Some(slot) = usize::try_from(index).ok().and_then(|index| VALUES.get(index)) {
            slot.store(
                if own {
                    value << 8 | u64::from(signal.unsigned_abs())
                } else {
                    0
                },
                SeqCst,
            );
        }
    }
    let (low, high) = (libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 2);
    for number in [low, high] {
        // SAFETY: all zeros is an action; the handler touches atomics only.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = (take as *const ()).expose_provenance();
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaddset(&raw mut action.sa_mask, low);
            libc::sigaddset(&raw mut action.sa_mask, high);
            Errno::result(libc::sigaction(number, &raw const action, std::ptr::null_mut()))?;
        }
    }
    let both = 1u64 << (low - 1) | 1 << (high - 1);
    let mut before = 0u64;
    syscall!(
        SYS_rt_sigprocmask,
        libc::SIG_BLOCK,
        &raw const both,
        &raw mut before,
        8
    )?;
    for value in 0..32usize {
        for number in [high, low] {
            let value = libc::sigval {
                sival_ptr: std::ptr::without_provenance_mut(value * 1000),
            };
            // SAFETY: no pointer is followed.
            Errno::result(unsafe { libc::sigqueue(getpid().as_raw(), number, value) })?;
        }
    }
    ensure_eq!(NEXT.load(SeqCst), 0, "signals while blocked");
    syscall!(
        SYS_rt_sigprocmask,
        libc::SIG_SETMASK,
        &raw const before,
        0usize,
        8
    )?;
    ensure_eq!(NEXT.load(SeqCst), 64, "signals");
    for (index, found) in VALUES.iter().map(|value| value.load(SeqCst)).enumerate() {
        let number = if index < 32 { low } else { high };
        let expected = (index as u64 % 32 * 1000) << 8 | u64::from(number.unsigned_abs());
        ensure_eq!(found, expected, "signal {index}");
    }
    Ok(())
}

/// Where a handler says to go on, and with what in the registers.
fn changed_context() -> Outcome {
    extern "C" fn change(_: c_int, _: *mut siginfo_t, given: *mut c_void) {
        // SAFETY: this is the handler.
        let registers = unsafe { &mut crate::sys::context(given).uc_mcontext.gregs };
        let index = |register: c_int| register.unsigned_abs() as usize;
        registers[index(libc::REG_RIP)] += 2; // over ud2
        registers[index(libc::REG_RAX)] = 0x1234_5678_9abc_def0;
        registers[index(libc::REG_R12)] += 1;
        registers[index(libc::REG_EFL)] |= 1; // carry
    }
    handle(Signal::SIGILL, SaFlags::empty(), change)?;
    for round in 0..200u64 {
        let (rax, r12, carry): (u64, u64, u8);
        // SAFETY: the handler goes on after the ud2.
        unsafe {
            std::arch::asm!("clc", "ud2", "setc {carry}", carry = out(reg_byte) carry, out("rax") rax, inout("r12") round => r12);
        }
        ensure_eq!(
            (rax, r12, carry),
            (0x1234_5678_9abc_def0, round + 1, 1),
            "round {round}"
        );
    }
    unhandle(Signal::SIGILL)?;
    Ok(())
}

fn to_threads() -> Outcome {
    static HITS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
    thread_local!(static OWN: std::cell::Cell<usize> = const { std::cell::Cell::new(usize::MAX) });
    extern "C" fn hit(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        if let Some(slot) = HITS.get(OWN.get()) {
            slot.fetch_add(1, SeqCst);
        }
    }
    static END: AtomicBool = AtomicBool::new(false);
    static READY: AtomicU64 = AtomicU64::new(0);
    handle(Signal::SIGUSR1, SaFlags::SA_RESTART, hit)?;
    let threads: Vec<_> = (0..HITS.len())
        .map(|number| {
            std::thread::spawn(move || {
                OWN.set(number);
                READY.fetch_add(1, SeqCst);
                while !END.load(SeqCst) {
                    std::hint::spin_loop();
                    std::thread::yield_now();
                }
            })
        })
        .collect();
    until("threads", || Ok(READY.load(SeqCst) == 4))?;
    for round in 1..=25 {
        for (number, thread) in threads.iter().enumerate() {
            nix::sys::pthread::pthread_kill(thread.as_pthread_t(), Signal::SIGUSR1)?;
            until("a thread's signal", || Ok(HITS[number].load(SeqCst) == round))?;
        }
    }
    END.store(true, SeqCst);
    let joined = threads
        .into_iter()
        .map(std::thread::JoinHandle::join)
        .all(|end| end.is_ok());
    ensure!(joined, "a thread panicked");
    Ok(())
}

fn of_children() -> Outcome {
    static PID: AtomicI32 = AtomicI32::new(0);
    static STATUS: AtomicI32 = AtomicI32::new(0);
    static CODE: AtomicI32 = AtomicI32::new(0);
    extern "C" fn ended(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
        // SAFETY: this is the handler of SIGCHLD, which has these.
        unsafe {
            STATUS.store((*info).si_status(), SeqCst);
            CODE.store((*info).si_code, SeqCst);
            PID.store((*info).si_pid(), SeqCst);
        }
    }
    handle(Signal::SIGCHLD, SaFlags::SA_NOCLDSTOP, ended)?;
    let told = |child: &Child| until("SIGCHLD", || Ok(PID.load(SeqCst) == child.pid.as_raw()));
    let child = Child::start(|| crate::sys::exit(42))?;
    told(&child)?;
    ensure_eq!(
        (CODE.load(SeqCst), STATUS.load(SeqCst)),
        (libc::CLD_EXITED, 42),
        "of an exit"
    );
    child.wait()?;
    let child = Child::start(|| {
        raise(Signal::SIGTERM)?;
        Ok(())
    })?;
    told(&child)?;
    ensure_eq!(
        (CODE.load(SeqCst), STATUS.load(SeqCst)),
        (libc::CLD_KILLED, libc::SIGTERM),
        "of a kill"
    );
    child.wait()?;
    // Nobody wants to know: no zombie.
    handle(Signal::SIGCHLD, SaFlags::SA_NOCLDWAIT, ended)?;
    let child = Child::start(|| Ok(()))?;
    ensure_eq!(
        waitpid(child.pid, None),
        Err(Errno::ECHILD),
        "a child that nobody waits for"
    );
    Ok(())
}

fn stop_and_go_on() -> Outcome {
    let child = Child::start(|| {
        loop {
            nix::unistd::pause();
        }
    })?;
    for _ in 0..10 {
        kill(child.pid, Signal::SIGSTOP)?;
        let status = waitpid(child.pid, Some(WaitPidFlag::WUNTRACED))?;
        ensure_eq!(status, WaitStatus::Stopped(child.pid, Signal::SIGSTOP), "stopped");
        kill(child.pid, Signal::SIGCONT)?;
        let status = waitpid(child.pid, Some(WaitPidFlag::WCONTINUED))?;
        ensure_eq!(status, WaitStatus::Continued(child.pid), "going on");
    }
    ensure_eq!(
        waitpid(child.pid, Some(WaitPidFlag::WNOHANG))?,
        WaitStatus::StillAlive,
        "alive"
    );
    kill(child.pid, Signal::SIGTERM)?;
    ensure_eq!(
        child.wait()?,
        WaitStatus::Signaled(child.pid, Signal::SIGTERM, false),
        "ended"
    );
    Ok(())
}

fn descriptor() -> Outcome {
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    set.add(Signal::SIGUSR2);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    let signals = crate::check::available("signalfd", SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK))?;
    ensure_eq!(signals.read_signal()?.is_none(), true, "before");
    let parent = getpid();
    let child = Child::start(move || Ok(kill(parent, Signal::SIGUSR2)?))?;
    let sender = child.pid.as_raw().unsigned_abs();
    child.join()?;
    raise(Signal::SIGUSR1)?;
    let seen: Vec<_> = [signals.read_signal()?, signals.read_signal()?]
        .iter()
        .flatten()
        .map(|info| (info.ssi_signo.cast_signed(), info.ssi_pid))
        .collect();
    let own = parent.as_raw().unsigned_abs();
    ensure_eq!(seen, [(libc::SIGUSR1, own), (libc::SIGUSR2, sender)], "signals");
    Ok(())
}

/// Many at once from several processes, amid system calls and page faults.
fn storm() -> Outcome {
    COUNT.store(0, SeqCst);
    handle(Signal::SIGUSR1, SaFlags::SA_RESTART, count)?;
    let parent = getpid();
    let mut children = Vec::new();
    for _ in 0..3 {
        children.push(Child::start(move || {
            for _ in 0..300 {
                kill(parent, Signal::SIGUSR1)?;
                std::thread::yield_now();
            }
            Ok(())
        })?);
    }
    let memory = Mapping::private(64 * crate::sys::PAGE)?;
    for round in 0..100 {
        for page in 0..64 {
            memory.set(page * crate::sys::PAGE, round);
        }
        ensure_eq!(getpid(), parent, "getpid");
        for page in 0..64 {
            ensure_eq!(memory.get(page * crate::sys::PAGE), round, "page {page}");
        }
        memory.advise(
            0,
            32 * crate::sys::PAGE,
            nix::sys::mman::MmapAdvise::MADV_DONTNEED,
        )?;
    }
    for child in children {
        child.join()?;
    }
    ensure!(COUNT.load(SeqCst) > 0, "no signal came");
    Ok(())
}
