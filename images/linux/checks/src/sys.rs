//! What the checks share: processes, memory, signals, time. Everything that is unsafe about them is here as far as it goes.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{c_int, c_long, c_void, siginfo_t, timespec, ucontext_t};
use nix::sys::prctl;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use crate::check::{Outcome, Stop};
use crate::ensure;

pub use crate::mapping::{Mapping, rw};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Forked {
    /// The new one. It ends with the old one.
    Child,
    /// The old one.
    Parent(Pid),
}

/// fork(2).
///
/// # Errors
/// Its own.
pub fn fork() -> nix::Result<Forked> {
    // SAFETY: the C library makes malloc usable in the child, and nothing here holds another lock over a fork.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => {
            let _ = prctl::set_pdeathsig(Signal::SIGKILL);
            Ok(Forked::Child)
        }
        ForkResult::Parent { child } => Ok(Forked::Parent(child)),
    }
}

/// _exit(2): nothing is flushed twice.
pub fn exit(status: c_int) -> ! {
    // SAFETY: ends the process, no matter what state it is in.
    unsafe { libc::_exit(status) }
}

/// A process that does something and says what was wrong.
#[derive(Debug)]
pub struct Child {
    /// Its id.
    pub pid: Pid,
    said: io::PipeReader,
}

impl Child {
    /// Starts one.
    ///
    /// # Errors
    /// If there can be no more.
    pub fn start(body: impl FnOnce() -> Outcome) -> Outcome<Self> {
        let (said, mut say) = io::pipe()?;
        match fork()? {
            Forked::Parent(pid) => Ok(Self { pid, said }),
            Forked::Child => {
                drop(said);
                match body() {
                    Ok(()) => exit(0),
                    Err(Stop::Skip(why)) => {
                        drop(write!(say, "skip {why}"));
                        exit(2)
                    }
                    Err(Stop::Fail(what)) => {
                        drop(write!(say, "fail {what}"));
                        exit(1)
                    }
                }
            }
        }
    }

    /// Waits for its end, which must be a good one.
    ///
    /// # Errors
    /// What it has said, or how it ended.
    pub fn join(mut self) -> Outcome {
        let status = self.wait()?;
        if status == WaitStatus::Exited(self.pid, 0) {
            return Ok(());
        }
        let mut said = String::new();
        self.said.read_to_string(&mut said)?;
        Err(match said.split_once(' ') {
            Some(("skip", why)) => Stop::Skip(why.to_owned()),
            Some((_, what)) => Stop::Fail(format!("in a child: {what}")),
            None => Stop::Fail(format!("a child ended: {status:?}")),
        })
    }

    /// Waits for its end, however that is.
    ///
    /// # Errors
    /// If it is not there.
    pub fn wait(&self) -> Outcome<WaitStatus> {
        Ok(retry(|| waitpid(self.pid, None))?)
    }
}

/// A call again until no signal comes in between.
///
/// # Errors
/// Its own.
pub fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// What a system call can be given: a number, or an address.
pub trait Argument {
    /// As it is in a register.
    fn word(self) -> c_long;
}

macro_rules! arguments {
    ($($kind:ty: $value:ident => $word:expr),* $(,)?) => {
        $(impl Argument for $kind {
            fn word(self) -> c_long {
                let $value = self;
                $word
            }
        })*
    };
}

arguments!(
    i32: value => value.into(),
    u32: value => value.into(),
    i64: value => value,
    u64: value => value.cast_signed(),
    usize: value => (value as u64).cast_signed(),
);

impl<T> Argument for *const T {
    fn word(self) -> c_long {
        self.expose_provenance().word()
    }
}

impl<T> Argument for *mut T {
    fn word(self) -> c_long {
        self.expose_provenance().word()
    }
}

/// A system call. What is given by address must be a variable or a mapping of the caller's that outlives the call and is as large as
/// the call expects, or no valid address, which the kernel has to find out.
///
/// # Errors
/// Its own.
pub fn call<const COUNT: usize>(number: c_long, given: [c_long; COUNT]) -> nix::Result<usize> {
    const { assert!(COUNT <= 6) };
    let mut words = [0; 6];
    words[..COUNT].copy_from_slice(&given);
    let [a, b, c, d, e, f] = words;
    // SAFETY: as every caller keeps to what is said above.
    let result = Errno::result(unsafe { libc::syscall(number, a, b, c, d, e, f) })?;
    usize::try_from(result).map_err(|_| Errno::ERANGE)
}

/// [`call`], by name and with arguments of any kind.
#[macro_export]
macro_rules! syscall {
    ($number:ident $(, $argument:expr)* $(,)?) => {
        $crate::sys::call(libc::$number, [$($crate::sys::Argument::word($argument)),*])
    };
}

