//! Puts a scheduler together and serves it: alone, with its store in a file; or as one of several, which `cluster` does.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shoal_door::{Door, Limits};
use shoal_proto::cluster::cluster_server::ClusterServer;
use shoal_proto::node::registry_server::RegistryServer;
use shoal_secret::{Demand, Prove};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tonic::server::NamedService as _;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::agent::Caller;
use crate::api::{ClusterApi, MOST_IMPORTS, Role};
use crate::cluster;
use crate::config::{SchedulerConfig, Settings};
use crate::control;
use crate::cpus::Cpus;
use crate::drain::SharedPlan;
use crate::events::Events;
use crate::failures::Failures;
use crate::history::History;
use crate::images::{ImageStore, mirror};
use crate::logs::LogStore;
use crate::metrics::{self, Metrics};
use crate::migrations::MigrationTable;
use crate::moves::{self, MoveOrder, Moves};
use crate::nodes::{InvalidAddress, NodeTable};
use crate::planner_policy::{PlannerPolicy, PolicyTextError};
use crate::policy::Defaults;
use crate::pool::Pool;
use crate::predictions::Predictions;
use crate::queue::Queue;
use crate::reconcile::{self, ReconcileQueue};
use crate::record::{Intent, VmRecord, now_unix_ms};
use crate::registry::RegistryApi;
use crate::scheduler::{Scheduler, Shared};
use crate::schedulers::Schedulers;
use crate::store::{Contents, Store, StoreError};
use crate::vms::{KEPT_MIGRATIONS, VmTable};

