//! ptrace and seccomp: a tracer sees what its child does, instruction by instruction, and may change it.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc::{self, c_long, c_void, user_regs_struct};
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::{SaFlags, Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid};

use crate::check::{Check, Outcome, available, check};
use crate::sys::{Child, Mapping, PAGE, handle};
use crate::{ensure, ensure_eq, skip, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("ptrace.step", step),
    check("ptrace.step-into-a-handler", step_into_a_handler),
    check("ptrace.breakpoints", breakpoints),
    check("ptrace.registers", registers),
    check("ptrace.vector-registers", vector_registers),
    check("ptrace.memory", memory),
    check("ptrace.system-calls", system_calls),
    check("ptrace.events", events),
    check("ptrace.attach", attach),
    check("seccomp.strict", strict),
    check("seccomp.filter", filter),
];

/// Machine code at a place that both processes know.
#[derive(Debug)]
struct Code(Mapping);

impl Code {
    fn new(bytes: &[u8]) -> Outcome<Self> {
        let page = Mapping::new(
            PAGE,
            crate::sys::rw() | ProtFlags::PROT_EXEC,
            MapFlags::MAP_PRIVATE,
        )?;
        page.put(0, bytes);
        page.protect(0, PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_EXEC)?;
        Ok(Self(page))
    }

    fn at(&self, offset: usize) -> u64 {
        (self.0.address() + offset) as u64
    }

    fn run(&self) -> u64 {
        // SAFETY: each check's code is a function that keeps to the C ABI.
        let function: extern "C" fn() -> u64 = unsafe { std::mem::transmute(self.0.pointer::<u8>(0)) };
        function()
    }
}

/// A child that is traced and has stopped itself.
fn traced(body: impl FnOnce() -> Outcome) -> Outcome<Child> {
    let child = Child::start(|| {
        available("ptrace", ptrace::traceme())?;
        raise(Signal::SIGSTOP)?;
        body()
    })?;
    match child.wait()? {
        WaitStatus::Stopped(_, Signal::SIGSTOP) => Ok(child),
        WaitStatus::Exited(_, 2) => skip!("no ptrace"),
        other => {
            ensure!(false, "{other:?}");
            Ok(child)
        }
    }
}

fn stopped(pid: Pid, signal: Signal) -> Outcome {
    ensure_eq!(waitpid(pid, None)?, WaitStatus::Stopped(pid, signal), "the child");
    Ok(())
}

fn ended_well(pid: Pid) -> Outcome {
    ensure_eq!(waitpid(pid, None)?, WaitStatus::Exited(pid, 0), "the child");
    Ok(())
}

/// Replaces the instruction at an address by INT3; answers the word that was there.
fn plant(pid: Pid, at: u64) -> nix::Result<c_long> {
    let address = std::ptr::with_exposed_provenance_mut::<c_void>(usize::try_from(at).unwrap_or(0));
    let word = ptrace::read(pid, address)?;
    ptrace::write(pid, address, word & !0xff | 0xcc)?;
    Ok(word)
}

fn restore(pid: Pid, at: u64, word: c_long) -> nix::Result<()> {
    let address = std::ptr::with_exposed_provenance_mut::<c_void>(usize::try_from(at).unwrap_or(0));
    ptrace::write(pid, address, word)
}

/// Lets it run until it comes to an address.
fn run_to(pid: Pid, at: u64) -> Outcome<user_regs_struct> {
    let word = plant(pid, at)?;
    ptrace::cont(pid, None)?;
    stopped(pid, Signal::SIGTRAP)?;
    let mut registers = ptrace::getregs(pid)?;
    ensure_eq!(registers.rip, at + 1, "RIP at a breakpoint");
    restore(pid, at, word)?;
    registers.rip = at;
    ptrace::setregs(pid, registers)?;
    Ok(registers)
}

