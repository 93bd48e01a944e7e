//! Puts a scheduler together and serves it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shoal_proto::cluster::cluster_server::ClusterServer;
use shoal_proto::node::registry_server::RegistryServer;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::api::ClusterApi;
use crate::config::SchedulerConfig;
use crate::control;
use crate::cpus::Cpus;
use crate::events::Events;
use crate::history::History;
use crate::images::ImageStore;
use crate::logs::LogStore;
use crate::metrics::{self, Metrics};
use crate::migrations::MigrationTable;
use crate::nodes::{InvalidAddress, NodeTable};
use crate::planner_policy::{PlannerPolicy, PolicyTextError};
use crate::policy::Defaults;
use crate::queue::Queue;
use crate::reconcile::{self, ReconcileQueue};
use crate::record::{Intent, VmRecord};
use crate::registry::RegistryApi;
use crate::scheduler::{Scheduler, Shared};
use crate::store::{Store, StoreError};
use crate::vms::{KEPT_MIGRATIONS, VmTable};

/// A heartbeat of a node with tens of thousands of VMs is a few MiB.
const MAX_MESSAGE_BYTES: usize = 32 << 20;
/// How long calls under way may take to end at shutdown.
const GRACE: Duration = Duration::from_secs(2);

/// Why a scheduler does not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Not loopback, and not allowed.
    #[error(
        "listen: {0} is reachable from other hosts and nothing is encrypted yet; \
         use a loopback address, or pass --insecure on a network you trust"
    )]
    NotLoopback(SocketAddr),
    /// The address cannot be listened on.
    #[error("listen: {address} cannot be listened on")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The state directory cannot be used.
    #[error("state directory {path}")]
    StateDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The policy cannot be used.
    #[error(transparent)]
    Policy(#[from] shoal_plan::PolicyError),
    /// The stored policy cannot be used.
    #[error("store: policy: {0}; it was set with a scheduler that took it")]
    StoredPolicy(#[from] PolicyTextError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A stored node cannot be reached by its address.
    #[error("store: a node's record is damaged")]
    Node(#[from] InvalidAddress),
    /// The descriptors for reflection are damaged.
    #[error("reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The transport failed.
    #[error("gRPC server")]
    Transport(#[from] tonic::transport::Error),
}

/// Runs a scheduler until its shutdown completes. VMs and agents go on without it.
pub async fn serve(config: SchedulerConfig) -> Result<(), ServerError> {
    for address in [Some(config.listen), config.metrics].into_iter().flatten() {
        if !address.ip().is_loopback() && !config.insecure {
            return Err(ServerError::NotLoopback(address));
        }
    }
    config.policy.check()?;
    let listener = bind(config.listen).await?;
    let metrics = match config.metrics {
        Some(address) => Some(bind(address).await?),
        None => None,
    };
    let address = listener.local_addr().map_err(|source| ServerError::Listen {
        address: config.listen,
        source,
    })?;
    let (scheduler, subjects, intents) = open(&config)?;
    reconcile::recover(&scheduler, intents);

    let mut tasks = JoinSet::new();
    tasks.spawn(reconcile::run(Arc::clone(&scheduler), subjects));
    tasks.spawn(control::run(Arc::clone(&scheduler)));
    if let Some(listener) = metrics {
        tasks.spawn(metrics::http::serve(Arc::clone(&scheduler), listener));
    }
    tracing::info!(%address, state_dir = %config.state_dir.display(), "scheduler is ready");
    let served = serve_grpc(&scheduler, listener, config.shutdown).await;
    tasks.shutdown().await;
    scheduler.events.persist(&scheduler.store).await?;
    tracing::info!("scheduler has ended");
    served
}

async fn bind(address: SocketAddr) -> Result<TcpListener, ServerError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ServerError::Listen { address, source })
}

type Subjects = tokio::sync::mpsc::UnboundedReceiver<reconcile::Subject>;

/// Opens the state directory.
pub fn open(config: &SchedulerConfig) -> Result<(Shared, Subjects, Vec<Intent>), ServerError> {
    let directory = &config.state_dir;
    let state_dir = |source| ServerError::StateDir {
        path: directory.clone(),
        source,
    };
    std::fs::create_dir_all(directory).map_err(state_dir)?;
    let (store, contents) = Store::open(&directory.join("shoal.redb"))?;
    let waiting = contents.queue.iter().map(|waiting| &waiting.vm);
    let used = blobs(contents.vms.iter().chain(waiting));
    let images = ImageStore::open(directory.join("blobs"), contents.images, &used).map_err(state_dir)?;
    let (reconcile, subjects) = ReconcileQueue::new();
    let history = History::new(contents.history, contents.sampled);
    let scheduler = Scheduler {
        nodes: NodeTable::new(contents.nodes)?,
        images,
        cpus: Cpus::new(contents.cpus),
        vms: VmTable::new(contents.vms, history.by_vm(KEPT_MIGRATIONS)),
        migrations: MigrationTable::default(),
        history,
        metrics: Metrics::default(),
        defaults: Defaults::new(contents.migration_defaults),
        logs: LogStore::new(directory.join("logs")),
        events: Events::new(contents.events),
        queue: Queue::new(contents.queue),
        reconcile,
        policy: PlannerPolicy::new(config.policy.clone(), contents.scheduling_policy)?,
        started: std::time::Instant::now(),
        vmm_binary: config.vmm_binary.clone(),
        planning: tokio::sync::Mutex::default(),
        store,
    };
    Ok((Arc::new(scheduler), subjects, contents.intents))
}

fn blobs<'a>(vms: impl Iterator<Item = &'a VmRecord> + Clone) -> Vec<String> {
    let kernels = vms.clone().map(|vm| vm.kernel.sha256.clone());
    let initrds = vms
        .filter_map(|vm| vm.initrd.as_ref())
        .map(|initrd| initrd.sha256.clone());
    kernels.chain(initrds).collect()
}

async fn serve_grpc(
    scheduler: &Shared,
    listener: TcpListener,
    shutdown: crate::config::Shutdown,
) -> Result<(), ServerError> {
    let cluster = ClusterServer::new(ClusterApi(Arc::clone(scheduler)))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let registry = RegistryServer::new(RegistryApi::new(Arc::clone(scheduler)))
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let (health_reporter, health) = tonic_health::server::health_reporter();
    health_reporter.set_serving::<ClusterServer<ClusterApi>>().await;
    health_reporter.set_serving::<RegistryServer<RegistryApi>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(shoal_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let (ended, end) = tokio::sync::oneshot::channel();
    let serve = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(health)
        .add_service(reflection)
        .add_service(cluster)
        .add_service(registry)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async move {
            shutdown.await;
            let _ = ended.send(());
        });
    // Streams that people follow do not end by themselves: after a grace they are cut.
    let cut = async {
        let _ = end.await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = serve => served.map_err(ServerError::from),
        () = cut => Ok(()),
    }
}
