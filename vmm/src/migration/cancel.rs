//! Cancelling an outgoing migration, decided against Commit: whichever comes first wins.

use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Cancels a migration from another thread, unless Commit has been sent.
#[derive(Debug, Default)]
pub struct CancelSwitch(Mutex<CancelState>);

#[derive(Debug, Default)]
struct CancelState {
    cancelled: bool,
    commit_sent: bool,
    stream: Option<TcpStream>,
}

impl CancelSwitch {
    fn lock(&self) -> MutexGuard<'_, CancelState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels; `false` if it is too late.
    pub fn cancel(&self) -> bool {
        let mut state = self.lock();
        if state.commit_sent {
            return false;
        }
        state.cancelled = true;
        if let Some(stream) = &state.stream
            && let Err(error) = stream.shutdown(Shutdown::Both)
        {
            tracing::debug!(%error, "the connection had ended already");
        }
        true
    }

    /// Whether it has been asked for.
    pub(super) fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    /// Ends this stream on cancel.
    pub(super) fn watch(&self, stream: &TcpStream) -> std::io::Result<()> {
        let mut state = self.lock();
        if state.cancelled {
            return Err(std::io::ErrorKind::ConnectionAborted.into());
        }
        state.stream = Some(stream.try_clone()?);
        Ok(())
    }

    /// Whether Commit may have been sent.
    #[must_use]
    pub fn commit_sent(&self) -> bool {
        self.lock().commit_sent
    }

    /// From here on it cannot be cancelled; `false` if it has been.
    pub(super) fn enter_commit(&self) -> bool {
        let mut state = self.lock();
        state.commit_sent = !state.cancelled;
        state.commit_sent
    }
}