/// A signal handler that is told what happened.
pub type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// Sets what is done at a signal.
///
/// # Errors
/// sigaction(2)'s.
pub fn handle(signal: Signal, flags: SaFlags, handler: Handler) -> nix::Result<()> {
    let action = SigAction::new(
        SigHandler::SigAction(handler),
        flags | SaFlags::SA_SIGINFO,
        SigSet::empty(),
    );
    // SAFETY: the handlers of the checks touch atomics, their own stack and the context that they are given.
    unsafe { sigaction(signal, &action) }.map(drop)
}

/// Back to what is done at a signal by default.
///
/// # Errors
/// sigaction(2)'s.
pub fn unhandle(signal: Signal) -> nix::Result<()> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler.
    unsafe { sigaction(signal, &action) }.map(drop)
}

/// The registers in what a handler is given last.
///
/// # Safety
/// Only with what the handler was given, and while it runs.
pub unsafe fn context<'a>(given: *mut c_void) -> &'a mut ucontext_t {
    // SAFETY: the caller's promise.
    unsafe { &mut *given.cast::<ucontext_t>() }
}

/// A directory of its own, gone with this.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new() -> Outcome<Self> {
        let path = std::env::temp_dir().join(format!("checks.{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Itself.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// What a clock shows.
///
/// # Errors
/// clock_gettime(2)'s.
pub fn clock(id: nix::time::ClockId) -> nix::Result<Duration> {
    Ok(Duration::from(nix::time::clock_gettime(id)?))
}

/// Monotonic time.
///
/// # Errors
/// clock_gettime(2)'s.
pub fn now() -> nix::Result<Duration> {
    clock(nix::time::ClockId::CLOCK_MONOTONIC)
}

/// As the kernel has it.
#[must_use]
pub fn as_timespec(duration: Duration) -> timespec {
    *nix::sys::time::TimeSpec::from(duration).as_ref()
}

/// Waits until a condition holds.
///
/// # Errors
/// If it does not for a long time.
pub fn until(what: &str, mut condition: impl FnMut() -> Outcome<bool>) -> Outcome {
    let deadline = now()? + Duration::from_secs(30);
    while !condition()? {
        ensure!(now()? < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// Repeatable bytes: SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below a limit, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next_word() % limit as u64).unwrap_or(0)
    }

    /// Fills with the next bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_word().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Sends so many repeatable bytes in pieces of changing size.
///
/// # Errors
/// Those of the writer.
pub fn send_stream(mut to: impl io::Write, length: usize, seed: u64) -> Outcome {
    let (mut random, mut sizes) = (Random::new(seed), Random::new(!seed));
    let mut buffer = vec![0; 1 << 16];
    let mut left = length;
    while left > 0 {
        let size = (8 + (sizes.below(buffer.len() - 8) & !7)).min(left);
        random.fill(&mut buffer[..size]);
        to.write_all(&buffer[..size])?;
        left -= size;
    }
    Ok(())
}

/// Receives what [`send_stream`] sends, and nothing else until the end.
///
/// # Errors
/// Those of the reader, and the first byte that is another.
pub fn check_stream(mut from: impl io::Read, length: usize, seed: u64) -> Outcome {
    let mut random = Random::new(seed);
    let (mut buffer, mut expected) = (vec![0; 1 << 15], vec![0; 1 << 15]);
    let (mut done, mut held) = (0, 0);
    loop {
        let read = from.read(&mut buffer[held..])?;
        held += read;
        // Whole words, so that the random numbers come as they were made.
        let whole = if read == 0 { held } else { held & !7 };
        random.fill(&mut expected[..whole]);
        if let Some(at) = (0..whole).find(|&at| buffer[at] != expected[at]) {
            return Err(Stop::Fail(format!("byte {} of a stream is wrong", done + at)));
        }
        done += whole;
        buffer.copy_within(whole..held, 0);
        held -= whole;
        if read == 0 {
            break;
        }
    }
    ensure!(done == length, "{done} bytes of {length} came");
    Ok(())
}

/// A descriptor for as long as its owner lives.
pub fn raw(descriptor: &impl AsFd) -> c_int {
    use std::os::fd::AsRawFd as _;
    let descriptor: BorrowedFd<'_> = descriptor.as_fd();
    descriptor.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_checked_byte_by_byte() {
        let mut bytes = Vec::new();
        send_stream(&mut bytes, 100_003, 7).expect("sent");
        assert_eq!(bytes.len(), 100_003);
        check_stream(&bytes[..], 100_003, 7).expect("as it was sent");
        assert!(check_stream(&bytes[..], 100_003, 8).is_err());
        assert!(check_stream(&bytes[..100_000], 100_003, 7).is_err());
        bytes[70_001] ^= 1;
        assert!(
            matches!(check_stream(&bytes[..], 100_003, 7), Err(Stop::Fail(what)) if what.contains("70001"))
        );
    }

    #[test]
    fn children_say_what_is_wrong() {
        let child = Child::start(|| Err(Stop::Fail("all of it".into()))).expect("a child");
        assert!(matches!(child.join(), Err(Stop::Fail(what)) if what.contains("all of it")));
        Child::start(|| Ok(())).expect("a child").join().expect("its end");
    }
}
