//! Which scheduler leads, as far as this node has heard: the highest term, kept on disk.
//!
//! A scheduler that was deposed may not know it yet, and have calls under way. Whatever it asks is refused as soon as this
//! node has heard of the one after it, which it has at the latest when it reports to that one.
//!
//! A higher term cannot be taken back, so nobody can raise it who does not know the cluster's secret, no call that does not
//! parse, and nothing that no scheduler can have reached.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use shoal_proto::TERM_HEADER;
use shoal_secret::Demand;
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::epochs::{read_if_there, write_durably};

/// By how much the clocks of a cluster may differ. Terms are the seconds since 1970 at which a lead began, unless leads follow
/// each other faster than that.
const CLOCKS_DIFFER: Duration = Duration::from_secs(24 * 60 * 60);

/// The highest term heard of.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    highest: Mutex<u64>,
}

/// Why a scheduler is not obeyed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TermError {
    /// Another leads.
    #[error(
        "term: {asked} is over, the scheduler of term {highest} leads; nothing was done. If that one is gone for good, \
         remove the file 'term' in the agent's state directory"
    )]
    Over { asked: u64, highest: u64 },
    /// A mistake, or a lie.
    #[error(
        "term: {asked} is more than a day ahead of this node's clock, so no scheduler can have reached it; nothing was \
         done. Are the clocks of scheduler and node right?"
    )]
    Ahead { asked: u64 },
    /// Without it on disk an older one might be obeyed after a restart.
    #[error("the term file in {dir} cannot be written: {source}")]
    File { dir: PathBuf, source: io::Error },
}

impl Terms {
    /// As this directory remembers.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let path = file(dir);
        let highest = match read_if_there(&path)? {
            None => 0,
            Some(text) => text.trim().parse().map_err(|_| {
                let what = format!("{} holds no number", path.display());
                io::Error::new(io::ErrorKind::InvalidData, what)
            })?,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                dir: dir.to_owned(),
                highest: Mutex::new(highest),
            }),
        })
    }

    /// The highest heard of; 0: none.
    pub(crate) fn highest(&self) -> u64 {
        *self.lock()
    }

    /// Whether a term may be obeyed. Nothing is changed.
    pub(crate) fn check(&self, term: u64) -> Result<(), TermError> {
        check(term, *self.lock())
    }

    /// Hears of a term, which is on disk before it is obeyed if it is new. The call was proved and parsed.
    pub(crate) fn hear(&self, term: u64) -> Result<(), TermError> {
        let mut highest = self.lock();
        check(term, *highest)?;
        if term > *highest {
            let dir = &self.inner.dir;
            write_durably(dir, &file(dir), format!("{term}\n").as_bytes()).map_err(|source| {
                TermError::File {
                    dir: dir.clone(),
                    source,
                }
            })?;
            *highest = term;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.inner.highest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(asked: u64, highest: u64) -> Result<(), TermError> {
    if asked < highest {
        return Err(TermError::Over { asked, highest });
    }
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    if asked > highest && asked > (now + CLOCKS_DIFFER).as_secs() {
        return Err(TermError::Ahead { asked });
    }
    Ok(())
}

impl From<TermError> for Status {
    fn from(error: TermError) -> Self {
        match error {
            TermError::Over { .. } | TermError::Ahead { .. } => Self::failed_precondition(error.to_string()),
            TermError::File { .. } => Self::unavailable(error.to_string()),
        }
    }
}

/// In which term a call was made, as it says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SaidTerm(pub(crate) u64);

/// Before every call of a scheduler: first the secret, then whether its term may be obeyed. Calls without a term, as people
/// make them by hand, are not of a scheduler.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    pub(crate) demand: Demand,
    pub(crate) terms: Terms,
}

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let mut request = self.demand.call(request)?;
        let Some(term) = request.metadata().get(TERM_HEADER) else {
            return Ok(request);
        };
        let term = term.to_str().ok().and_then(|term| term.parse().ok());
        let term = term.ok_or_else(|| Status::invalid_argument(format!("{TERM_HEADER}: is no number")))?;
        self.terms.check(term)?;
        request.extensions_mut().insert(SaidTerm(term));
        Ok(request)
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join("term")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(dir: &Path) -> Gate {
        Gate {
            demand: Demand::default(),
            terms: Terms::open(dir).expect("opened"),
        }
    }

    fn said(term: &str) -> Request<()> {
        let mut request = Request::new(());
        let term = term.parse().expect("a value");
        request.metadata_mut().insert(TERM_HEADER, term);
        request
    }

    #[test]
    fn an_older_term_is_refused_also_after_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let terms = Terms::open(dir.path()).expect("opened");
        for term in [3, 3, 7] {
            terms.hear(term).expect("new enough");
        }
        assert!(terms.hear(6).is_err());
        let mut again = gate(dir.path());
        assert!(again.terms.hear(6).is_err() && again.terms.hear(7).is_ok());

        let refused = again.call(said("6")).expect_err("over");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("term 7 leads"), "{refused}");
        assert!(again.call(Request::new(())).is_ok(), "by hand");
        let refused = again.call(said("-1")).expect_err("no term");
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    }

    #[test]
    fn what_no_scheduler_can_have_reached_is_refused_and_changes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut gate = gate(dir.path());
        gate.terms.hear(7).expect("new enough");
        let now = SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
        for ahead in [u64::MAX, now + 2 * CLOCKS_DIFFER.as_secs()] {
            let refused = gate.call(said(&ahead.to_string())).expect_err("ahead");
            assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
            assert!(
                refused.message().contains("ahead of this node's clock"),
                "{refused}"
            );
            assert!(gate.terms.hear(ahead).is_err());
        }
        let called = gate.call(said(&now.to_string())).expect("may be");
        assert_eq!(called.extensions().get().map(|SaidTerm(term)| *term), Some(now));
        assert_eq!(gate.terms.highest(), 7, "it was not parsed yet");
        assert_eq!(Terms::open(dir.path()).expect("opened").highest(), 7);
    }

    #[test]
    fn a_file_that_holds_no_number_is_said() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(file(dir.path()), "soon").expect("written");
        let error = Terms::open(dir.path()).expect_err("refused").to_string();
        assert!(error.contains("holds no number"), "{error}");
    }
}
