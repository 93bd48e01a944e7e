//! What a check is, and how one is run: in a process of its own, so that one that crashes or hangs takes nothing with it.

use std::fmt;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::panic::Location;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, setpgid};

use crate::sys::{self, Forked};

/// Longest text of a verdict; with the word before it, one write to a pipe.
const MAX_TEXT: usize = 1000;

/// Why a check does not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// This kernel, machine or user has not what is needed.
    Skip(String),
    /// Something is wrong.
    Fail(String),
}

/// Of a check, or of a part of one.
pub type Outcome<T = ()> = Result<T, Stop>;

impl From<Errno> for Stop {
    #[track_caller]
    fn from(error: Errno) -> Self {
        Self::Fail(format!("{error} at {}", Location::caller()))
    }
}

impl From<io::Error> for Stop {
    #[track_caller]
    fn from(error: io::Error) -> Self {
        Self::Fail(format!("{error} at {}", Location::caller()))
    }
}

impl From<std::num::TryFromIntError> for Stop {
    #[track_caller]
    fn from(error: std::num::TryFromIntError) -> Self {
        Self::Fail(format!("{error} at {}", Location::caller()))
    }
}

/// Ends the check as failed unless the condition holds, with a message that says what was found.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {{
        let holds: bool = $condition;
        if !holds {
            return Err($crate::check::Stop::Fail(format!("{} at {}:{}", format_args!($($message)+), file!(), line!())));
        }
    }};
}

/// Ends the check as failed unless both are equal.
#[macro_export]
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($what:tt)+) => {
        match (&$found, &$expected) {
            (found, expected) => $crate::ensure!(
                *found == *expected,
                "{}: {found:?}, expected {expected:?}",
                format_args!($($what)+)
            ),
        }
    };
}

/// Ends the check as skipped.
#[macro_export]
macro_rules! skip {
    ($($message:tt)+) => {
        return Err($crate::check::Stop::Skip(format!($($message)+)))
    };
}

/// The value of a call that the kernel may have been built without.
///
/// # Errors
/// [`Stop::Skip`] if it was, [`Stop::Fail`] for any other error.
#[track_caller]
pub fn available<T>(what: &str, result: nix::Result<T>) -> Outcome<T> {
    result.map_err(|error| match error {
        Errno::ENOSYS | Errno::EPERM => Stop::Skip(format!("{what}: {error}")),
        _ => Stop::from(error),
    })
}

/// One check.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// `GROUP.NAME`.
    pub name: &'static str,
    /// What is done; in a process of its own.
    pub run: fn() -> Outcome,
    /// Whether it may run beside others and itself.
    pub stress: bool,
}

/// A check for every use.
#[must_use]
pub const fn check(name: &'static str, run: fn() -> Outcome) -> Check {
    Check {
        name,
        run,
        stress: true,
    }
}

/// A check that needs the machine for itself, or too much of it.
#[must_use]
pub const fn alone(name: &'static str, run: fn() -> Outcome) -> Check {
    Check {
        name,
        run,
        stress: false,
    }
}

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// All was right.
    Ok,
    /// It could not be tried, and why.
    Skipped(String),
    /// What was wrong.
    Failed(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => write!(f, "ok"),
            Self::Skipped(why) => write!(f, "skipped {why}"),
            Self::Failed(what) => write!(f, "failed {what}"),
        }
    }
}

impl Verdict {
    /// From what [`fmt::Display`] has written.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        match word {
            "ok" => Some(Self::Ok),
            "skipped" => Some(Self::Skipped(rest.to_owned())),
            "failed" => Some(Self::Failed(rest.to_owned())),
            _ => None,
        }
    }

    /// On one line and not too long.
    fn bounded(self) -> Self {
        let bound = |text: String| -> String {
            let text = text.replace(['\n', '\r'], " ");
            text.chars().take(MAX_TEXT / 4).collect()
        };
        match self {
            Self::Ok => Self::Ok,
            Self::Skipped(why) => Self::Skipped(bound(why)),
            Self::Failed(what) => Self::Failed(bound(what)),
        }
    }
}

