//! Which scheduler leads, as far as this node has heard: the highest term, kept on disk.
//!
//! A scheduler that was deposed may not know it yet, and have calls under way. Whatever it asks is refused as soon as this
//! node has heard of the one after it, which it has at the latest when it reports to that one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use shoal_proto::TERM_HEADER;
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::epochs::{read_if_there, write_durably};

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

    /// Hears of a term. It is refused if a higher one is known, and on disk before it is obeyed if it is new.
    pub(crate) fn hear(&self, term: u64) -> Result<(), TermError> {
        let mut highest = self.inner.highest.lock().unwrap_or_else(PoisonError::into_inner);
        if term < *highest {
            return Err(TermError::Over {
                asked: term,
                highest: *highest,
            });
        }
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
}

/// Before every call of a scheduler. Calls without a term, as people make them by hand, are not of a scheduler.
impl Interceptor for Terms {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(term) = request.metadata().get(TERM_HEADER) else {
            return Ok(request);
        };
        let term = term.to_str().ok().and_then(|term| term.parse().ok());
        let term = term.ok_or_else(|| Status::invalid_argument(format!("{TERM_HEADER}: is no number")))?;
        match self.hear(term) {
            Ok(()) => Ok(request),
            Err(error @ TermError::Over { .. }) => Err(Status::failed_precondition(error.to_string())),
            Err(error @ TermError::File { .. }) => Err(Status::unavailable(error.to_string())),
        }
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join("term")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_term_is_refused_also_after_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let terms = Terms::open(dir.path()).expect("opened");
        for term in [3, 3, 7] {
            terms.hear(term).expect("new enough");
        }
        assert!(terms.hear(6).is_err());
        let mut again = Terms::open(dir.path()).expect("opened again");
        assert!(again.hear(6).is_err() && again.hear(7).is_ok());

        let mut request = Request::new(());
        request
            .metadata_mut()
            .insert(TERM_HEADER, "6".parse().expect("a value"));
        let refused = again.call(request).expect_err("over");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("term 7 leads"), "{refused}");
        assert!(again.call(Request::new(())).is_ok(), "by hand");
        let mut request = Request::new(());
        request
            .metadata_mut()
            .insert(TERM_HEADER, "-1".parse().expect("a value"));
        assert_eq!(
            again.call(request).expect_err("no term").code(),
            tonic::Code::InvalidArgument
        );
    }

    #[test]
    fn a_file_that_holds_no_number_is_said() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(file(dir.path()), "soon").expect("written");
        let error = Terms::open(dir.path()).expect_err("refused").to_string();
        assert!(error.contains("holds no number"), "{error}");
    }
}
