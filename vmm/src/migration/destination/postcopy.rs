//! Post-copy at the destination: how it begins before Commit, and how it goes on, over new connections if need be.

use std::time::{Duration, Instant};

use super::{ATTACH_TIMEOUT, Arrivals, Destination, DestinationError, Door, MAX_CONNECTIONS};
use crate::migration::negotiate::Refusal;
use crate::migration::postcopy::Links;
use crate::migration::postcopy::destination::{Event, PostCopy, Session};
use crate::migration::postcopy::page_set::PageSet;
use crate::migration::transport::{AcceptError, Transport};
use crate::migration::wire::{self, Connection, FrameKind, HelloAck, PEER_TIMEOUT, Role};
use crate::vm::Vm;

/// How often a destination that waits for its source looks whether it still has to.
const LOOK: Duration = Duration::from_millis(200);

/// Post-copy whose connections are made, before and after Commit.
#[derive(Debug)]
pub(super) struct Linked {
    pub(super) post_copy: PostCopy,
    session: Session,
    /// A moment at which the guest still ran at the source.
    pub(super) since: Instant,
}

/// A VM's memory that is still at the source.
#[derive(Debug)]
pub struct Fetching {
    post_copy: PostCopy,
    session: Session,
    control: Connection<Transport>,
}

impl Destination<'_> {
    /// Holds back whoever touches what is `missing`, over connections of their own, and says so.
    pub(super) fn link(
        &self,
        control: &mut Connection<Transport>,
        vm: &Vm,
        arrivals: &Arrivals,
        missing: &PageSet,
    ) -> Result<Linked, DestinationError> {
        let pages = arrivals.wait_for_connections(PEER_TIMEOUT)?;
        let deadline = Instant::now() + ATTACH_TIMEOUT;
        let [fault_requests, fault_pages] = fault_links(self.door, deadline)?;
        for connection in [&fault_requests, &fault_pages] {
            self.arbiter.watch(connection.stream())?;
        }
        let post_copy = PostCopy::prepare(vm.memory(), missing)?;
        let links = Links {
            pages,
            fault_requests,
            fault_pages,
        };
        let session = match post_copy.attach(links) {
            Ok(session) => session,
            Err(error) => {
                post_copy.stop(&error.to_string());
                return Err(DestinationError::Thread(error));
            }
        };
        let since = Instant::now();
        control.send_parts(FrameKind::PostAck, &[], &[])?;
        Ok(Linked {
            post_copy,
            session,
            since,
        })
    }
}

impl Fetching {
    pub(super) fn new(linked: Linked, control: Connection<Transport>) -> Self {
        Self {
            post_copy: linked.post_copy,
            session: linked.session,
            control,
        }
    }

    /// How it goes, and how to end it.
    #[must_use]
    pub fn post_copy(&self) -> PostCopy {
        self.post_copy.clone()
    }

    /// Goes on until nothing is missing, for as long as it takes.
    pub fn run(self, door: &Door, tell: impl Fn(Event)) {
        door.expect_again();
        if let Err(error) = self.control.stream().set_timeouts(Some(PEER_TIMEOUT)) {
            tracing::debug!(%error, "the connection has ended");
        }
        let accept = |stopped: &dyn Fn() -> bool, until: Option<Instant>| {
            loop {
                let now = Instant::now();
                if stopped() || until.is_some_and(|until| now >= until) {
                    return None;
                }
                match accept_again(door, now + LOOK) {
                    Ok(ends) => return Some(ends),
                    Err(DestinationError::Accept(AcceptError::NobodyCame)) => {}
                    Err(error) => {
                        tracing::warn!(%error, "post-copy: the source could not take it up");
                        std::thread::sleep(LOOK);
                    }
                }
            }
        };
        self.post_copy.run(self.session, self.control, accept, tell);
    }
}

/// Waits for the source to come again, with all of its connections.
fn accept_again(
    door: &Door,
    deadline: Instant,
) -> Result<(Connection<Transport>, Links<Transport>), DestinationError> {
    let (mut control, _, hello) = door.control_again(deadline)?;
    if !(1..=MAX_CONNECTIONS).contains(&hello.connections) {
        return Err(Refusal::Connections(hello.connections).into());
    }
    let ack = HelloAck {
        version: u32::from(wire::VERSION),
        post_copy: true,
        paused: false,
    };
    control.send(FrameKind::HelloAck, &ack)?;
    let deadline = Instant::now() + ATTACH_TIMEOUT;
    let pages = (0..hello.connections)
        .map(|index| door.attached(Role::Data, index, deadline))
        .collect::<Result<_, _>>()?;
    let [fault_requests, fault_pages] = fault_links(door, deadline)?;
    let links = Links {
        pages,
        fault_requests,
        fault_pages,
    };
    Ok((control, links))
}

fn fault_links(door: &Door, deadline: Instant) -> Result<[Connection<Transport>; 2], DestinationError> {
    Ok([
        door.attached(Role::FaultRequests, 0, deadline)?,
        door.attached(Role::FaultPages, 0, deadline)?,
    ])
}
