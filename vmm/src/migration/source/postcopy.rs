//! Post-copy at the source: the VM runs at the destination first, and this side serves the memory that is missing there.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use shoal_proto::vm::{MigrationPhase, MigrationProgress};

use super::workers::{Shared, Workers};
use super::{CONNECT_TIMEOUT, Outgoing, Source, SourceError, attach};
use crate::dirty::{Bitmap, DirtyLog};
use crate::migration::controls::Controls;
use crate::migration::postcopy::Links;
use crate::migration::postcopy::frames::Status;
use crate::migration::postcopy::page_set::PageSet;
use crate::migration::postcopy::source::{Heard, NotConnected, PageServer};
use crate::migration::transport::Transport;
use crate::migration::wire::{Connection, FrameKind, Hello, HelloAck, PEER_TIMEOUT, Role, WireError};
use crate::spec::VmSpec;

/// How long the destination may take to throw away what it has of the missing pages; the guest still runs here.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);

/// What the source tells of post-copy while it goes on.
#[derive(Debug)]
pub enum Serving {
    /// There will be no post-copy, nor a move: the pause did not end in time, and the guest goes on here.
    PauseGivenUp,
    /// The destination runs the VM and is connected.
    Connected,
    /// It is not connected, and why.
    LinkLost(String),
    /// Commit was sent and not answered; the source goes on to look for the destination. With the progress so far.
    InDoubt(Box<MigrationProgress>),
}

/// One session's end: what the destination said last, or why it broke.
type Followed = Result<Status, WireError>;

impl Source<'_> {
    /// Has the destination run the VM without the pages of `unsent` and those written until it pauses, and serves them.
    pub(super) fn run_there_first(
        &mut self,
        log: &DirtyLog<'_>,
        unsent: &[Bitmap],
        shared: &Shared,
        workers: &mut Workers,
    ) -> Result<(), SourceError> {
        let regions = self.vm.memory().regions();
        let missing = PageSet::of_bitmaps(&regions, unsent);
        let links = self.link(&missing, workers)?;
        let connections = u32::try_from(links.pages.len()).unwrap_or(1);

        let paused_at = self.pause()?;
        self.recorder.phase(MigrationPhase::FinalPages);
        crate::fault::point("source.final_pages")?;
        let written = self.written_since(log, unsent)?;
        let newest = PageSet::of_bitmaps(&regions, &written);
        newest.send(&mut self.control)?;
        missing.insert(&newest);
        self.recorder.downtime.pages = paused_at.elapsed();
        self.recorder.begin_pass(missing.count());

        // What was written last is what is needed first.
        let hot = vec![newest, PageSet::of_bitmaps(&regions, &self.recent)];
        let mut server = PageServer::new(self.vm.memory(), missing, hot);
        let pace = self.controls.pacer();
        let mut confirmed = false;
        let mut running_since = None;
        let followed = std::thread::scope(|scope| {
            let session = server.serve(scope, links, pace).map_err(SourceError::Thread)?;
            let outcome = self.state_and_commit(paused_at);
            match outcome {
                Ok(()) => {
                    confirmed = true;
                    running_since = Some(Instant::now());
                    session.open_background();
                    self.begin_serving();
                    Ok(self.follow(&server, &session, shared))
                }
                Err(SourceError::InDoubt(error)) => {
                    session.end();
                    Ok(Err(error))
                }
                Err(error) => {
                    session.end();
                    Err(error)
                }
            }
        })?;
        let status = match followed {
            Ok(status) => Some(status),
            Err(error) => {
                self.lost(confirmed, error, &server, shared);
                self.recover(&mut server, connections, &mut confirmed, shared)
            }
        };
        let facts = &mut self.recorder.facts;
        facts.post_copy = true;
        let took = running_since.map_or(Duration::ZERO, |since| since.elapsed());
        facts.post_copy_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        facts.post_copy_pages = server.pages_sent();
        shared.bytes.fetch_add(server.bytes_sent(), Ordering::Relaxed);
        match status {
            Some(status) if status.ended.is_empty() => Ok(()),
            Some(status) => Err(SourceError::EndedThere(status.ended)),
            None if confirmed => Err(SourceError::ServingStopped),
            None => Err(SourceError::InDoubt(WireError::Aborted(
                "the destination could not be reached again".into(),
            ))),
        }
    }

    /// Tells the destination what will be missing, and makes the connections for it. The guest runs on here.
    fn link(&mut self, missing: &PageSet, workers: &mut Workers) -> Result<Links<Transport>, SourceError> {
        let mut pages = workers.hand_back()?;
        missing.send(&mut self.control)?;
        for connection in &mut pages {
            connection.send_parts(FrameKind::PostCopy, &[], &[])?;
        }
        let links = Links {
            pages,
            fault_requests: self.attach(Role::FaultRequests, 0)?,
            fault_pages: self.attach(Role::FaultPages, 0)?,
        };
        self.wait_at_most(PREPARE_TIMEOUT)?;
        let (kind, payload) = self.control.receive()?;
        match kind {
            FrameKind::PostAck => {}
            FrameKind::Abort => return Err(crate::migration::wire::aborted(&payload).into()),
            found => {
                let expected = "PostAck";
                return Err(WireError::Unexpected { found, expected }.into());
            }
        }
        self.wait_at_most(PEER_TIMEOUT)?;
        Ok(links)
    }

    /// What the guest wrote since `unsent` was read, but for what is in it.
    fn written_since(&self, log: &DirtyLog<'_>, unsent: &[Bitmap]) -> Result<Vec<Bitmap>, SourceError> {
        let mut written = self.dirty_pages(log)?;
        for (bitmap, known) in written.iter_mut().zip(unsent) {
            bitmap.remove(known.words());
        }
        Ok(written)
    }

    fn state_and_commit(&mut self, paused_at: Instant) -> Result<(), SourceError> {
        self.state()?;
        self.recorder.downtime.state = paused_at.elapsed() - self.recorder.downtime.pages;
        self.commit()
    }

    fn begin_serving(&mut self) {
        // The VM's owner first: who sees the phase and then asks for something is answered by an owner that knows.
        (self.tell)(Serving::Connected);
        self.recorder.phase(MigrationPhase::PostCopy);
        if let Err(error) = self.wait_at_most(PEER_TIMEOUT) {
            tracing::debug!(%error, "the connection has ended");
        }
    }

    fn follow(
        &mut self,
        server: &PageServer<'_>,
        session: &crate::migration::postcopy::source::Session,
        shared: &Shared,
    ) -> Followed {
        let before = self.control.bytes_sent() + shared.bytes.load(Ordering::Relaxed);
        let (control, controls, recorder) = (&mut self.control, self.controls, &mut *self.recorder);
        server.follow(session, control, controls.serving_stopped(), |status| {
            recorder.policy(&controls.policy());
            recorder.post_copy(status, before + server.bytes_sent());
        })
    }

    /// The connections broke. Without an answer to Commit it is not known whether the VM runs there.
    fn lost(&mut self, confirmed: bool, error: WireError, server: &PageServer<'_>, shared: &Shared) {
        tracing::warn!(%error, confirmed, "post-copy: the connections broke");
        if confirmed {
            (self.tell)(Serving::LinkLost(error.to_string()));
            self.recorder.link_lost(true);
        } else {
            let bytes =
                self.control.bytes_sent() + shared.bytes.load(Ordering::Relaxed) + server.bytes_sent();
            let reason = SourceError::InDoubt(error).to_string();
            let progress = self.recorder.in_doubt(reason, bytes);
            (self.tell)(Serving::InDoubt(Box::new(progress)));
        }
    }

    fn recover(
        &mut self,
        server: &mut PageServer<'_>,
        connections: u32,
        confirmed: &mut bool,
        shared: &Shared,
    ) -> Option<Status> {
        let before = self.control.bytes_sent() + shared.bytes.load(Ordering::Relaxed);
        let Self {
            request,
            spec,
            controls,
            recorder,
            tell,
            ..
        } = self;
        let connect = || connect_again(request, spec, connections, controls).map_err(NotConnected::from);
        let mut last_told = String::new();
        server.recover(
            connect,
            controls.pacer(),
            controls.serving_stopped(),
            |heard, bytes| match heard {
                Heard::Status(status) => recorder.post_copy(status, before + bytes),
                Heard::Recovered => {
                    last_told.clear();
                    tell(Serving::Connected);
                    if std::mem::replace(confirmed, true) {
                        recorder.facts.recoveries += 1;
                    } else {
                        // It runs there after all.
                        recorder.phase(MigrationPhase::PostCopy);
                    }
                    recorder.link_lost(false);
                }
                Heard::LinkLost(why) => {
                    if last_told != why {
                        last_told = why.to_owned();
                        tell(Serving::LinkLost(last_told.clone()));
                        recorder.link_lost(*confirmed);
                    }
                }
            },
        )
    }
}

