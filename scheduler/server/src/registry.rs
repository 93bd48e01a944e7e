//! The service for agents: one Report stream each, and the blobs of images.

#[cfg(test)]
mod tests;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shoal_cpuid::{MAX_MSRS, Table};
use shoal_plan::KvmKind;
use shoal_proto::node::registry_server::Registry;
use shoal_proto::node::{
    AgentReport, BlobChunk, ConsoleData, FetchBlobRequest, Register, Registered, SchedulerMessage,
    agent_report, scheduler_message,
};
use shoal_proto::{Epoch, NodeName, VmId};
use shoal_report::Decoder;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::api::Role;
use crate::limits;
use crate::metrics::ReportKind;
use crate::nodes::{InvalidAddress, NodeEntry, ReportSender};
use crate::observe;
use crate::record::{Cordon, NodeRecord, NodeWishes};
use crate::scheduler::Shared;
use crate::store::Write;
use crate::streams::Streams;

/// Messages to an agent that may be under way: acknowledgements, each made up for by the next.
const DEPTH: usize = 256;
const BLOB_CHUNK_BYTES: usize = 1 << 20;
const BLOB_DEPTH: usize = 2;
/// Blobs that are sent at a time, and those that wait for their turn.
const BLOBS: usize = 64;
const BLOBS_WAITING: usize = 4096;
/// How long a blob waits for its turn, and a piece of one for its reader.
const BLOB_PATIENCE: Duration = Duration::from_secs(15);
/// Report streams on one connection, and in all. Agents have one each, and a connection each; load tests have not.
const REPORTS_OF_ONE: usize = 128;
const REPORTS: usize = 20_000;
/// How long an agent may take to say who it is.
const REGISTER_TIME: Duration = Duration::from_secs(5);
/// Console pieces of one node that wait for the disk. Agents send 64 KiB at a time.
const CONSOLE_DEPTH: usize = 32;
const MAX_PIECE_BYTES: usize = 1 << 20;
const MAX_NODE_CPUS: u32 = 65_536;
const MOST_NODES: usize = 100_000;
/// An agent that was asked for a whole report and sends deltas is asked again after this time.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// The service.
#[derive(Debug)]
pub struct RegistryApi {
    role: Role,
    sessions: AtomicU64,
    reports: Arc<Streams>,
    blobs: Arc<Streams>,
    sending: Arc<Semaphore>,
}

type MessageStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl RegistryApi {
    /// For a scheduler that leads, or one that has blobs only.
    pub fn new(role: Role) -> Self {
        Self {
            role,
            sessions: AtomicU64::new(1),
            reports: Streams::new(REPORTS_OF_ONE, REPORTS),
            blobs: Streams::new(BLOBS, BLOBS_WAITING),
            sending: Arc::new(Semaphore::new(BLOBS)),
        }
    }
}

#[tonic::async_trait]
impl Registry for RegistryApi {
    type ReportStream = MessageStream<SchedulerMessage>;
    type FetchBlobStream = MessageStream<BlobChunk>;

    async fn report(
        &self,
        request: Request<Streaming<AgentReport>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let scheduler = self.role.leader().await?;
        let seat = self.reports.enter(&request)?;
        let mut reports = request.into_inner();
        let first = tokio::time::timeout(REGISTER_TIME, reports.message())
            .await
            .map_err(|_| {
                Status::deadline_exceeded("report: nothing came; the first message has to be Register")
            })?;
        let first = first?.and_then(|message| message.report);
        let Some(agent_report::Report::Register(register)) = first else {
            return Err(Status::invalid_argument(
                "report: the first message has to be Register",
            ));
        };
        let (sender, receiver) = mpsc::channel(DEPTH);
        let id = self.sessions.fetch_add(1, Ordering::Relaxed);
        let (name, entry) = begin(scheduler, &register, id, sender.clone()).await?;
        tracing::info!(node = %name, address = %register.address, version = %register.version, "agent registered");
        let registered = SchedulerMessage {
            message: Some(scheduler_message::Message::Registered(Registered {
                deltas: true,
                term: scheduler.store.term().0,
            })),
        };
        // The channel is new and has room.
        let _ = sender.try_send(Ok(registered));
        let scheduler = Arc::clone(scheduler);
        tokio::spawn(async move {
            let end = listen(&scheduler, &name, &entry, &mut reports, &sender).await;
            tracing::info!(node = %name, ?end, "agent's report stream ended");
            entry.end_session(id);
        });
        Ok(Response::new(seat.hold(ReceiverStream::new(receiver))))
    }

