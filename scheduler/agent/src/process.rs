//! Processes that are named so that no stranger is ever taken for them, watched, and ended.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Child;
use tokio::sync::watch;
use uuid::Uuid;

use crate::procfs;

/// How soon it is looked again whether all threads have stopped: signals arrive within microseconds.
const FREEZE_POLL: Duration = Duration::from_millis(1);

/// One process for ever: a pid can be used again, but not with the same start time within one boot of the host.
///
/// Written in pid files as `PID START BOOT`, START being field 22 of `/proc/PID/stat` and BOOT a UUID. Files of before have no BOOT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: u32,
    /// Clock ticks from the host's boot to the start of the process.
    pub start_ticks: u64,
    /// Which boot that was, `/proc/sys/kernel/random/boot_id`; none if it is not known.
    pub boot_id: Option<Uuid>,
}

/// The boot that the host is in.
pub(crate) fn this_boot() -> Option<Uuid> {
    static BOOT: OnceLock<Option<Uuid>> = OnceLock::new();
    *BOOT.get_or_init(|| {
        let read = procfs::read("/proc/sys/kernel/random/boot_id");
        read.ok()?.trim().parse().ok()
    })
}

impl ProcessIdentity {
    /// The process that has this pid now.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        procfs::process_stat(pid).map(|stat| Self {
            pid,
            start_ticks: stat.start_ticks,
            boot_id: this_boot(),
        })
    }

    /// Whether it still runs. A zombie has ended, and so has all that ran before the host was started again.
    #[must_use]
    pub fn is_running(&self) -> bool {
        let other_boot = self
            .boot_id
            .zip(this_boot())
            .is_some_and(|(its, this)| its != this);
        !other_boot && self.is_there()
    }

    fn is_there(&self) -> bool {
        procfs::process_stat(self.pid)
            .is_ok_and(|stat| stat.start_ticks == self.start_ticks && stat.is_running())
    }

    /// Asks it to end (SIGTERM). Does nothing if it has ended; never touches another process.
    ///
    /// # Errors
    /// If the kernel refuses the signal.
    pub fn terminate(&self) -> io::Result<()> {
        self.signal(Signal::TERM)
    }

    /// Ends it (SIGKILL). Does nothing if it has ended; never touches another process.
    ///
    /// # Errors
    /// If the kernel refuses the signal.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Lets it go on if it is stopped (SIGCONT).
    pub(crate) fn thaw(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        match self.open()? {
            Some(pidfd) => send(&pidfd, signal),
            None => Ok(()),
        }
    }

    /// A pidfd for it, or `None` if it has ended. The start time is looked at once the descriptor pins the process.
    fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(self.is_running().then_some(pidfd))
    }
}

fn send(pidfd: &OwnedFd, signal: Signal) -> io::Result<()> {
    match pidfd_send_signal(pidfd, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl fmt::Display for ProcessIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.start_ticks)?;
        match self.boot_id {
            Some(boot) => write!(f, " {boot}"),
            None => Ok(()),
        }
    }
}

/// Text that is no [`ProcessIdentity`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not 'PID START BOOT', two decimal numbers and a UUID")]
pub struct ParseIdentityError;

impl FromStr for ProcessIdentity {
    type Err = ParseIdentityError;
    fn from_str(text: &str) -> Result<Self, ParseIdentityError> {
        let mut words = text.split_ascii_whitespace();
        let (Some(pid), Some(start), boot, None) = (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(ParseIdentityError);
        };
        let pid = pid.parse().map_err(|_| ParseIdentityError)?;
        let start_ticks = start.parse().map_err(|_| ParseIdentityError)?;
        let boot_id = boot.map(str::parse).transpose().map_err(|_| ParseIdentityError)?;
        Ok(Self {
            pid,
            start_ticks,
            boot_id,
        })
    }
}

/// A process whose end is noticed at once, whether this agent started it or found it.
#[derive(Debug)]
pub(crate) struct WatchedProcess {
    identity: ProcessIdentity,
    end: watch::Receiver<Option<String>>,
}

