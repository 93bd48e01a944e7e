//! Where connections come in, from before the source comes until all of its memory is here.
//!
//! Each connection is greeted on a thread of its own, at any time, so that one that says nothing is in nobody's way. Whoever
//! proves to be the source waits inside until it is asked for. Of those that have proved nothing there are so many at most;
//! the oldest has to go when another comes.

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Incoming;
use super::greeting::{self, Introduced, Introduction, Stranger};
use crate::migration::negotiate::{Prepared, Refusal};
use crate::migration::transport::{AcceptError, Accepted, Closer, Identity, Listener, Transport};
use crate::migration::wire::{Connection, Empty, FrameKind, Hello, Preamble, Role};

/// Connections that have proved nothing, at most.
const MOST_UNPROVED: usize = 64;
/// Of one address, so that one host does not push out all others.
const MOST_UNPROVED_OF_ONE: usize = 16;
/// Connections that wait inside, at most: more than any source makes.
const MOST_INSIDE: usize = 2 * super::MAX_CONNECTIONS as usize;
/// From one line in the log about those that were turned away to the next.
const BETWEEN_COMPLAINTS: Duration = Duration::from_secs(1);
/// How long to leave a listening socket alone that fails, as it does when descriptors run out.
const BETWEEN_FAILURES: Duration = Duration::from_millis(100);
/// Somebody may come at any time, so this only has to be long.
const A_LONG_TIME: Duration = Duration::from_secs(3600);

/// Takes connections in as long as it lives.
#[derive(Debug)]
pub struct Door {
    shared: Arc<Shared>,
    listener: Closer,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    prepared: Prepared,
    identity: Option<Identity>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    expects: Expects,
    /// Oldest first.
    unproved: VecDeque<Unproved>,
    /// Number of the next connection.
    next: u64,
    inside: Vec<Introduced>,
    complaints: Complaints,
    closed: bool,
}

/// Which control connection may come in.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Expects {
    /// That of a source that begins.
    #[default]
    First,
    /// None: it is here.
    Nobody,
    /// That of a source that takes post-copy up.
    Again,
}

#[derive(Debug)]
struct Unproved {
    number: u64,
    from: Option<IpAddr>,
    closer: Closer,
}

/// What is said of those that were turned away: not of each.
#[derive(Debug, Default)]
struct Complaints {
    latest: Option<Instant>,
    kept_back: u64,
}

impl Door {
    /// Takes in who comes for this migration.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn open(listener: Listener, incoming: &Incoming) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            prepared: incoming.prepared.clone(),
            identity: incoming.identity.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let (closer, for_thread) = (listener.closer()?, Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("door".into())
            .spawn(move || for_thread.take_in(&listener))?;
        Ok(Self {
            shared,
            listener: closer,
            thread: Some(thread),
        })
    }

    /// Waits for the source that this destination was prepared for. The first that proves to be it is.
    ///
    /// # Errors
    /// When none comes.
    pub fn first_control(
        &self,
        deadline: Instant,
    ) -> Result<(Connection<Transport>, Preamble, Hello), AcceptError> {
        self.control(deadline, |state| {
            state.expects = Expects::Nobody;
        })
    }

    /// From now on a source may take post-copy up.
    pub fn expect_again(&self) {
        self.shared.lock().expects = Expects::Again;
    }

    /// Waits for the source to take post-copy up.
    ///
    /// # Errors
    /// When it does not come.
    pub fn control_again(
        &self,
        deadline: Instant,
    ) -> Result<(Connection<Transport>, Preamble, Hello), AcceptError> {
        self.control(deadline, |_| {})
    }

    fn control(
        &self,
        deadline: Instant,
        mut taken: impl FnMut(&mut State),
    ) -> Result<(Connection<Transport>, Preamble, Hello), AcceptError> {
        self.shared.wait(deadline, |state| {
            // The latest: a source that comes once more has given the connections before it up.
            let at = state.inside.iter().rposition(Introduced::is_control)?;
            let Introduced { connection, as_what } = state.inside.swap_remove(at);
            let Introduction::Control(preamble, hello) = as_what else {
                return None;
            };
            state.inside.clear();
            taken(state);
            Some((connection, preamble, *hello))
        })
    }