impl From<Outcome> for Verdict {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Ok(()) => Self::Ok,
            Err(Stop::Skip(why)) => Self::Skipped(why),
            Err(Stop::Fail(what)) => Self::Failed(what),
        }
    }
}

impl Check {
    /// Runs it in a process of its own. Whatever that leaves is ended.
    #[must_use]
    pub fn run_apart(&self, patience: Duration) -> Verdict {
        self.try_run_apart(patience)
            .unwrap_or_else(|stop| Err(stop).into())
            .bounded()
    }

    fn try_run_apart(&self, patience: Duration) -> Outcome<Verdict> {
        let (mut result, tell) = io::pipe()?;
        let child = match sys::fork()? {
            Forked::Child => {
                let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
                let panicked = tell.try_clone()?;
                std::panic::set_hook(Box::new(move |info| {
                    let verdict = Verdict::Failed(format!("panic: {info}")).bounded();
                    drop(io::Write::write_all(
                        &mut &panicked,
                        verdict.to_string().as_bytes(),
                    ));
                }));
                let verdict = Verdict::from((self.run)()).bounded();
                drop(io::Write::write_all(&mut &tell, verdict.to_string().as_bytes()));
                sys::exit(0);
            }
            Forked::Parent(child) => child,
        };
        let _ = setpgid(child, child); // whoever comes first
        drop(tell);
        let millis = u16::try_from(patience.as_millis()).unwrap_or(u16::MAX);
        let mut ready = [PollFd::new(result.as_fd(), PollFlags::POLLIN)];
        let told = loop {
            match poll(&mut ready, millis) {
                Ok(0) => break None,
                Ok(_) => {
                    let mut text = [0; MAX_TEXT * 2];
                    let length = result.read(&mut text)?;
                    break Some(String::from_utf8_lossy(&text[..length]).into_owned());
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        if told.is_none() {
            let _ = killpg(child, Signal::SIGKILL);
        }
        let status = waitpid(child, None)?;
        let _ = killpg(child, Signal::SIGKILL); // what it has left
        Ok(match told {
            None => Verdict::Failed(format!("no end within {} s", patience.as_secs())),
            Some(text) => {
                Verdict::parse(&text).unwrap_or_else(|| Verdict::Failed(format!("it ended as {status:?}")))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn verdicts_are_told_across_processes() {
        for (outcome, expected) in [
            (Ok(()), Verdict::Ok),
            (
                Err(Stop::Skip("no such thing".into())),
                Verdict::Skipped("no such thing".into()),
            ),
            (
                Err(Stop::Fail("7 is not 8".into())),
                Verdict::Failed("7 is not 8".into()),
            ),
        ] {
            let verdict = Verdict::from(outcome);
            assert_eq!(verdict, expected);
            assert_eq!(Verdict::parse(&verdict.to_string()), Some(expected));
        }
        assert_eq!(Verdict::parse(""), None);
        let long = Verdict::Failed("ä\n".repeat(10_000)).bounded().to_string();
        assert!(long.len() < MAX_TEXT && !long.contains('\n'));
    }

    #[test]
    fn a_check_that_crashes_or_hangs_has_failed() {
        fn crashes() -> Outcome {
            sys::exit(3);
        }
        fn hangs() -> Outcome {
            loop {
                nix::unistd::pause();
            }
        }
        let crashed = check("it.crashes", crashes).run_apart(PATIENCE);
        assert!(
            matches!(&crashed, Verdict::Failed(what) if what.contains("Exited")),
            "{crashed}"
        );
        let hung = check("it.hangs", hangs).run_apart(Duration::from_millis(50));
        assert!(
            matches!(&hung, Verdict::Failed(what) if what.contains("no end")),
            "{hung}"
        );
    }
}
