//! System calls of x86-64 Linux (syscalls(2)), without a C library.

use core::arch::{asm, naked_asm};
use core::convert::Infallible;
use core::ffi::{CStr, c_char};
use core::ptr;

const SYS_WRITE: usize = 1;
const SYS_OPEN: usize = 2;
const SYS_RT_SIGACTION: usize = 13;
const SYS_IOCTL: usize = 16;
const SYS_PWRITE64: usize = 18;
const SYS_DUP2: usize = 33;
const SYS_GETPID: usize = 39;
const SYS_FORK: usize = 57;
const SYS_EXECVE: usize = 59;
const SYS_EXIT: usize = 60;
const SYS_WAIT4: usize = 61;
const SYS_MKDIR: usize = 83;
const SYS_SETSID: usize = 112;
const SYS_SYNC: usize = 162;
const SYS_MOUNT: usize = 165;
const SYS_REBOOT: usize = 169;

const O_WRONLY: usize = 1;
const O_RDWR: usize = 2;
const TIOCSCTTY: usize = 0x540e;
/// With any argument but 0: wait until all output has been sent.
const TCSBRK: usize = 0x5409;
const REBOOT_MAGIC1: usize = 0xfee1_dead;
const REBOOT_MAGIC2: usize = 0x2812_1969;
const REBOOT_RESTART: usize = 0x0123_4567;

const SIGTTOU: usize = 22;
const SIG_IGN: usize = 1;
/// Bytes of the kernel's signal set.
const SIGNAL_SET_SIZE: usize = 8;

const STDIN: usize = 0;
const STDERR: usize = 2;
/// The port to which a guest writes its workload's exit status (docs/images.md).
const EXIT_STATUS_PORT: usize = 0x6f0;

/// A system call's error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Error(isize);

/// ENOENT.
pub const NO_SUCH_FILE: Error = Error(2);

impl Error {
    /// EINTR.
    pub const INTERRUPTED: Self = Self(4);

    /// In words, for those that can be expected here.
    pub fn as_text(self) -> &'static CStr {
        match self.0 {
            2 => c"no such file",
            5 => c"I/O error",
            7 => c"arguments too long",
            8 => c"not an executable format",
            12 => c"not enough memory",
            13 => c"permission denied",
            16 => c"busy",
            19 => c"not supported by this kernel",
            20 => c"not a directory",
            40 => c"too many links",
            _ => c"system call failed",
        }
    }
}

/// Which of the two processes that fork(2) leaves this is.
#[derive(Debug)]
pub enum Process {
    /// The new one.
    Child,
    /// The old one, with the new one's id.
    Parent(i32),
}

/// Program entry: hands the stack that the kernel made to `run`.
///
/// # Safety
/// Only for the kernel to jump to.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("mov rdi, rsp", "and rsp, -16", "call {run}", "ud2", run = sym crate::run)
}

