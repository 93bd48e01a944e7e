//! What can be done to an outgoing migration from outside: cancel it, decided against Commit, and change its policy.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use shoal_proto::vm::MigrationPolicy;

use super::pacer::Pacer;
use super::policy::{Policy, PolicyError};
use super::transport::{Closer, Transport};

/// Shared between the migration's threads and whoever asked for it.
#[derive(Debug)]
pub struct Controls {
    state: Mutex<State>,
    policy: Mutex<Policy>,
    pacer: Pacer,
    serving_stopped: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    cancelled: bool,
    commit_sent: bool,
    pause_given_up: bool,
    connections: Vec<Closer>,
}

impl State {
    fn cancel(&mut self) -> bool {
        if self.commit_sent {
            return false;
        }
        self.cancelled = true;
        self.connections.iter().for_each(Closer::close);
        true
    }
}

impl Controls {
    /// Of a migration that begins with this policy.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        let pacer = Pacer::new(policy.bandwidth);
        Self {
            state: Mutex::default(),
            policy: Mutex::new(policy),
            pacer,
            serving_stopped: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels, unless Commit has been sent; `false` if it is too late.
    pub fn cancel(&self) -> bool {
        self.lock().cancel()
    }

    /// Cancels because the pause lasts too long; `false` if it is too late.
    pub(super) fn give_up_pause(&self) -> bool {
        let mut state = self.lock();
        state.pause_given_up = state.cancel();
        state.pause_given_up
    }

    /// Whether that was so.
    pub(super) fn is_pause_given_up(&self) -> bool {
        self.lock().pause_given_up
    }

    /// Whether it has been cancelled.
    pub(super) fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    /// Ends this connection with the others.
    pub(super) fn watch(&self, transport: &Transport) -> std::io::Result<()> {
        let mut state = self.lock();
        if state.cancelled {
            return Err(std::io::ErrorKind::ConnectionAborted.into());
        }
        state.connections.push(transport.closer()?);
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

    /// After Commit was sent: post-copy is to end. What the destination lacks by then it never gets.
    pub fn stop_serving(&self) {
        self.serving_stopped.store(true, Ordering::SeqCst);
    }

    /// Whether post-copy is to end.
    pub(super) fn serving_stopped(&self) -> &AtomicBool {
        &self.serving_stopped
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.policy.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the policy; gives what is then in force.
    ///
    /// # Errors
    /// The field that is out of its limits or cannot change any more.
    pub fn change(&self, change: &MigrationPolicy) -> Result<Policy, PolicyError> {
        let mut policy = self.policy.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = policy.changed_under_way(change)?;
        if changed.bandwidth != policy.bandwidth {
            self.pacer.set(changed.bandwidth);
        }
        policy.clone_from(&changed);
        Ok(changed)
    }

    /// What holds it to its bandwidth.
    pub(super) fn pacer(&self) -> &Pacer {
        &self.pacer
    }
}
