//! Named faults, for tests: `SHOAL_FAULT=NAME=ACTION[,...]` makes a step of a migration die, hang or fail. It is obeyed only
//! by a VMM that was started with `--allow-faults`, which agents never do. Unarmed, a point costs one load. Each entry
//! strikes once, the first time that its point is reached.
//!
//! Points are [`POINTS`], those of the phases on either side: `source.X` and `destination.X`. More of them:
//! `destination.memory`, before guest memory is mapped; `destination.ran_mark`, before the mark that the VM has run is
//! left, and `destination.marked`, after that and before it runs.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The environment variable that arms faults.
pub const VARIABLE: &str = "SHOAL_FAULT";

/// Where a fault can strike.
pub const POINTS: [&str; 24] = [
    "source.connect",
    "source.negotiate",
    "source.pre_copy",
    "source.pause",
    "source.final_pages",
    "source.state",
    "source.ready",
    "source.commit",
    "source.post_copy",
    "destination.connect",
    "destination.negotiate",
    "destination.memory",
    "destination.pre_copy",
    "destination.pause",
    "destination.final_pages",
    "destination.state",
    "destination.ready",
    "destination.commit",
    "destination.ran_mark",
    "destination.marked",
    "destination.running",
    "destination.post_copy",
    "source.verify",
    "destination.verify",
];

/// Address space that is left when memory runs out: enough for stacks and messages, too little for a guest.
const LEFT_WHEN_OUT_OF_MEMORY: u64 = 24 << 20;
const MAX_DELAY_MS: u64 = 3_600_000;

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// The process dies as by a crash.
    Kill,
    /// The thread goes no further, ever.
    Hang,
    /// The step fails.
    Error,
    /// From here on the process gets no more address space to speak of.
    OutOfMemory,
    /// The step fails as on a full disk.
    DiskFull,
    /// The step takes so much longer, and then goes on.
    Delay(Duration),
}

impl FromStr for Action {
    type Err = ();

    fn from_str(word: &str) -> Result<Self, ()> {
        Ok(match word {
            "kill" => Action::Kill,
            "hang" => Action::Hang,
            "error" => Action::Error,
            "oom" => Action::OutOfMemory,
            "disk_full" => Action::DiskFull,
            _ => return delay(word).map(Action::Delay).ok_or(()),
        })
    }
}

/// `delay:MILLISECONDS`, at most an hour.
fn delay(word: &str) -> Option<Duration> {
    let millis = word.strip_prefix("delay:")?.parse().ok()?;
    (millis <= MAX_DELAY_MS).then(|| Duration::from_millis(millis))
}

/// A fault that struck.
#[derive(Debug)]
pub struct Fault {
    point: &'static str,
    source: Option<io::Error>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fault injected at {}", self.point)?;
        self.source
            .as_ref()
            .map_or(Ok(()), |error| write!(f, ": {error}"))
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        match fault.source.as_ref().map(io::Error::kind) {
            Some(kind) => io::Error::new(kind, fault),
            None => io::Error::other(fault),
        }
    }
}

/// A word of `SHOAL_FAULT` that means nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{VARIABLE}: {0:?} is not POINT=ACTION with a known point and an action of kill, hang, error, oom, disk_full, delay:MS"
)]
pub struct UnknownFault(String);

#[derive(Debug)]
struct Armed {
    point: &'static str,
    action: Action,
    struck: AtomicBool,
}

static ARMED: OnceLock<Arms> = OnceLock::new();

#[derive(Debug)]
struct Arms {
    /// As it was asked for.
    text: String,
    faults: Vec<Armed>,
}

fn parse(text: &str) -> Result<Vec<Armed>, UnknownFault> {
    text.split(',')
        .filter(|word| !word.is_empty())
        .map(|word| {
            let unknown = || UnknownFault(word.to_owned());
            let (name, action) = word.split_once('=').ok_or_else(unknown)?;
            let point = POINTS.into_iter().find(|&point| point == name);
            Ok(Armed {
                point: point.ok_or_else(unknown)?,
                action: action.parse().map_err(|()| unknown())?,
                struck: AtomicBool::new(false),
            })
        })
        .collect()
}