/// Makes a system call of up to five arguments.
///
/// # Safety
/// As the system call: pointers among the arguments must be what it expects.
unsafe fn call<const COUNT: usize>(number: usize, given: [usize; COUNT]) -> Result<usize, Error> {
    const { assert!(COUNT <= 5) };
    let mut arguments = [0; 5];
    arguments[..COUNT].copy_from_slice(&given);
    let result: isize;
    // SAFETY: the caller's promise; SYSCALL overwrites RCX and R11 besides its result.
    unsafe {
        asm!("syscall", inlateout("rax") number => result,
            in("rdi") arguments[0], in("rsi") arguments[1], in("rdx") arguments[2], in("r10") arguments[3],
            in("r8") arguments[4], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    usize::try_from(result).map_err(|_| Error(-result))
}

/// The address of something that a system call is given.
fn address<T: ?Sized>(value: &T) -> usize {
    ptr::from_ref(value).expose_provenance()
}

/// open(2).
fn open(path: &CStr, flags: usize) -> Result<usize, Error> {
    // SAFETY: a string, for as long as the call takes.
    unsafe { call(SYS_OPEN, [address(path), flags]) }
}

/// write(2).
fn write(file: usize, bytes: &[u8]) -> Result<usize, Error> {
    // SAFETY: as many bytes as said, for as long as the call takes.
    unsafe { call(SYS_WRITE, [file, address(bytes), bytes.len()]) }
}

/// getpid(2).
pub fn process_id() -> usize {
    // SAFETY: no pointers.
    unsafe { call(SYS_GETPID, []) }.unwrap_or(0)
}

/// mkdir(2).
pub fn make_directory(path: &CStr) -> Result<(), Error> {
    const MODE: usize = 0o755;
    // SAFETY: a string, for as long as the call takes.
    unsafe { call(SYS_MKDIR, [address(path), MODE]) }.map(drop)
}

/// mount(2), without a device and without options.
pub fn mount(kind: &CStr, target: &CStr) -> Result<(), Error> {
    // SAFETY: strings, for as long as the call takes.
    unsafe { call(SYS_MOUNT, [address(kind), address(target), address(kind)]) }.map(drop)
}

/// fork(2).
pub fn fork() -> Result<Process, Error> {
    // SAFETY: one thread and nothing shared: both processes can go on.
    let process = unsafe { call(SYS_FORK, []) }?;
    Ok(i32::try_from(process)
        .ok()
        .filter(|&process| process > 0)
        .map_or(Process::Child, Process::Parent))
}

/// execve(2): returns only if it failed. Both lists must end with NULL.
pub fn execute(
    path: &CStr,
    arguments: &[*mut c_char],
    environment: &[*const c_char],
) -> Result<Infallible, Error> {
    // SAFETY: a string and two lists of strings, for as long as the call takes.
    match unsafe {
        call(
            SYS_EXECVE,
            [address(path), address(arguments), address(environment)],
        )
    } {
        Err(error) => Err(error),
        Ok(_) => exit(0),
    }
}

/// Waits for any child to end: its id and status as wait4(2) gives them.
pub fn wait_any() -> Result<(i32, u32), Error> {
    const ANY: usize = usize::MAX;
    let mut status = 0u32;
    // SAFETY: the status is written to a variable that outlives the call.
    let process = unsafe { call(SYS_WAIT4, [ANY, (&raw mut status).expose_provenance()]) }?;
    Ok((i32::try_from(process).unwrap_or(0), status))
}

/// exit(2).
pub fn exit(status: u8) -> ! {
    loop {
        // SAFETY: no pointers; does not return.
        let _ = unsafe { call(SYS_EXIT, [status.into()]) };
    }
}

/// Starts a session with the serial console as its terminal, so that ^C and job control work. Init has to lead it: when a leader
/// ends, the terminal is hung up, and what it has not sent yet is lost. Where there is no such console, the standard streams stay
/// what the kernel made them.
pub fn take_terminal() {
    let Ok(terminal) = open(c"/dev/ttyS0", O_RDWR) else {
        return;
    };
    // SAFETY: no pointers.
    unsafe {
        let _ = call(SYS_SETSID, []);
        let _ = call(SYS_IOCTL, [terminal, TIOCSCTTY]);
        for stream in STDIN..=STDERR {
            let _ = call(SYS_DUP2, [terminal, stream]);
        }
    }
}

/// One line on the console: `init: ` and the parts.
pub fn complain(parts: &[&CStr]) {
    // If it cannot be written there is nowhere else to say so.
    let say = |text: &CStr| {
        let _ = write(STDERR, text.to_bytes());
    };
    say(c"init: ");
    parts.iter().copied().for_each(say);
    say(c"\n");
}

/// Reports the workload's exit status and ends the machine, after all console output is out and file systems are clean.
pub fn end_machine(status: u8) -> ! {
    finish_output();
    if let Err(error) = report(status) {
        complain(&[c"cannot report the exit status: ", error.as_text()]);
    }
    // The console has been the workload's: the kernel need not say that it restarts.
    let _ = open(c"/proc/sys/kernel/printk", O_WRONLY).and_then(|level| write(level, b"0"));
    // SAFETY: no pointers.
    unsafe {
        let _ = call(SYS_SYNC, []);
        let _ = call(SYS_REBOOT, [REBOOT_MAGIC1, REBOOT_MAGIC2, REBOOT_RESTART]);
    }
    complain(&[c"the machine does not restart"]);
    exit(1);
}

/// Waits until the console has sent everything.
fn finish_output() {
    // As the kernel has it: handler, flags, restorer, mask.
    let ignore = [SIG_IGN, 0, 0, 0];
    // SAFETY: a signal action, for as long as the call takes; no pointers in the other.
    unsafe {
        // Another process group may have the terminal; waiting for its output is then allowed only to who ignores this signal.
        let _ = call(SYS_RT_SIGACTION, [SIGTTOU, address(&ignore), 0, SIGNAL_SET_SIZE]);
        let _ = call(SYS_IOCTL, [STDERR, TCSBRK, 1]);
    }
}

fn report(status: u8) -> Result<(), Error> {
    let port = open(c"/dev/port", O_WRONLY)?;
    // SAFETY: one byte, for as long as the call takes.
    unsafe { call(SYS_PWRITE64, [port, address(&status), 1, EXIT_STATUS_PORT]) }.map(drop)
}