    async fn fetch_blob(
        &self,
        request: Request<FetchBlobRequest>,
    ) -> Result<Response<Self::FetchBlobStream>, Status> {
        let seat = self.blobs.enter(&request)?;
        let sha256 = request.into_inner().sha256;
        let path = self.role.blob(&sha256);
        let path = path.ok_or_else(|| Status::invalid_argument("sha256: is not 64 lower-case hex digits"))?;
        let mut file = tokio::fs::File::open(path)
            .await
            .map_err(|_| Status::not_found(format!("sha256: there is no blob {sha256}")))?;
        let turn = tokio::time::timeout(BLOB_PATIENCE, Arc::clone(&self.sending).acquire_owned()).await;
        let turn =
            turn.map_err(|_| Status::resource_exhausted("too many blobs are fetched at a time; try again"))?;
        let (sender, receiver) = mpsc::channel(BLOB_DEPTH);
        tokio::spawn(async move {
            let _turn = turn;
            loop {
                let mut data = vec![0; BLOB_CHUNK_BYTES];
                let chunk = match file.read(&mut data).await {
                    Ok(0) => return,
                    Ok(length) => {
                        data.truncate(length);
                        Ok(BlobChunk { data })
                    }
                    Err(error) => Err(Status::internal(format!("blob {sha256}: {error}"))),
                };
                let failed = chunk.is_err();
                // A reader that takes nothing for so long has gone, or means ill.
                if sender.send_timeout(chunk, BLOB_PATIENCE).await.is_err() || failed {
                    return;
                }
            }
        });
        Ok(Response::new(seat.hold(ReceiverStream::new(receiver))))
    }
}

/// Checks a registration, stores the node if it is new or has changed, and begins its session.
pub async fn begin(
    scheduler: &Shared,
    register: &Register,
    session: u64,
    sender: ReportSender,
) -> Result<(NodeName, Arc<NodeEntry>), Status> {
    let invalid = |text: String| Status::invalid_argument(text);
    let name: NodeName = register
        .node
        .parse()
        .map_err(|error: shoal_proto::IdError| invalid(error.to_string()))?;
    if !(1..=MAX_NODE_CPUS).contains(&register.cpus) {
        return Err(invalid(format!(
            "cpus: {} is not 1 to {MAX_NODE_CPUS}",
            register.cpus
        )));
    }
    if register.memory_bytes == 0 {
        return Err(invalid(
            "memory_bytes: is 0; a node has to lend some memory".to_owned(),
        ));
    }
    let bad_address = |error: InvalidAddress| invalid(error.to_string());
    refuse_newer_term(scheduler, &name, register.term)?;
    // Against a plan that reads the node, and against a second registration at the same time.
    let _planning = scheduler.planning.lock().await;
    let known = scheduler.nodes.get(&name);
    if known
        .as_ref()
        .is_some_and(|entry| entry.is_taken_by_other(&register.address))
    {
        let address = limits::shorten(&register.address);
        return Err(Status::already_exists(format!(
            "node: another agent named '{name}' is connected; give the one at {address} another name"
        )));
    }
    if known.is_none() && scheduler.nodes.list().len() >= MOST_NODES {
        return Err(Status::resource_exhausted(format!(
            "node: there are {MOST_NODES} nodes already; remove those that are gone with `shoal node rm`"
        )));
    }
    let old = known.as_ref().map(|entry| entry.record());
    let cpuid = Table::from_bytes(&register.cpuid).map_err(|error| invalid(format!("cpuid: {error}")))?;
    if register.msrs.len() > MAX_MSRS {
        let count = register.msrs.len();
        return Err(invalid(format!("msrs: {count}, at most {MAX_MSRS}")));
    }
    let cpu = if cpuid.is_empty() {
        None
    } else {
        scheduler.cpus.kind(&cpuid)
    };
    let (cpu, new_kind) = cpu.unzip();
    let record = NodeRecord {
        name: name.clone(),
        address: register.address.clone(),
        cpus: register.cpus,
        memory_bytes: register.memory_bytes,
        migration_tls: register.migration_tls,
        cordon: old.as_ref().map_or(Cordon::Open, |old| old.cordon),
        cpu,
        cpu_model: if cpuid.is_empty() {
            String::new()
        } else {
            cpuid.model()
        },
        kvm: register.software_kvm.map(|software| {
            if software {
                KvmKind::Software
            } else {
                KvmKind::Hardware
            }
        }),
        kvm_trouble: limits::shorten(&register.kvm_trouble),
        wishes: old
            .as_ref()
            .map_or_else(NodeWishes::default, |old| old.wishes.clone()),
        lost: match &old {
            Some(old) => old.lost.clone(),
            None => scheduler.nodes.removed(&name),
        },
        removed: false,
    };
    crate::agent::Agent::new(&record, scheduler.nodes.caller()).map_err(bad_address)?;
    if old.as_ref() != Some(&record) {
        let new_kind = new_kind.flatten();
        let writes = new_kind.iter().cloned().chain([Write::PutNode(record.clone())]);
        let stored = scheduler.store.apply(writes.collect()).await;
        stored.map_err(|error| Status::internal(error.to_string()))?;
        if let Some(Write::PutCpu(digest, features)) = new_kind {
            scheduler.cpus.add(digest, features);
        }
    }
    let entry = scheduler
        .nodes
        .get_or_insert(record.clone())
        .map_err(bad_address)?;
    entry
        .begin_session(record, session, sender)
        .map_err(bad_address)?;
    entry.set_cpu_speed(register.cpu_speed);
    entry.set_host(&register.boot_id, register.host_cpus);
    entry.set_cpu_quota(register.cpu_quota);
    entry.set_msrs(scheduler.cpus.msr_list(&register.msrs));
    observe::announce_liveness(scheduler, &entry);
    Ok((name, entry))
}