/// What each step must do: by so many bytes.
const STEPS: &[(&str, &[u8])] = &[
    ("nop", &[0x90]),
    ("nop", &[0x90]),
    ("mov eax, 39", &[0xb8, 39, 0, 0, 0]),
    ("syscall", &[0x0f, 0x05]),
    ("nop", &[0x90]),
    ("xor ecx, ecx", &[0x31, 0xc9]),
    ("pushfq", &[0x9c]),
    ("pop rdx", &[0x5a]),
    ("movq xmm0, rax", &[0x66, 0x48, 0x0f, 0x6e, 0xc0]),
    ("mov eax, 24", &[0xb8, 24, 0, 0, 0]),
    ("syscall", &[0x0f, 0x05]),
    ("pxor xmm0, xmm0", &[0x66, 0x0f, 0xef, 0xc0]),
    ("rdtsc", &[0x0f, 0x31]),
    ("cpuid", &[0x0f, 0xa2]),
    ("mov eax, 7", &[0xb8, 7, 0, 0, 0]),
];

fn step() -> Outcome {
    // CPUID changes RBX.
    let mut bytes = vec![0x53];
    STEPS.iter().for_each(|(_, code)| bytes.extend_from_slice(code));
    bytes.extend_from_slice(&[0x5b, 0xc3]);
    let code = Code::new(&bytes)?;
    let start = code.at(1);
    let child = traced(|| {
        for _ in 0..20 {
            ensure_eq!(code.run(), 7, "what it returns");
        }
        Ok(())
    })?;
    let pid = child.pid;
    for round in 0..20 {
        let mut at = start;
        run_to(pid, start)?;
        for (name, instruction) in STEPS {
            ptrace::step(pid, None)?;
            stopped(pid, Signal::SIGTRAP)?;
            at += instruction.len() as u64;
            let registers = ptrace::getregs(pid)?;
            ensure_eq!(registers.rip - start, at - start, "after {name} of round {round}");
            ensure_eq!(registers.cs & 3, 3, "CS after {name}");
            if *name == "syscall" && registers.rax != 0 {
                ensure_eq!(registers.rax, u64::from(pid.as_raw().unsigned_abs()), "getpid");
            }
        }
        let info = ptrace::getsiginfo(pid)?;
        ensure_eq!(
            (info.si_signo, info.si_code),
            (libc::SIGTRAP, 2),
            "the signal of a step"
        );
    }
    // Some thousand steps through whatever the library does; RIP always moves.
    let (mut last, mut same) = (0, 0);
    for _ in 0..1500 {
        ptrace::step(pid, None)?;
        match waitpid(pid, None)? {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
            WaitStatus::Exited(_, 0) => return Ok(()),
            other => ensure!(false, "{other:?}"),
        }
        let rip = ptrace::getregs(pid)?.rip;
        ensure!(rip < 1 << 47, "RIP {rip:#x}");
        same += i32::from(rip == last);
        last = rip;
    }
    ensure!(same < 100, "RIP stands still {same} times");
    ptrace::cont(pid, None)?;
    ended_well(pid)
}

/// The first step with a signal ends at the handler's first instruction; further steps lead back.
fn step_into_a_handler() -> Outcome {
    extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}
    let code = Code::new(&[0x90, 0x90, 0x90, 0x90, 0xb8, 7, 0, 0, 0, 0xc3])?;
    // The compiler may make several of it; this is the one that is used.
    let handler: crate::sys::Handler = std::hint::black_box(handler);
    let child = traced(|| {
        handle(Signal::SIGUSR1, SaFlags::empty(), handler)?;
        for _ in 0..10 {
            ensure_eq!(code.run(), 7, "what it returns");
        }
        Ok(())
    })?;
    let pid = child.pid;
    for round in 0..10 {
        let before = run_to(pid, code.at(1))?;
        ptrace::step(pid, Signal::SIGUSR1)?;
        stopped(pid, Signal::SIGTRAP)?;
        let there = ptrace::getregs(pid)?;
        ensure_eq!(
            there.rip,
            (handler as *const ()).expose_provenance() as u64,
            "RIP at the handler"
        );
        ensure_eq!(
            there.rdi,
            libc::SIGUSR1.unsigned_abs().into(),
            "its first argument"
        );
        ensure!(there.rsp < before.rsp - 128, "it runs below the red zone");
        let mut steps = 0;
        loop {
            ptrace::step(pid, None)?;
            stopped(pid, Signal::SIGTRAP)?;
            let now = ptrace::getregs(pid)?;
            if now.rip == before.rip || now.rip == before.rip + 1 {
                ensure_eq!(
                    (now.rsp, now.rbx, now.r15),
                    (before.rsp, before.rbx, before.r15),
                    "round {round}"
                );
                break;
            }
            steps += 1;
            ensure!(steps < 200, "it does not come back: {:#x}", now.rip);
        }
    }
    ptrace::cont(pid, None)?;
    ended_well(pid)
}