/// Arms what the environment asks for, if this process was told to obey that; to be called once, when it starts.
///
/// # Errors
/// When it asks for something unknown: a test whose fault never strikes would prove nothing.
pub fn arm_from_environment(allowed: bool) -> Result<(), UnknownFault> {
    let Ok(text) = std::env::var(VARIABLE) else {
        return Ok(());
    };
    if !allowed {
        tracing::warn!("{VARIABLE} is set and not obeyed: this VMM was started without --allow-faults");
        return Ok(());
    }
    let faults = parse(&text)?;
    tracing::warn!("FAULTS ARE ARMED, this VMM is for a test: {VARIABLE}={text}");
    let _ = ARMED.set(Arms { text, faults }); // a second call finds the same
    Ok(())
}

/// What this process is armed with, as it was asked for; empty: nothing.
#[must_use]
pub fn armed() -> &'static str {
    ARMED.get().map_or("", |arms| &arms.text)
}

/// A place where a fault can strike; `name` is one of [`POINTS`].
///
/// # Errors
/// When the fault armed here is one that fails the step.
#[inline]
pub fn point(name: &str) -> Result<(), Fault> {
    ARMED.get().map_or(Ok(()), |arms| strike(&arms.faults, name))
}

#[cold]
fn strike(armed: &[Armed], name: &str) -> Result<(), Fault> {
    debug_assert!(POINTS.contains(&name), "{name} is not in POINTS");
    let first = |fault: &&Armed| fault.point == name && !fault.struck.swap(true, Ordering::SeqCst);
    let Some(fault) = armed.iter().find(first) else {
        return Ok(());
    };
    let point = fault.point;
    tracing::warn!("FAULT: {:?} at {point}", fault.action);
    match fault.action {
        Action::Kill => die(),
        Action::Hang => loop {
            std::thread::park();
        },
        Action::Error => Err(Fault { point, source: None }),
        Action::Delay(duration) => {
            std::thread::sleep(duration);
            Ok(())
        }
        Action::OutOfMemory => limit_address_space().map_err(|source| Fault {
            point,
            source: Some(source),
        }),
        Action::DiskFull => Err(Fault {
            point,
            source: Some(io::Error::from_raw_os_error(libc::ENOSPC)),
        }),
    }
}

fn die() -> ! {
    // SAFETY: a signal to this very process; nothing in memory is touched.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    loop {
        std::thread::park();
    }
}

fn limit_address_space() -> io::Result<()> {
    let pages = std::fs::read_to_string("/proc/self/statm")?;
    let pages = pages
        .split(' ')
        .next()
        .and_then(|pages| pages.parse::<u64>().ok());
    let used = pages.ok_or(io::ErrorKind::InvalidData)? * crate::spec::PAGE_SIZE;
    let limit = libc::rlimit {
        rlim_cur: used + LEFT_WHEN_OUT_OF_MEMORY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: setrlimit only reads the structure, which lives on the stack for the whole call.
    if unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_points_and_actions_are_refused_by_name() {
        for bad in [
            "source.stat=kill",
            "source.state",
            "source.state=die",
            "source.state=delay:x",
            "source.state=kill,x",
        ] {
            let error = parse(bad).expect_err(bad).to_string();
            let word = bad.rsplit(',').next().expect("a word");
            assert!(error.contains(&format!("{word:?}")), "{error}");
        }
    }

    #[test]
    fn a_fault_strikes_once_and_only_at_its_point() {
        let armed = parse("source.state=error,destination.ran_mark=disk_full").expect("known");
        assert!(strike(&armed, "source.ready").is_ok());
        let first = strike(&armed, "source.state").expect_err("the first time");
        assert_eq!(first.to_string(), "fault injected at source.state");
        assert!(strike(&armed, "source.state").is_ok(), "the second time");
        let full: io::Error = strike(&armed, "destination.ran_mark").expect_err("armed").into();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn without_the_variable_nothing_strikes() {
        assert!(POINTS.into_iter().all(|name| point(name).is_ok()));
    }
}