impl From<SourceError> for NotConnected {
    fn from(error: SourceError) -> Self {
        let can_pass = match &error {
            SourceError::Connect { source, .. } => source.can_pass(),
            SourceError::Wire(error) => error.can_pass(),
            // Of this host, such as descriptors or threads that it has none of.
            _ => true,
        };
        let why = error.to_string();
        Self { why, can_pass }
    }
}

/// All connections of post-copy, anew. Not ended by a cancel: Commit was sent.
fn connect_again(
    request: &Outgoing,
    spec: &VmSpec,
    connections: u32,
    controls: &Controls,
) -> Result<(Connection<Transport>, Links<Transport>), SourceError> {
    debug_assert!(controls.commit_sent());
    let connect = || -> Result<Transport, SourceError> {
        let connected = Transport::connect(&request.destination, request.identity.as_ref(), CONNECT_TIMEOUT);
        let transport = connected.map_err(|source| SourceError::Connect {
            address: request.destination.clone(),
            source,
        })?;
        transport
            .set_timeouts(Some(PEER_TIMEOUT))
            .map_err(WireError::from)?;
        Ok(transport)
    };
    let mut control = Connection::new(connect()?);
    control.send_preamble(Role::Control)?;
    let hello = Hello {
        migration_id: request.migration_id.as_bytes().to_vec(),
        token: request.token.clone(),
        vm_id: spec.vm_id.as_bytes().to_vec(),
        epoch: request.destination_epoch.0,
        connections,
        resume: true,
        ..Hello::default()
    };
    control.send(FrameKind::Hello, &hello)?;
    let _: HelloAck = control.expect(FrameKind::HelloAck, "HelloAck")?;
    let link = |role, index| -> Result<Connection<Transport>, SourceError> {
        Ok(attach(request, connect()?, role, index)?.0)
    };
    let links = Links {
        pages: (0..connections)
            .map(|index| link(Role::Data, index))
            .collect::<Result<_, _>>()?,
        fault_requests: link(Role::FaultRequests, 0)?,
        fault_pages: link(Role::FaultPages, 0)?,
    };
    Ok((control, links))
}