fn breakpoints() -> Outcome {
    // Counts to 50: xor eax, eax; inc eax; cmp eax, 50; jne -7; ret
    let code = Code::new(&[0x31, 0xc0, 0xff, 0xc0, 0x83, 0xf8, 50, 0x75, 0xf9, 0xc3])?;
    let child = traced(|| {
        ensure_eq!(code.run(), 50, "what it returns");
        Ok(())
    })?;
    let pid = child.pid;
    for count in 1..=50 {
        let registers = run_to(pid, code.at(4))?;
        ensure_eq!(registers.rax, count, "RAX");
        ptrace::step(pid, None)?;
        stopped(pid, Signal::SIGTRAP)?;
    }
    ptrace::cont(pid, None)?;
    ended_well(pid)
}

fn registers() -> Outcome {
    // mov eax, 1; nop; ret
    let code = Code::new(&[0xb8, 1, 0, 0, 0, 0x90, 0xc3])?;
    let child = traced(|| {
        ensure_eq!(code.run(), 0x1234_5678_9abc_def0, "what it returns");
        Ok(())
    })?;
    let pid = child.pid;
    let mut registers = run_to(pid, code.at(5))?;
    ensure_eq!(registers.rax, 1, "RAX");
    registers.rax = 0x1234_5678_9abc_def0;
    registers.r10 = 10;
    registers.eflags |= 0x1;
    ptrace::setregs(pid, registers)?;
    let now = ptrace::getregs(pid)?;
    ensure_eq!(
        (now.rax, now.r10, now.eflags & 1),
        (registers.rax, 10, 1),
        "registers that were set"
    );
    ptrace::step(pid, None)?;
    stopped(pid, Signal::SIGTRAP)?;
    let now = ptrace::getregs(pid)?;
    ensure_eq!(
        (now.rax, now.r10, now.rip),
        (registers.rax, 10, code.at(6)),
        "registers after a step"
    );
    // Where no program may be.
    let mut wrong = now;
    wrong.cs = 0x10;
    let refused = ptrace::setregs(pid, wrong);
    ensure!(refused.is_err(), "CS 0x10 was taken");
    ptrace::setregs(pid, now)?;
    ptrace::cont(pid, None)?;
    ended_well(pid)
}

/// Through PTRACE_GETFPREGS and PTRACE_SETFPREGS.
fn vector_registers() -> Outcome {
    // movq rax, xmm1; nop; movq rax, xmm1; ret
    let code = Code::new(&[
        0x66, 0x48, 0x0f, 0x7e, 0xc8, 0x90, 0x66, 0x48, 0x0f, 0x7e, 0xc8, 0xc3,
    ])?;
    let child = traced(|| {
        ensure_eq!(code.run(), 0xfeed_f00d, "what it returns");
        Ok(())
    })?;
    let pid = child.pid;
    let before = run_to(pid, code.at(5))?;
    // SAFETY: numbers only.
    let mut state: libc::user_fpregs_struct = unsafe { std::mem::zeroed() };
    syscall!(
        SYS_ptrace,
        libc::PTRACE_GETFPREGS,
        pid.as_raw(),
        0usize,
        &raw mut state
    )?;
    let xmm1 = u64::from(state.xmm_space[4]) | u64::from(state.xmm_space[5]) << 32;
    ensure_eq!(xmm1, before.rax, "XMM1");
    ensure_eq!(state.mxcsr & 0xffc0, 0x1f80, "MXCSR");
    (state.xmm_space[4], state.xmm_space[5]) = (0xfeed_f00d, 0);
    syscall!(
        SYS_ptrace,
        libc::PTRACE_SETFPREGS,
        pid.as_raw(),
        0usize,
        &raw const state
    )?;
    ptrace::cont(pid, None)?;
    ended_well(pid)
}