impl WatchedProcess {
    /// A child of this agent; it is also reaped.
    pub(crate) fn from_child(mut child: Child) -> io::Result<Self> {
        let pid = child
            .id()
            .ok_or_else(|| io::Error::other("the process has already been waited for"))?;
        let identity = ProcessIdentity::of(pid)?; // not yet waited for, so the pid is still its own
        let (report, end) = watch::channel(None);
        tokio::spawn(async move {
            let words = match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => format!("its exit status could not be read: {error}"),
            };
            report.send_replace(Some(words));
        });
        Ok(Self { identity, end })
    }

    /// A process that an earlier agent started, and may have left frozen. If it has ended, so says [`Self::exited`].
    pub(crate) fn adopt(identity: ProcessIdentity) -> io::Result<Self> {
        let Some(pidfd) = identity.open()? else {
            return Ok(Self::gone(identity));
        };
        identity.thaw()?;
        #[expect(
            deprecated,
            reason = "its unsafe successor is for types that may close the descriptor; this owns it"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        let (report, end) = watch::channel(None);
        tokio::spawn(async move {
            let words = match pidfd.readable().await {
                Ok(_) => "exit status unknown: an earlier agent started it".to_owned(),
                Err(error) => format!("it could not be watched: {error}"),
            };
            report.send_replace(Some(words));
        });
        Ok(Self { identity, end })
    }

    /// A process that ended while no agent looked.
    pub(crate) fn gone(identity: ProcessIdentity) -> Self {
        let (_, end) = watch::channel(Some("it ended while no agent watched".to_owned()));
        Self { identity, end }
    }

    pub(crate) fn identity(&self) -> ProcessIdentity {
        self.identity
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Waits until it has ended, and says how.
    pub(crate) async fn exited(&self) -> String {
        let mut end = self.end.clone();
        let words = end
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|words| words.clone());
        match words {
            Some(words) => words,
            None => std::future::pending().await, // the runtime is shutting down
        }
    }

    /// Has it do nothing more until it is thawed or killed; what a thread of it has asked of the kernel may still happen.
    pub(crate) async fn freeze(&self, limit: Duration) -> io::Result<Frozen> {
        self.identity.signal(Signal::STOP)?;
        let frozen = Frozen(self.identity);
        let all_stopped = async {
            while !procfs::is_stopped(self.identity.pid)? {
                tokio::time::sleep(FREEZE_POLL).await;
            }
            io::Result::Ok(())
        };
        match tokio::time::timeout(limit, all_stopped).await {
            Ok(stopped) => stopped?,
            Err(_) => tracing::warn!(pid = self.identity.pid, "a thread of it is stuck in the kernel"),
        }
        Ok(frozen)
    }

    /// Ends it (SIGKILL).
    pub(crate) fn kill(&self) -> io::Result<()> {
        if self.is_gone() {
            Ok(())
        } else {
            self.identity.kill()
        }
    }
}

/// A process that is stopped for as long as this lives.
#[derive(Debug)]
pub(crate) struct Frozen(ProcessIdentity);

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = self.0.thaw() {
            tracing::warn!(pid = self.0.pid, %error, "it cannot be continued");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> tokio::process::Command {
        let mut command = tokio::process::Command::new("sleep");
        command.arg("1000");
        command
    }

    #[test]
    fn identities_survive_a_file() {
        let own = ProcessIdentity::of(std::process::id()).expect("own identity");
        assert_eq!(own.to_string().parse(), Ok(own));
        assert_eq!(format!("{own}\n").parse(), Ok(own));
        let of_before = ProcessIdentity { boot_id: None, ..own };
        assert_eq!(of_before.to_string(), format!("{} {}", own.pid, own.start_ticks));
        assert_eq!(of_before.to_string().parse(), Ok(of_before));
        assert!(own.boot_id.is_some() && of_before.is_running());
        for bad in ["", "1", "1 2 3", "a b", "-1 2", "99999999999 1", "1 2 boot"] {
            assert_eq!(bad.parse::<ProcessIdentity>(), Err(ParseIdentityError), "{bad}");
        }
    }

    #[test]
    fn a_stranger_with_the_same_pid_is_not_running_and_not_touched() {
        let own = ProcessIdentity::of(std::process::id()).expect("own identity");
        let stranger = ProcessIdentity {
            start_ticks: own.start_ticks + 1,
            ..own
        };
        let of_another_boot = ProcessIdentity {
            boot_id: Some(Uuid::from_u128(1)),
            ..own
        };
        assert!(own.is_running() && !stranger.is_running() && !of_another_boot.is_running());
        stranger.kill().expect("nothing to do");
        of_another_boot.kill().expect("nothing to do");
        ProcessIdentity {
            pid: 0,
            start_ticks: 0,
            boot_id: None,
        }
        .kill()
        .expect("nothing to do");
        ProcessIdentity {
            pid: u32::MAX,
            start_ticks: 0,
            boot_id: None,
        }
        .kill()
        .expect("nothing to do");
    }

    #[tokio::test]
    async fn the_end_of_a_child_is_noticed_and_told() {
        let process = WatchedProcess::from_child(sleeper().spawn().expect("sleep runs")).expect("watched");
        assert!(!process.is_gone());
        process.kill().expect("killed");
        assert!(process.exited().await.contains("SIGKILL"));
        assert!(!process.identity().is_running());
        process.kill().expect("nothing to do");
    }

    #[tokio::test]
    async fn a_frozen_process_stands_still_until_it_is_thawed_or_adopted() {
        let mut child = sleeper().spawn().expect("sleep runs");
        let identity = ProcessIdentity::of(child.id().expect("a pid")).expect("identity");
        let process = WatchedProcess::adopt(identity).expect("watched");
        let stopped = || procfs::is_stopped(identity.pid).expect("it lives");
        let frozen = process.freeze(Duration::from_secs(60)).await.expect("frozen");
        assert!(stopped());
        drop(frozen);
        assert!(!stopped(), "SIGCONT takes effect before kill(2) returns");

        std::mem::forget(process.freeze(Duration::from_secs(60)).await.expect("frozen"));
        assert!(stopped(), "as one whose agent died");
        let process = WatchedProcess::adopt(identity).expect("adopted");
        assert!(!stopped());
        process.kill().expect("killed");
        child.wait().await.expect("reaped");
    }

    #[tokio::test]
    async fn an_adopted_process_is_watched_too() {
        let mut child = sleeper().spawn().expect("sleep runs");
        let identity = ProcessIdentity::of(child.id().expect("a pid")).expect("identity");
        let process = WatchedProcess::adopt(identity).expect("watched");
        assert!(!process.is_gone());
        process.kill().expect("killed");
        process.exited().await;
        child.wait().await.expect("reaped");
        assert!(WatchedProcess::adopt(identity).expect("adopted").is_gone());
    }
}