    /// Waits for one more connection of the migration under way, and says that it belongs to it.
    ///
    /// # Errors
    /// When it does not come; and, as if it had not come, when the source begins anew.
    pub fn attached(
        &self,
        role: Role,
        index: u32,
        deadline: Instant,
    ) -> Result<Connection<Transport>, AcceptError> {
        let wanted = Introduction::Attached(role, index);
        loop {
            let found = self.shared.wait(deadline, |state| {
                if state.inside.iter().any(Introduced::is_control) {
                    return Some(None);
                }
                let at = state.inside.iter().rposition(|one| one.as_what == wanted)?;
                Some(Some(state.inside.remove(at).connection))
            })?;
            let mut connection = found.ok_or(AcceptError::NobodyCame)?;
            match connection.send(FrameKind::AttachAck, &Empty {}) {
                Ok(()) => return Ok(connection),
                Err(error) => tracing::warn!(%error, "a connection of the source was gone again"),
            }
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state
            .unproved
            .drain(..)
            .for_each(|unproved| unproved.closer.close());
        drop(state);
        self.listener.close();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that takes connections in panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `pick` finds something.
    fn wait<T>(
        &self,
        deadline: Instant,
        mut pick: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, AcceptError> {
        let mut state = self.lock();
        loop {
            if let Some(found) = pick(&mut state) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(AcceptError::NobodyCame);
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Accepts whoever comes until the listener is closed.
    fn take_in(self: &Arc<Self>, listener: &Listener) {
        loop {
            match listener.accept_raw(Instant::now() + A_LONG_TIME) {
                Ok(accepted) => self.begin_to_greet(accepted),
                Err(AcceptError::NobodyCame) => {}
                Err(AcceptError::Closed) => return,
                // The guest of post-copy depends on this: it goes on whatever comes.
                Err(error) => {
                    self.lock().complain("nobody", &error);
                    std::thread::sleep(BETWEEN_FAILURES);
                }
            }
        }
    }

    fn begin_to_greet(self: &Arc<Self>, accepted: Accepted) {
        let peer = accepted.peer().to_owned();
        let number = {
            let mut state = self.lock();
            if state.closed {
                return;
            }
            state.make_room_for(accepted.address());
            let number = state.next;
            state.next += 1;
            state.unproved.push_back(Unproved {
                number,
                from: accepted.address(),
                closer: accepted.closer(),
            });
            number
        };
        let shared = Arc::clone(self);
        let greeter = std::thread::Builder::new().name("greet".into());
        let greeted = greeter.spawn(move || {
            let (identity, prepared) = (shared.identity.as_ref(), &shared.prepared);
            let admits = |introduction: &Introduction| shared.admits(introduction);
            let outcome = greeting::greet(accepted, identity, prepared, admits);
            shared.greeted(number, &peer, outcome);
        });
        if let Err(error) = greeted {
            let mut state = self.lock();
            state.forget(number);
            state.complain("a connection", &error);
        }
    }

    /// Whether that may come now.
    fn admits(&self, introduction: &Introduction) -> Result<(), Refusal> {
        match (introduction, self.lock().expects) {
            (&Introduction::Attached(found, _), Expects::First) => {
                let expected = Role::Control;
                Err(Refusal::Role { found, expected })
            }
            (Introduction::Attached(..), _) => Ok(()),
            (Introduction::Control(_, hello), Expects::First) if !hello.resume => Ok(()),
            (Introduction::Control(_, hello), Expects::Again) if hello.resume => Ok(()),
            (Introduction::Control(..), _) => Err(Refusal::NotPrepared { field: "resume" }),
        }
    }

    fn greeted(&self, number: u64, peer: &str, outcome: Result<Introduced, Stranger>) {
        let mut state = self.lock();
        let was_let_in = state.forget(number);
        match outcome {
            _ if !was_let_in => {}
            Ok(_) if state.inside.len() >= MOST_INSIDE => {
                state.complain(peer, &"more connections than a source makes");
            }
            Ok(introduced) => {
                state.inside.push(introduced);
                self.changed.notify_all();
            }
            Err(stranger) => state.complain(peer, &stranger),
        }
    }
}

impl State {
    /// The oldest that has proved nothing makes room, of the same address first.
    fn make_room_for(&mut self, address: Option<IpAddr>) {
        let of_it = self.unproved.iter().filter(|one| one.from == address).count();
        let at = if of_it >= MOST_UNPROVED_OF_ONE {
            self.unproved.iter().position(|one| one.from == address)
        } else {
            (self.unproved.len() >= MOST_UNPROVED).then_some(0)
        };
        if let Some(oldest) = at.and_then(|at| self.unproved.remove(at)) {
            oldest.closer.close();
            self.complain("the oldest that has proved nothing", &"another has come");
        }
    }

    /// Takes it from those that have proved nothing; false if it had to make room.
    fn forget(&mut self, number: u64) -> bool {
        let at = self.unproved.iter().position(|one| one.number == number);
        at.and_then(|at| self.unproved.remove(at)).is_some()
    }

    fn complain(&mut self, peer: &str, reason: &dyn std::fmt::Display) {
        let Complaints { latest, kept_back } = &mut self.complaints;
        if latest.is_some_and(|latest| latest.elapsed() < BETWEEN_COMPLAINTS) {
            *kept_back += 1;
            return;
        }
        tracing::warn!(peer, %reason, others = *kept_back, "turned a connection away");
        (*latest, *kept_back) = (Some(Instant::now()), 0);
    }
}

#[cfg(test)]
mod tests;
