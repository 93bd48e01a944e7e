//! The agent's stream to the scheduler: it registers, reports, and takes acknowledgements; after any failure it
//! connects again, for ever.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shoal_proto::NodeName;
use shoal_proto::node::{
    AgentReport, Register, Registered, SchedulerMessage, agent_report::Report, scheduler_message::Message,
};
use shoal_report::{Encoder, Thresholds, WHOLE_EVERY};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::kvm::{HostKvm, KvmKind};
use crate::node::Node;
use crate::process::this_boot;
use crate::term::TermError;

const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long the scheduler may take to say that the node is registered.
const REGISTER_LIMIT: Duration = Duration::from_secs(5);
/// Reports that may wait for the connection; a console piece is the largest, of 64 KiB.
const QUEUE: usize = 64;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
    #[error("the scheduler said: {} ({:?})", .0.message(), .0.code())]
    Status(Box<Status>),
    #[error("the scheduler closed the stream")]
    Closed,
    #[error("the scheduler did not register the node within {} s", REGISTER_LIMIT.as_secs())]
    NotRegistered,
    #[error(transparent)]
    Term(#[from] TermError),
    #[error("KVM of the node is not as it was registered")]
    Kvm,
    #[error("the node's load cannot be read: {0}")]
    Load(io::Error),
}

impl From<Status> for SessionEnd {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// Reports as long as it is polled.
pub(crate) async fn report_for_ever(node: Arc<Node>, address: SocketAddr) {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut registered = false;
        let Err(end) = session(&node, address, &mut registered).await;
        node.uplink.close();
        if registered {
            pause = FIRST_PAUSE;
        }
        if matches!(end, SessionEnd::Kvm) {
            tracing::info!(%end, "registering again");
            continue;
        }
        let status = match &end {
            SessionEnd::Status(status) => Some(status.as_ref()),
            _ => None,
        };
        if node.schedulers.failed(status) {
            tracing::info!(%end, "asking the scheduler that leads");
            tokio::time::sleep(FIRST_PAUSE).await;
            continue;
        }
        tracing::warn!(%end, retry_ms = pause.as_millis(), "no session with the scheduler");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn session(
    node: &Arc<Node>,
    address: SocketAddr,
    registered: &mut bool,
) -> Result<std::convert::Infallible, SessionEnd> {
    let (reports, queue) = mpsc::channel(QUEUE);
    let mut kvm = node.kvm.subscribe();
    let registration = registration(node, address, &kvm.borrow_and_update());
    send(&reports, Report::Register(registration)).await?;
    let mut registry = node.schedulers.current();
    let welcome = async {
        let mut messages = registry.report(ReceiverStream::new(queue)).await?.into_inner();
        let registered = wait_until_registered(node, &mut messages).await?;
        Ok::<_, SessionEnd>((messages, registered))
    };
    let (messages, welcome) = timeout(REGISTER_LIMIT, welcome)
        .await
        .map_err(|_| SessionEnd::NotRegistered)??;
    tracing::info!(node = %node.name, "registered with the scheduler");
    *registered = true;
    node.uplink.open(reports.clone());
    let whole_wanted = AtomicBool::new(!welcome.deltas);
    // Apart, so that a full queue in one direction never stops the other.
    tokio::select! {
        end = read_messages(node, messages, &whole_wanted) => end,
        end = write_heartbeats(node, &reports, welcome, &whole_wanted) => end,
        end = write_changes(node, &reports) => end,
        _ = kvm.changed() => Err(SessionEnd::Kvm),
    }
}

fn registration(node: &Node, address: SocketAddr, kvm: &HostKvm) -> Register {
    Register {
        node: node.name.to_string(),
        address: address.to_string(),
        cpus: node.capacity.cpus,
        memory_bytes: node.capacity.memory_bytes,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        software_kvm: kvm.kind.map(|kind| kind == KvmKind::Software),
        cpuid: node.cpuid.clone(),
        msrs: node.msrs.clone(),
        migration_tls: node.certificates.is_some(),
        cpu_speed: node.cpu_speed,
        kvm_trouble: kvm.trouble.clone(),
        term: node.terms.highest(),
        boot_id: this_boot().map(|id| id.to_string()).unwrap_or_default(),
        host_cpus: node.capacity.host_cpus,
        cpu_quota: cpu_quota(node),
    }
}

/// What VMs get at most, as long as that can be read.
fn cpu_quota(node: &Node) -> Option<f64> {
    let quota = node.cgroup.as_ref()?.cpu_quota();
    quota.unwrap_or_else(|error| {
        tracing::warn!(%error, "the CPU quota of VMs is not known");
        None
    })
}

async fn wait_until_registered(
    node: &Node,
    messages: &mut Streaming<SchedulerMessage>,
) -> Result<Registered, SessionEnd> {
    while let Some(message) = messages.message().await? {
        if let Some(Message::Registered(registered)) = message.message {
            node.terms.hear(registered.term)?;
            return Ok(registered);
        }
    }
    Err(SessionEnd::Closed)
}

async fn read_messages<T>(
    node: &Node,
    mut messages: Streaming<SchedulerMessage>,
    whole_wanted: &AtomicBool,
) -> Result<T, SessionEnd> {
    while let Some(message) = messages.message().await? {
        match message.message {
            Some(Message::ConsoleAck(ack)) => match ack.vm_id.parse() {
                Ok(id) => node
                    .incarnations(id)
                    .iter()
                    .for_each(|vm| vm.acknowledge_console(ack.offset)),
                Err(error) => tracing::warn!(%error, "console acknowledgement ignored"),
            },
            Some(Message::WholeReportWanted(_)) => whole_wanted.store(true, Ordering::Relaxed),
            Some(Message::Registered(_)) | None => {}
        }
    }
    Err(SessionEnd::Closed)
}

async fn write_heartbeats<T>(
    node: &Arc<Node>,
    reports: &mpsc::Sender<AgentReport>,
    Registered { deltas, term }: Registered,
    whole_wanted: &AtomicBool,
) -> Result<T, SessionEnd> {
    let mut encoder = Encoder::new(Thresholds::DEFAULT, phase(&node.name));
    let mut ticks = interval(HEARTBEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // Its calls are refused: it must not take this node for one that obeys.
        node.terms.check(term)?;
        let sampled = Arc::clone(node);
        let heartbeat = tokio::task::spawn_blocking(move || sampled.heartbeat()).await;
        let heartbeat = heartbeat
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(SessionEnd::Load)?;
        if whole_wanted.swap(!deltas, Ordering::Relaxed) {
            encoder.want_whole();
        }
        send(reports, encoder.encode(heartbeat)).await?;
    }
}

/// When, after its first, a node sends its whole reports: not when others do.
fn phase(node: &NodeName) -> u32 {
    let mut hasher = DefaultHasher::new();
    node.hash(&mut hasher);
    u32::try_from(hasher.finish() % u64::from(WHOLE_EVERY)).unwrap_or(0)
}

async fn write_changes<T>(node: &Node, reports: &mpsc::Sender<AgentReport>) -> Result<T, SessionEnd> {
    loop {
        for key in node.uplink.next_changed().await {
            // One that is gone was destroyed: the scheduler asked for that.
            if let Some(vm) = node.vm(key).filter(|vm| !vm.is_retiring()) {
                send(reports, Report::VmChanged(vm.facts())).await?;
            }
        }
    }
}

async fn send(reports: &mpsc::Sender<AgentReport>, report: Report) -> Result<(), SessionEnd> {
    reports
        .send(AgentReport { report: Some(report) })
        .await
        .map_err(|_| SessionEnd::Closed)
}