/// An agent that has heard of a later lead refuses whatever this scheduler asks: it is no node to plan with.
fn refuse_newer_term(scheduler: &Shared, node: &NodeName, heard: u64) -> Result<(), Status> {
    let own = scheduler.store.term();
    if heard <= own.0 {
        return Ok(());
    }
    let why = format!(
        "its agent obeys a scheduler of term {heard} and refuses this one, of term {own}; if there is no such scheduler, end \
         the agent, remove the file 'term' in its state directory, and start it again"
    );
    if let Some(entry) = scheduler.nodes.get(node) {
        entry.set_trouble(why.clone());
    }
    Err(Status::failed_precondition(format!("node {node}: {why}")))
}

/// Takes what an agent reports. Its console bytes are written by another task: a slow disk does not make a node silent.
async fn listen(
    scheduler: &Shared,
    name: &NodeName,
    entry: &Arc<NodeEntry>,
    reports: &mut Streaming<AgentReport>,
    sender: &ReportSender,
) -> Result<(), Status> {
    let (console, pieces) = mpsc::channel(CONSOLE_DEPTH);
    // It ends with the other half of its channel.
    tokio::spawn(write_console(
        Arc::clone(scheduler),
        name.clone(),
        Arc::clone(entry),
        pieces,
    ));
    let mut decoder = Decoder::default();
    // When a whole report was asked for last.
    let mut asked: Option<Instant> = None;
    loop {
        let message = tokio::select! {
            message = reports.message() => message?,
            // The agent has gone, or a newer session of it has taken its place.
            () = sender.closed() => return Ok(()),
        };
        let Some(message) = message else { return Ok(()) };
        match message.report {
            Some(agent_report::Report::Heartbeat(heartbeat)) => {
                asked = None;
                scheduler.metrics.count_report(ReportKind::Whole);
                observe::report(scheduler, name, entry, decoder.whole(heartbeat));
            }
            Some(agent_report::Report::Delta(delta)) => match decoder.delta(delta) {
                Ok(report) => {
                    scheduler.metrics.count_report(ReportKind::Delta);
                    observe::report(scheduler, name, entry, report);
                }
                Err(gap) => {
                    scheduler.metrics.count_report(ReportKind::Gap);
                    entry.touch();
                    if asked.is_none_or(|asked| asked.elapsed() >= ASK_AGAIN) && entry.want_whole_report() {
                        tracing::info!(node = %name, %gap, "a whole report is asked for");
                        asked = Some(Instant::now());
                    }
                }
            },
            Some(agent_report::Report::VmChanged(facts)) => {
                observe::vm_changed(scheduler, name, entry, facts);
            }
            Some(agent_report::Report::Console(piece)) if piece.data.len() > MAX_PIECE_BYTES => {
                return Err(Status::invalid_argument(format!(
                    "console: {} bytes; at most {MAX_PIECE_BYTES} at a time",
                    piece.data.len()
                )));
            }
            // One that finds no room is not acknowledged, and comes again.
            Some(agent_report::Report::Console(piece)) => drop(console.try_send(piece)),
            Some(agent_report::Report::Register(_)) => {
                return Err(Status::invalid_argument("report: registered twice on one stream"));
            }
            None => tracing::debug!(node = %name, "a report of a kind this scheduler does not know"),
        }
    }
}

async fn write_console(
    scheduler: Shared,
    name: NodeName,
    entry: Arc<NodeEntry>,
    mut pieces: mpsc::Receiver<ConsoleData>,
) {
    while let Some(piece) = pieces.recv().await {
        take_console(&scheduler, &name, &entry, piece).await;
    }
}

/// Stores console bytes and tells the agent how far they may be forgotten.
async fn take_console(scheduler: &Shared, name: &NodeName, entry: &NodeEntry, console: ConsoleData) {
    let Some(vm_ref) = console.vm else { return };
    let Ok(vm) = vm_ref.vm_id.parse::<VmId>() else {
        return;
    };
    if !observe::may_write_console(scheduler, name, vm, Epoch(vm_ref.epoch)) {
        // Nobody wants them: they are acknowledged so that the agent does not keep them.
        entry.acknowledge_console(vm, console.offset.saturating_add(console.data.len() as u64));
        return;
    }
    let reached = console.offset.saturating_add(console.data.len() as u64);
    let stored = scheduler.logs.append(vm, console.offset, console.data).await;
    if let Some(entry) = scheduler.vms.get(vm) {
        entry.console_reached(reached);
    }
    match stored {
        Ok(end) => entry.acknowledge_console(vm, end),
        // Not acknowledged: the agent keeps them and sends them again.
        Err(error) => tracing::error!(%vm, %error, "console log cannot be written"),
    }
}
