//! The agent: one process on every node. It starts a VMM process for each VM, watches it, reports to the scheduler,
//! and keeps the cache of images. It can be killed and started again: the VMMs go on, and the new agent adopts them.
//!
//! A map of the crate, in the order in which a VM meets it:
//!
//! - `config`, [`serve`]: how an agent starts; `adopt`: what it finds then
//! - `certificates`: who this node is when VMs migrate
//! - `service`: the calls of the scheduler, one file for each group; `node`: what they share
//! - `epochs`, `blobs`: what must be there before a VM may start
//! - `cpuid`, `kvm`: what CPU guests get here, and how KVM runs them
//! - `spawn`, `runtime_dir`, `process`: a VMM process and what of it is on disk; `vm`: the agent's view of it; `cgroup`: what
//!   VMMs are put into
//! - `supervise`, `console`: what goes on as long as it lives; `retire`: its end
//! - `facts`, `node_load`, `procfs`, `sampling`, `speed`: what is measured; `report`, `uplink`: how the scheduler hears of it
//! - `schedulers`: which of several schedulers that is; `term`: why a former one is not obeyed
//!
//! On disk, in the state directory: `vms/VM_ID-EPOCH/` (`vmm.sock`, `pid`, `spec.json`, `vmm.log`, and `ran` once the
//! vCPUs have run), `epochs/VM_ID` (the newest epoch seen; for 30 days at least), `blobs/SHA256`, `term` (the highest heard of), `agent.lock`.
#![forbid(unsafe_code)]

mod adopt;
mod blobs;
mod certificates;
mod cgroup;
mod config;
mod console;
mod cpuid;
mod epochs;
mod facts;
mod key;
mod keyed_lock;
mod kvm;
mod node;
mod node_load;
mod process;
mod procfs;
mod report;
mod retire;
mod runtime_dir;
mod sampling;
mod schedulers;
mod service;
mod spawn;
mod speed;
mod supervise;
mod term;
mod uplink;
mod vm;

use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use shoal_door::{Door, Limits};
use shoal_proto::node::agent_server::AgentServer;
use shoal_secret::{Demand, Prove};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tonic::transport::Server;

pub use adopt::AdoptError;
pub use certificates::CertificatesError;
pub use cgroup::CgroupError;
pub use config::{AgentConfig, ConfigError, Shutdown};
pub use process::{ParseIdentityError, ProcessIdentity};

/// How long calls under way may take to end after the agent is told to.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(2);
/// Calls at a time on one connection; more of them wait where they were made.
const MAX_CALLS: u32 = 512;
/// A connection that does not answer for this long is dead.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Why an agent cannot start, or go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates for migrations cannot be used.
    #[error(transparent)]
    Certificates(#[from] CertificatesError),
    /// The control group for VMs cannot be used.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The scheduler's endpoint is no URI.
    #[error("scheduler: '{0}' is not an endpoint such as http://127.0.0.1:7470")]
    Endpoint(String),
    /// The state directory cannot be used.
    #[error("state_dir: {path} cannot be used: {source}")]
    State {
        /// The state directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Two agents would fight over the same VMMs.
    #[error("state_dir: {0} belongs to an agent that is running; stop that one, or use another directory")]
    Locked(PathBuf),
    /// The address is taken, or not this host's.
    #[error("listen: cannot listen on {address}: {source}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// A VMM of an earlier agent cannot be taken over.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// The server failed.
    #[error("the agent's server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Runs a node's agent until `config.shutdown` resolves. Its VMMs go on running; the next agent with the same state
/// directory adopts them.
///
/// # Errors
/// If the agent cannot start, or its server fails.
pub async fn serve(config: AgentConfig) -> Result<(), AgentError> {
    config.validate()?;
    let prove = Prove::new(config.cluster_secret.as_ref());
    let schedulers = schedulers::Schedulers::new(&config.schedulers, &prove).map_err(AgentError::Endpoint)?;
    if config.cluster_secret.is_none() {
        tracing::warn!(
            "no --cluster-secret: whoever reaches {} can start, stop and destroy VMs",
            config.listen
        );
    }
    let state_error = |source| AgentError::State {
        path: config.state_dir.clone(),
        source,
    };
    let certificates = config
        .migration_tls
        .as_deref()
        .map(|dir| certificates::MigrationCertificates::open(dir, &config.node))
        .transpose()?;
    let cgroup = config.cgroup.as_deref().map(cgroup::Cgroup::open).transpose()?;
    let (state_dir, _lock) = lock_state_dir(&config.state_dir)?;
    let mut node = node::Node::open(&config, certificates, &state_dir, schedulers).map_err(state_error)?;
    let (cpuid, msrs, kvm) = tokio::join!(
        cpuid::of_host(&config.vmm_binary),
        cpuid::msrs_of_host(&config.vmm_binary),
        kvm::HostKvm::test(&config.vmm_binary),
    );
    kvm.warn();
    node.cgroup = cgroup;
    node.cpuid = cpuid;
    node.msrs = msrs;
    node.kvm.send_replace(kvm);
    // Nodes that share a host have the same CPUs, and start at the same time.
    if !node.capacity.budgeted {
        node.cpu_speed = tokio::task::spawn_blocking(speed::measure).await.unwrap_or(0.0);
    }
    let node = Arc::new(node);

    let listen_error = |source| AgentError::Listen {
        address: config.listen,
        source,
    };
    let listener = TcpListener::bind(config.listen).await.map_err(listen_error)?;
    let bound = listener.local_addr().map_err(listen_error)?;
    adopt::adopt_all(&node).await?;
    tracing::info!(node = %node.name, address = %bound, schedulers = ?config.schedulers, "agent serves");

    let reporter = tokio::spawn(report::report_for_ever(
        Arc::clone(&node),
        config.advertise.unwrap_or(bound),
    ));
    let tester = tokio::spawn(kvm::keep_testing(Arc::clone(&node)));
    let (stop, stopped) = oneshot::channel::<()>();
    let server = Server::builder()
        .max_concurrent_streams(Some(MAX_CALLS))
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(AgentServer::with_interceptor(
            service::AgentService::new(Arc::clone(&node)),
            term::Gate {
                demand: Demand::new(config.cluster_secret),
                terms: node.terms.clone(),
            },
        ))
        .serve_with_incoming_shutdown(Door::new(listener, Limits::of_this_process()), async {
            // An error means that `stop` was dropped, which is an order to stop too.
            stopped.await.unwrap_or_default();
        });
    tokio::pin!(server);
    let result = tokio::select! {
        result = &mut server => result,
        () = config.shutdown => {
            drop(stop);
            // Streams to watchers have no end of their own.
            tokio::time::timeout(SHUTDOWN_LIMIT, server).await.unwrap_or(Ok(()))
        }
    };
    reporter.abort();
    tester.abort();
    node.stop_supervising();
    tracing::info!(node = %node.name, "agent ends; its VMMs go on");
    Ok(result?)
}

/// The state directory by its absolute path, and a lock that ends with this process.
fn lock_state_dir(path: &Path) -> Result<(PathBuf, File), AgentError> {
    let error = |source| AgentError::State {
        path: path.to_owned(),
        source,
    };
    // A VMM obeys whoever reaches its socket.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(error)?;
    let absolute = path.canonicalize().map_err(error)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(absolute.join("agent.lock"));
    let lock = lock.map_err(error)?;
    match lock.try_lock() {
        Ok(()) => Ok((absolute, lock)),
        Err(TryLockError::WouldBlock) => Err(AgentError::Locked(absolute)),
        Err(TryLockError::Error(source)) => Err(error(source)),
    }
}