/// Also what the child can only read: a write by the tracer makes a copy.
fn memory() -> Outcome {
    let page = Mapping::private(PAGE)?;
    for word in 0..64 {
        page.set(word * 8, word as u64 * 3);
    }
    page.protect(0, PAGE, ProtFlags::PROT_READ)?;
    let child = traced(|| {
        ensure_eq!(
            (page.get(0), page.get(8), page.get(16)),
            (0, 4711, 6),
            "what the tracer wrote"
        );
        Ok(())
    })?;
    for word in 0..64usize {
        let address = std::ptr::with_exposed_provenance_mut(page.address() + word * 8);
        ensure_eq!(ptrace::read(child.pid, address)?, word as i64 * 3, "word {word}");
    }
    restore(child.pid, page.address() as u64 + 8, 4711)?;
    ensure_eq!(page.get(8), 3, "the tracer's own");
    ensure!(
        ptrace::read(child.pid, std::ptr::without_provenance_mut(16)).is_err(),
        "a word of nothing"
    );
    ptrace::cont(child.pid, None)?;
    ended_well(child.pid)
}

fn system_calls() -> Outcome {
    let child = traced(|| {
        for _ in 0..30 {
            ensure_eq!(syscall!(SYS_getppid)?, 4242, "a result that was changed");
        }
        ensure_eq!(
            syscall!(SYS_getuid),
            Err(nix::errno::Errno::EOWNERDEAD),
            "a call that was not made"
        );
        Ok(())
    })?;
    let pid = child.pid;
    ptrace::setoptions(pid, Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL)?;
    let (mut entry, mut changed, mut calls) = (true, 0, 0);
    loop {
        ptrace::syscall(pid, None)?;
        match waitpid(pid, None)? {
            WaitStatus::PtraceSyscall(_) => {}
            WaitStatus::Exited(_, 0) => break,
            other => ensure!(false, "{other:?}"),
        }
        let mut registers = ptrace::getregs(pid)?;
        let number = c_long::try_from(registers.orig_rax).unwrap_or(-1);
        ensure_eq!(registers.rcx, registers.rip, "RCX by SYSCALL");
        match (entry, number) {
            (true, _) => ensure_eq!(registers.rax.cast_signed(), -38, "RAX at entry"),
            (false, libc::SYS_getppid) => {
                registers.rax = 4242;
                changed += 1;
            }
            (false, _) => {}
        }
        if entry && number == libc::SYS_getuid {
            registers.orig_rax = u64::MAX;
        }
        if !entry && number == -1 {
            registers.rax = (-i64::from(libc::EOWNERDEAD)).cast_unsigned();
        }
        ptrace::setregs(pid, registers)?;
        entry = !entry;
        calls += 1;
    }
    ensure!(
        changed == 30 && calls >= 62,
        "{changed} results changed, {calls} stops"
    );
    Ok(())
}

fn events() -> Outcome {
    let child = traced(|| {
        Child::start(|| Ok(()))?.join()?;
        Err(Command::new("/proc/self/exe").args(["exit", "0"]).exec().into())
    })?;
    let options = Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_TRACEEXIT
        | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(child.pid, options)?;
    ptrace::cont(child.pid, None)?;
    let (mut forks, mut execs, mut exits) = (0, 0, 0);
    loop {
        let status = waitpid(None, Some(WaitPidFlag::__WALL))?;
        let mut signal = None;
        match status {
            WaitStatus::PtraceEvent(_, _, event) => match event {
                _ if event == Event::PTRACE_EVENT_FORK as i32
                    || event == Event::PTRACE_EVENT_CLONE as i32 =>
                {
                    forks += 1;
                }
                _ if event == Event::PTRACE_EVENT_EXEC as i32 => execs += 1,
                _ if event == Event::PTRACE_EVENT_EXIT as i32 => exits += 1,
                _ => ensure!(false, "event {event}"),
            },
            WaitStatus::Exited(pid, 0) if pid == child.pid => break,
            WaitStatus::Stopped(_, Signal::SIGSTOP) | WaitStatus::Exited(_, 0) => {}
            WaitStatus::Stopped(_, other) => signal = Some(other),
            other => ensure!(false, "{other:?}"),
        }
        if let Some(pid) = status.pid().filter(|_| !matches!(status, WaitStatus::Exited(..))) {
            ptrace::cont(pid, signal)?;
        }
    }
    ensure_eq!((forks, execs, exits), (1, 1, 2), "forks, execs, exits");
    Ok(())
}

