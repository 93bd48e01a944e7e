//! Why a migration ended before its time.

use std::time::Duration;

use crate::dirty::DirtyError;
use crate::memory::MemoryError;
use crate::migration::transport::{Address, TransportError};
use crate::migration::verify::VerifyError;
use crate::migration::wire::WireError;
use crate::vm::VmError;

/// Why a migration ended before Commit.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No connection.
    #[error("cannot connect to the destination {address}: {source}")]
    Connect {
        /// Where.
        address: Address,
        /// Why not.
        source: TransportError,
    },
    /// The destination does not know of paused VMs.
    #[error(
        "the VM is paused and this destination would run it: its VMM is older; update its node first, or resume the VM"
    )]
    WouldRunThere,
    /// On request.
    #[error("cancelled")]
    Cancelled,
    /// Nothing is left to migrate.
    #[error("the guest ended during the migration")]
    GuestEnded,
    /// The guest writes faster than the link takes.
    #[error("{0}")]
    NotConverging(String),
    /// The time is up in the middle of a pass.
    #[error("timed out after {:.1} s, in pass {pass}, with {remaining} bytes of it to send; allow more with --timeout", elapsed.as_secs_f64())]
    TimedOut {
        /// Since the start.
        elapsed: Duration,
        /// Which.
        pass: u32,
        /// Of the pass.
        remaining: u64,
    },
    /// The guest must not wait any longer.
    #[error(
        "the pause took longer than {} ms with {remaining} bytes to send, so the VM goes on here; the link became slower",
        limit.as_millis()
    )]
    PauseTooLong {
        /// What was allowed.
        limit: Duration,
        /// Of the last pass.
        remaining: u64,
    },
    /// The same, found by the guard of the pause: a step hung.
    #[error("the pause did not end in time, so the VM goes on here; see the VMM's log")]
    PauseGivenUp,
    /// The stream.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Guest memory could not be digested.
    #[error("verify: {0}")]
    Verify(#[from] VerifyError),
    /// The dirty log.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The VM's state.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// A worker ended without a word.
    #[error("a fault in a thread that sends pages; see the VMM's log")]
    WorkerGone,
    /// A fault made for a test.
    #[error(transparent)]
    Fault(#[from] crate::fault::Fault),
    /// The answer to Commit did not come.
    #[error("Commit was sent and not answered: {0}")]
    InDoubt(WireError),
    /// Post-copy is what the policy asks for, and the destination's host does not offer it.
    #[error(
        "{0}; --on-stall post-copy needs userfaultfd at the destination, which its host does not offer to its VMMs"
    )]
    NoPostCopy(String),
    /// In post-copy the VM ended at the destination before all of its memory was there.
    #[error("the VM ended at its destination: {0}")]
    EndedThere(String),
    /// In post-copy this side was stopped, and with it went what the destination lacked.
    #[error("stopped on request; memory that the VM still needed at its destination is lost with it")]
    ServingStopped,
}
