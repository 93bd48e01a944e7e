//! Threads that receive pages, one for each data connection, and what they tell the thread of the control connection.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use super::DestinationError;
use crate::memory::GuestMemory;
use crate::migration::pages::{PageReceiver, WrittenPages};
use crate::migration::sched::Gentleness;
use crate::migration::transport::{Closer, Transport};
use crate::migration::wire::{self, Connection, FrameKind, Pass, PassAck, WireError};

/// How far the receivers are.
#[derive(Debug)]
pub struct Arrivals {
    state: Mutex<State>,
    changed: Condvar,
    /// Of the control connection: its thread stops reading when a receiver fails, and says why.
    control: Closer,
}

#[derive(Debug)]
struct State {
    /// The last pass, by receiver: its number and the pages received so far.
    last: Vec<Option<Pass>>,
    /// Connections that post-copy takes over, by receiver.
    handed_back: Vec<Option<Connection<Transport>>>,
    failed: Option<DestinationError>,
    /// A moment at which the guest still ran at the source.
    last_running: Instant,
}

impl Arrivals {
    /// Of so many receivers.
    #[must_use]
    pub fn of(receivers: usize, control: Closer) -> Self {
        Self {
            state: Mutex::new(State {
                last: vec![None; receivers],
                handed_back: (0..receivers).map(|_| None).collect(),
                failed: None,
                last_running: Instant::now(),
            }),
            changed: Condvar::new(),
            control,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A moment at which the guest still ran at the source.
    #[must_use]
    pub fn last_running(&self) -> Instant {
        self.lock().last_running
    }

    /// What a receiver failed with, if one did.
    #[must_use]
    pub fn failure(&self) -> Option<DestinationError> {
        self.lock().failed.take()
    }

    /// Waits until every receiver has all of the last pass.
    ///
    /// # Errors
    /// What a receiver failed with; that one is behind for too long; or that pages are missing.
    pub fn wait_for_last(&self, end: Pass, at_most: Duration) -> Result<(), DestinationError> {
        let deadline = Instant::now() + at_most;
        let mut state = self.lock();
        loop {
            if let Some(error) = state.failed.take() {
                return Err(error);
            }
            if state
                .last
                .iter()
                .all(|last| last.is_some_and(|last| last.pass == end.pass))
            {
                let received = state.last.iter().flatten().map(|last| last.pages).sum();
                return if received == end.pages {
                    Ok(())
                } else {
                    Err(DestinationError::PagesLost {
                        pass: end.pass,
                        sent: end.pages,
                        received,
                    })
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(WireError::Io(std::io::ErrorKind::TimedOut.into()).into());
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until every receiver has ended for post-copy, and gives their connections.
    ///
    /// # Errors
    /// What a receiver failed with, or that one does not end.
    pub fn wait_for_connections(
        &self,
        at_most: Duration,
    ) -> Result<Vec<Connection<Transport>>, DestinationError> {
        let waits =
            |state: &mut State| state.failed.is_none() && state.handed_back.iter().any(Option::is_none);
        let waited = self.changed.wait_timeout_while(self.lock(), at_most, waits);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        if let Some(error) = state.failed.take() {
            return Err(error);
        }
        if state.handed_back.iter().any(Option::is_none) {
            return Err(WireError::Io(std::io::ErrorKind::TimedOut.into()).into());
        }
        Ok(state.handed_back.drain(..).flatten().collect())
    }

    fn hand_back(&self, receiver: usize, connection: Connection<Transport>) {
        self.lock().handed_back[receiver] = Some(connection);
        self.changed.notify_all();
    }

    fn fail(&self, error: DestinationError) {
        self.lock().failed.get_or_insert(error);
        self.changed.notify_all();
        self.control.stop_reading();
    }

    fn ended(&self, receiver: usize, pass: Pass) {
        let mut state = self.lock();
        if pass.last {
            state.last[receiver] = Some(pass);
            self.changed.notify_all();
        } else {
            // The source pauses the guest after all have acknowledged, never before.
            state.last_running = Instant::now();
        }
    }
}

/// Starts one for each connection. They end with their connections.
///
/// # Errors
/// When the host has no thread to give.
pub fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    connections: Vec<Connection<Transport>>,
    memory: &'scope GuestMemory,
    written: &'scope WrittenPages,
    arrivals: &'scope Arrivals,
    gentleness: Gentleness,
) -> Result<(), DestinationError> {
    for (index, mut connection) in connections.into_iter().enumerate() {
        std::thread::Builder::new()
            .name(format!("receive{index}"))
            .spawn_scoped(scope, move || {
                gentleness.apply();
                match receive(&mut connection, memory, written, arrivals, index) {
                    Ok(()) => arrivals.hand_back(index, connection),
                    Err(error) => arrivals.fail(error),
                }
            })
            .map_err(DestinationError::Thread)?;
    }
    Ok(())
}

/// Receives pages until they are those of post-copy.
fn receive(
    connection: &mut Connection<Transport>,
    memory: &GuestMemory,
    written: &WrittenPages,
    arrivals: &Arrivals,
    index: usize,
) -> Result<(), DestinationError> {
    let mut pages = PageReceiver::new(memory, written);
    loop {
        let mut header = connection.receive_header()?;
        match header.kind {
            FrameKind::PageRuns => {
                pages.receive(connection, &mut header)?;
                crate::fault::point("destination.pre_copy")?;
            }
            FrameKind::PassEnd => {
                let pass: Pass = wire::decode(header.kind, &connection.receive_payload(&mut header)?)?;
                let received = pages.counts().raw;
                if pass.pages != received {
                    return Err(DestinationError::PagesLost {
                        pass: pass.pass,
                        sent: pass.pages,
                        received,
                    });
                }
                if pass.last {
                    crate::fault::point("destination.final_pages")?;
                    if let Some(gpa) = pages.damaged().first() {
                        return Err(DestinationError::Damaged { gpa });
                    }
                    arrivals.ended(index, pass);
                    continue;
                }
                arrivals.ended(index, pass);
                let ack = PassAck {
                    pass: pass.pass,
                    pages: received,
                    damaged: pages.damaged().take(),
                };
                connection.send(FrameKind::PassAck, &ack)?;
            }
            FrameKind::KeepAlive => drop(connection.receive_payload(&mut header)?),
            FrameKind::PostCopy => {
                connection.receive_payload(&mut header)?;
                return Ok(());
            }
            other => return Err(DestinationError::OutOfPlace(other)),
        }
    }
}