fn attach() -> Outcome {
    let shared = Mapping::shared(PAGE)?;
    let child = Child::start(|| {
        loop {
            shared.set(0, shared.get(0) + 1);
        }
    })?;
    for _ in 0..10 {
        available("ptrace", ptrace::attach(child.pid))?;
        stopped(child.pid, Signal::SIGSTOP)?;
        let count = shared.get(0);
        ensure!(ptrace::getregs(child.pid)?.rip > 0, "RIP");
        ensure_eq!(shared.get(0), count, "it counts on while stopped");
        ptrace::detach(child.pid, None)?;
        crate::sys::until("it to count on", || Ok(shared.get(0) > count))?;
    }
    ptrace::seize(child.pid, Options::empty())?;
    ptrace::interrupt(child.pid)?;
    let status = waitpid(child.pid, None)?;
    ensure!(
        matches!(status, WaitStatus::PtraceEvent(_, Signal::SIGTRAP, _)),
        "{status:?}"
    );
    ptrace::detach(child.pid, None)?;
    kill(child.pid, Signal::SIGKILL)?;
    let status = child.wait()?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
        "{status:?}"
    );
    Ok(())
}

/// Only read, write, exit and the return from signals are allowed then.
fn strict() -> Outcome {
    let child = Child::start(|| {
        match syscall!(SYS_prctl, libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) {
            Err(nix::errno::Errno::EINVAL) => skip!("no seccomp"),
            other => drop(other?),
        }
        let _ = syscall!(SYS_getpid);
        Ok(())
    })?;
    match child.wait()? {
        WaitStatus::Signaled(_, Signal::SIGKILL, _) => Ok(()),
        WaitStatus::Exited(_, 2) => skip!("no seccomp"),
        other => {
            ensure!(false, "{other:?}");
            Ok(())
        }
    }
}

fn filter() -> Outcome {
    fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> Outcome<libc::sock_filter> {
        let code = u16::try_from(code)?;
        Ok(libc::sock_filter { code, jt, jf, k })
    }
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    static CALL: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(0);
    extern "C" fn trapped(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: this is the handler of SIGSYS: address, then number of the call.
        let number = unsafe { info.cast::<i32>().add(6).read() };
        CALL.store(number, std::sync::atomic::Ordering::SeqCst);
    }
    let child = Child::start(|| {
        let program = [
            instruction(LOAD, 0, 0, 0)?,
            instruction(EQUAL, u32::try_from(libc::SYS_getuid)?, 0, 1)?,
            instruction(RETURN, libc::SECCOMP_RET_ERRNO | libc::EXDEV.unsigned_abs(), 0, 0)?,
            instruction(EQUAL, u32::try_from(libc::SYS_getgid)?, 0, 1)?,
            instruction(RETURN, libc::SECCOMP_RET_TRAP, 0, 0)?,
            instruction(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0)?,
        ];
        let filter = libc::sock_fprog {
            len: program.len().try_into()?,
            filter: program.as_ptr().cast_mut(),
        };
        syscall!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)?;
        match syscall!(
            SYS_prctl,
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const filter
        ) {
            Err(nix::errno::Errno::EINVAL) => skip!("no seccomp filters"),
            other => drop(other?),
        }
        handle(Signal::SIGSYS, SaFlags::empty(), trapped)?;
        for _ in 0..50 {
            ensure_eq!(syscall!(SYS_getuid), Err(nix::errno::Errno::EXDEV), "getuid");
            let _ = syscall!(SYS_getgid);
            ensure_eq!(
                CALL.swap(0, std::sync::atomic::Ordering::SeqCst),
                i32::try_from(libc::SYS_getgid)?,
                "trapped"
            );
            ensure_eq!(i32::try_from(syscall!(SYS_getpid)?)?, getpid().as_raw(), "getpid");
        }
        Ok(())
    })?;
    child.join()
}