/// A heartbeat of a node with tens of thousands of VMs is a few MiB.
const MAX_MESSAGE_BYTES: usize = 32 << 20;
/// Calls at a time on one connection; more of them wait where they were made.
const MAX_CALLS: u32 = 200;
/// The store's file in the state directory.
pub const STORE_FILE: &str = "shoal.redb";
/// Between two looks whether a store that took nothing takes something again.
const PROBE: Duration = Duration::from_secs(1);
/// That write and read console logs.
const LOG_THREADS: usize = 4;
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
    /// Others cannot connect to it.
    #[error("advertise: {0} is not an address that others can connect to; say one with --advertise")]
    NotReachable(SocketAddr),
    /// Shorter than etcd grants.
    #[error("lease: {0:?} is not between 2 s and 60 s")]
    Lease(Duration),
    /// The system gives no threads.
    #[error("cannot start threads")]
    Threads(#[source] std::io::Error),
    /// A part of the scheduler failed.
    #[error("the scheduler failed inside: {0}")]
    Inside(#[from] tokio::task::JoinError),
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

/// What holds for the whole life of a scheduler, whether it leads or not.
#[derive(Debug)]
pub struct Base {
    /// As it was told.
    pub config: Settings,
    /// Where it listens. Each time that it begins to lead, or ceases to, another server takes it over.
    listener: std::net::TcpListener,
    metrics: Option<std::net::TcpListener>,
    /// Where others reach it.
    pub address: SocketAddr,
    /// Turns true when it is to end.
    pub shutdown: watch::Receiver<bool>,
    /// Since when it runs.
    pub started_unix_ms: i64,
}

/// Runs a scheduler until its shutdown completes. VMs and agents go on without it.
pub async fn serve(config: SchedulerConfig) -> Result<(), ServerError> {
    for address in [Some(config.listen), config.metrics].into_iter().flatten() {
        if !address.ip().is_loopback() && !config.insecure {
            return Err(ServerError::NotLoopback(address));
        }
    }
    config.policy.check()?;
    if config.cluster_secret.is_none() {
        tracing::warn!(
            "no --cluster-secret: whoever reaches {} can register as a node, and be sent VMs",
            config.listen
        );
    }
    let listener = bind(config.listen)?;
    let metrics = config.metrics.map(bind).transpose()?;
    let bound = listener.local_addr().map_err(|source| ServerError::Listen {
        address: config.listen,
        source,
    })?;
    let (ended, shutdown) = watch::channel(false);
    let address = config.advertise.unwrap_or(bound);
    let (config, told) = config.split();
    tokio::spawn(async move {
        told.await;
        ended.send_replace(true);
    });
    let base = Arc::new(Base {
        address,
        config,
        listener,
        metrics,
        shutdown,
        started_unix_ms: now_unix_ms(),
    });
    std::fs::create_dir_all(&base.config.state_dir).map_err(|source| ServerError::StateDir {
        path: base.config.state_dir.clone(),
        source,
    })?;
    match &base.config.store {
        None => {
            let (store, contents) = Store::open_file(&base.config.state_dir.join(STORE_FILE)).await?;
            let schedulers = Schedulers::alone(base.address, base.started_unix_ms);
            lead(Arc::clone(&base), store, contents, schedulers).await
        }
        Some(url) => cluster::run(&base, url).await,
    }
}

/// Leads until the shutdown. A leader that is deposed is dropped, with all that it has begun.
pub async fn lead(
    base: Arc<Base>,
    store: Store,
    contents: Contents,
    schedulers: Schedulers,
) -> Result<(), ServerError> {
    let term = store.term();
    let (scheduler, subjects, unfinished) = assemble(&base.config, store, contents, schedulers)?;
    unfinished.take_up(&scheduler).await;

    let mut tasks = JoinSet::new();
    tasks.spawn(reconcile::run(Arc::clone(&scheduler), subjects));
    tasks.spawn(control::run(Arc::clone(&scheduler)));
    if scheduler.schedulers.are_several() {
        let directory = scheduler.images.directory().to_owned();
        let shared = Arc::clone(&scheduler);
        let prove = Prove::new(base.config.cluster_secret.as_ref());
        tasks.spawn(mirror::run(
            directory,
            scheduler.schedulers.clone(),
            prove,
            move || std::future::ready(Ok(shared.blobs())),
        ));
    }
    let metrics = serve_metrics(&base, Some(&scheduler))?;
    tracing::info!(address = %base.address, %term, state_dir = %base.config.state_dir.display(),
        "scheduler is ready");
    let served = serve_grpc(&base, Role::Leader(Arc::clone(&scheduler))).await;
    tasks.shutdown().await;
    if let Some(metrics) = metrics {
        metrics.abort();
    }
    scheduler.events.persist(&scheduler.store).await?;
    tracing::info!("scheduler has ended");
    served
}

/// Serves metrics, if there is a place for them; one that does not lead has none.
pub fn serve_metrics(base: &Base, scheduler: Option<&Shared>) -> Result<Option<JoinHandle<()>>, ServerError> {
    let Some(listener) = &base.metrics else {
        return Ok(None);
    };
    let serve = metrics::http::serve(scheduler.cloned(), listen(listener)?);
    Ok(Some(tokio::spawn(serve)))
}

fn bind(address: SocketAddr) -> Result<std::net::TcpListener, ServerError> {
    let bound = std::net::TcpListener::bind(address);
    let ready = bound.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    ready.map_err(|source| ServerError::Listen { address, source })
}

/// The socket for the runtime that this is called in.
fn listen(listener: &std::net::TcpListener) -> Result<TcpListener, ServerError> {
    let again = listener.try_clone().and_then(TcpListener::from_std);
    again.map_err(|source| ServerError::Listen {
        address: listener.local_addr().unwrap_or_else(|_| ([0, 0, 0, 0], 0).into()),
        source,
    })
}

type Subjects = tokio::sync::mpsc::UnboundedReceiver<reconcile::Subject>;

/// What a former scheduler, or this one in a former life, had begun.
#[derive(Debug)]
pub struct Unfinished {
    /// Migrations.
    pub intents: Vec<Intent>,
    /// Moves of all VMs of a node.
    pub orders: Vec<MoveOrder>,
}

impl Unfinished {
    /// Goes on with it.
    pub async fn take_up(self, scheduler: &Shared) {
        reconcile::recover(scheduler, self.intents);
        moves::resume(scheduler, self.orders).await;
    }
}

/// Opens the state directory with the store in it.
#[cfg(test)]
pub async fn open(config: &Settings) -> Result<(Shared, Subjects, Unfinished), ServerError> {
    let (store, contents) = Store::open_file(&config.state_dir.join(STORE_FILE)).await?;
    let schedulers = Schedulers::alone(([127, 0, 0, 1], 0).into(), now_unix_ms());
    assemble(config, store, contents, schedulers)
}

/// A scheduler that leads, from what was stored.
fn assemble(
    config: &Settings,
    store: Store,
    contents: Contents,
    schedulers: Schedulers,
) -> Result<(Shared, Subjects, Unfinished), ServerError> {
    let directory = config.state_dir.join("blobs");
    let used = contents.blobs();
    let records = contents.images.clone();
    let images = ImageStore::open(directory, records, &used).map_err(|source| ServerError::StateDir {
        path: config.state_dir.clone(),
        source,
    })?;
    build(config, store, contents, images, schedulers)
}

/// A scheduler from what was stored; its images are there already.
pub fn build(
    config: &Settings,
    store: Store,
    contents: Contents,
    images: ImageStore,
    schedulers: Schedulers,
) -> Result<(Shared, Subjects, Unfinished), ServerError> {
    let (reconcile, subjects) = ReconcileQueue::new();
    let history = History::new(contents.history, contents.sampled);
    let scheduler = Scheduler {
        nodes: NodeTable::new(
            contents.nodes,
            Caller::new(store.term(), config.cluster_secret.as_ref()),
        )?,
        images,
        cpus: Cpus::new(contents.cpus),
        vms: VmTable::new(contents.vms, history.by_vm(KEPT_MIGRATIONS)),
        failures: Failures::default(),
        migrations: MigrationTable::default(),
        history,
        metrics: Metrics::default(),
        defaults: Defaults::new(contents.migration_defaults),
        logs: LogStore::new(
            config.state_dir.join("logs"),
            Pool::new("shoal-logs", LOG_THREADS).map_err(ServerError::Threads)?,
        ),
        events: Events::new(contents.events),
        queue: Queue::new(contents.queue),
        reconcile,
        policy: PlannerPolicy::new(config.policy.clone(), contents.scheduling_policy)?,
        started: std::time::Instant::now(),
        vmm_binary: config.vmm_binary.clone(),
        planning: tokio::sync::Mutex::default(),
        planner: Pool::new("shoal-planner", 1).map_err(ServerError::Threads)?,
        questions: Pool::new("shoal-questions", 2).map_err(ServerError::Threads)?,
        imports: tokio::sync::Semaphore::new(MOST_IMPORTS),
        moves: Moves::default(),
        schedulers,
        keep_ended: config.keep_ended,
        predictions: Predictions::default(),
        drain_plan: SharedPlan::default(),
        store,
    };
    let unfinished = Unfinished {
        intents: contents.intents,
        orders: contents.orders,
    };
    Ok((Arc::new(scheduler), subjects, unfinished))
}

impl Contents {
    /// Blobs that VMs need, whatever became of their images.
    pub fn blobs(&self) -> Vec<String> {
        let waiting = self.queue.iter().map(|waiting| &waiting.vm);
        let blobs = self.vms.iter().chain(waiting).flat_map(VmRecord::blobs);
        blobs.map(|blob| blob.sha256.clone()).collect()
    }
}

impl Scheduler {
    /// Blobs that images and VMs need.
    fn blobs(&self) -> Vec<String> {
        let mut needed: Vec<String> = Vec::new();
        for image in self.images.list() {
            needed.extend(image.blobs().map(|blob| blob.sha256.clone()));
        }
        for vm in self.vms.list() {
            needed.extend(vm.record().blobs().map(|blob| blob.sha256.clone()));
        }
        for waiting in self.queue.list() {
            needed.extend(waiting.record.vm.blobs().map(|blob| blob.sha256.clone()));
        }
        needed.sort();
        needed.dedup();
        needed
    }
}

/// Serves until the shutdown.
pub async fn serve_grpc(base: &Base, role: Role) -> Result<(), ServerError> {
    let listener = listen(&base.listener)?;
    let mut shutdown = base.shutdown.clone();
    let leads = matches!(role, Role::Leader(_));
    let cluster = ClusterServer::new(ClusterApi::new(role.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let registry =
        RegistryServer::new(RegistryApi::new(role.clone())).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let demand = Demand::new(base.config.cluster_secret.clone());
    let registry = InterceptedService::new(registry, demand);
    let (health_reporter, health) = tonic_health::server::health_reporter();
    health_reporter.set_serving::<ClusterServer<ClusterApi>>().await;
    if leads {
        health_reporter.set_serving::<RegistryServer<RegistryApi>>().await;
    } else {
        health_reporter
            .set_not_serving::<RegistryServer<RegistryApi>>()
            .await;
    }
    let watcher = match &role {
        Role::Leader(scheduler) => Some(tokio::spawn(tell_health(
            scheduler.store.clone(),
            health_reporter,
        ))),
        Role::Follower(_) => None,
    };
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(shoal_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (ended, end) = tokio::sync::oneshot::channel();
    let serve = Server::builder()
        .max_concurrent_streams(Some(MAX_CALLS))
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(health)
        .add_service(reflection().build_v1()?)
        // What most clients ask for: Python's, graphical ones, older grpcurl.
        .add_service(reflection().build_v1alpha()?)
        .add_service(cluster)
        .add_service(registry)
        .serve_with_incoming_shutdown(Door::new(listener, Limits::of_this_process()), async move {
            // An error means that nobody can tell it to end any more.
            let _ = shutdown.wait_for(|ended| *ended).await;
            let _ = ended.send(());
        });
    // Streams that people follow do not end by themselves: after a grace they are cut.
    let cut = async {
        let _ = end.await;
        tokio::time::sleep(GRACE).await;
    };
    let served = tokio::select! {
        served = serve => served.map_err(ServerError::from),
        () = cut => Ok(()),
    };
    if let Some(watcher) = watcher {
        watcher.abort();
    }
    served
}

/// A scheduler that cannot store anything is not healthy, until it can again.
async fn tell_health(store: Store, reporter: HealthReporter) {
    let mut well = store.watch();
    loop {
        let now = *well.borrow_and_update();
        let status = if now {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for service in ["", ClusterServer::<ClusterApi>::NAME] {
            reporter.set_service_status(service, status).await;
        }
        tokio::select! {
            changed = well.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(PROBE), if !now => store.probe().await,
        }
    }
}
