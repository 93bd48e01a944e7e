//! What a scheduler needs to know before it starts.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use shoal_plan::Policy;
use shoal_secret::ClusterSecret;

/// Ends the scheduler when it completes.
pub type Shutdown = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Configuration of one scheduler.
pub struct SchedulerConfig {
    /// Where the cluster and registry services listen. Other than loopback only with `insecure`.
    pub listen: SocketAddr,
    /// Where users, agents and other schedulers reach this one, if that is not `listen`.
    pub advertise: Option<SocketAddr>,
    /// Allows an address other than loopback, although nothing is encrypted or authenticated yet.
    pub insecure: bool,
    /// Holds the store, unless that is elsewhere, the image blobs and the console logs. Created if missing.
    pub state_dir: PathBuf,
    /// `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`, which several schedulers can share. None: a file in `state_dir`.
    pub store: Option<String>,
    /// In etcd: how long a leader that says nothing goes on to count as one. At least 2 s, which is etcd's least.
    pub lease: Duration,
    /// `shoal-vmm`, asked at image import whether the kernel can be booted. None: that check is left out.
    pub vmm_binary: Option<PathBuf>,
    /// Where Prometheus finds metrics, if anywhere. Other than loopback only with `insecure`.
    pub metrics: Option<SocketAddr>,
    /// What plans are made with, and whether they are carried out, unless operators have set otherwise.
    pub policy: Policy,
    /// VMs that are kept when they have ended, with their logs: the latest so many.
    pub keep_ended: usize,
    /// What calls to and from agents carry. None: whoever reaches the scheduler may register as a node.
    pub cluster_secret: Option<ClusterSecret>,
    /// The scheduler ends when this completes. VMs go on running.
    pub shutdown: Shutdown,
}

impl fmt::Debug for SchedulerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SchedulerConfig")
            .field("listen", &self.listen)
            .field("insecure", &self.insecure)
            .field("state_dir", &self.state_dir)
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

/// What of it holds for the whole life of a scheduler.
#[derive(Debug)]
pub struct Settings {
    /// See [`SchedulerConfig::state_dir`].
    pub state_dir: PathBuf,
    /// See [`SchedulerConfig::store`].
    pub store: Option<String>,
    /// See [`SchedulerConfig::lease`].
    pub lease: Duration,
    /// See [`SchedulerConfig::vmm_binary`].
    pub vmm_binary: Option<PathBuf>,
    /// See [`SchedulerConfig::policy`].
    pub policy: Policy,
    /// See [`SchedulerConfig::keep_ended`].
    pub keep_ended: usize,
    /// See [`SchedulerConfig::cluster_secret`].
    pub cluster_secret: Option<ClusterSecret>,
}

impl SchedulerConfig {
    /// Its end apart from the rest.
    pub(crate) fn split(self) -> (Settings, Shutdown) {
        let settings = Settings {
            state_dir: self.state_dir,
            store: self.store,
            lease: self.lease,
            vmm_binary: self.vmm_binary,
            policy: self.policy,
            keep_ended: self.keep_ended,
            cluster_secret: self.cluster_secret,
        };
        (settings, self.shutdown)
    }
}
