//! Which came first, Commit or an abort.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::DestinationError;
use crate::migration::transport::{Closer, Transport};
use crate::migration::wire::WireError;
use crate::ran_mark::RanMark;

/// Decides between Commit and abort: whichever comes first wins, for good.
#[derive(Debug, Clone, Default)]
pub struct Arbiter(Arc<Mutex<ArbiterState>>);

#[derive(Debug, Default)]
struct ArbiterState {
    verdict: Option<Verdict>,
    connections: Vec<Closer>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Committed,
    Aborted,
}

impl Arbiter {
    fn lock(&self) -> MutexGuard<'_, ArbiterState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the migration unless Commit came first; `true` if Commit came first.
    #[must_use]
    pub fn abort(&self) -> bool {
        let mut state = self.lock();
        let verdict = *state.verdict.get_or_insert(Verdict::Aborted);
        if verdict == Verdict::Aborted {
            state
                .connections
                .drain(..)
                .for_each(|connection| connection.close());
        }
        verdict == Verdict::Committed
    }

    /// Whether Commit came.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        self.lock().verdict == Some(Verdict::Committed)
    }

    /// Commit came: leaves the mark, decides and has the VM run, all three or none. Once the mark is there nothing waits for
    /// anything before `run` has been called, which must not wait either.
    pub(super) fn commit(&self, mark: &RanMark, run: impl FnOnce()) -> Result<(), DestinationError> {
        let mut state = self.lock();
        if state.verdict.is_some() {
            return Err(DestinationError::AbortedHere);
        }
        if let Err(error) = mark.leave() {
            state.verdict = Some(Verdict::Aborted);
            return Err(DestinationError::Mark(error));
        }
        state.verdict = Some(Verdict::Committed);
        run();
        Ok(())
    }

    /// Ends this connection with an abort.
    pub(super) fn watch(&self, transport: &Transport) -> Result<(), DestinationError> {
        let mut state = self.lock();
        if state.verdict.is_some() {
            return Err(DestinationError::AbortedHere);
        }
        state
            .connections
            .push(transport.closer().map_err(WireError::from)?);
        Ok(())
    }
}
