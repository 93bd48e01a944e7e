//! What a scheduler needs to know before it starts.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;

use shoal_plan::Policy;

/// Ends the scheduler when it completes.
pub type Shutdown = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Configuration of one scheduler.
pub struct SchedulerConfig {
    /// Where the cluster and registry services listen. Other than loopback only with `insecure`.
    pub listen: SocketAddr,
    /// Allows an address other than loopback, although nothing is encrypted or authenticated yet.
    pub insecure: bool,
    /// Holds the store, the image blobs and the console logs. Created if missing.
    pub state_dir: PathBuf,
    /// `shoal-vmm`, asked at image import whether the kernel can be booted. None: that check is left out.
    pub vmm_binary: Option<PathBuf>,
    /// Where Prometheus finds metrics, if anywhere. Other than loopback only with `insecure`.
    pub metrics: Option<SocketAddr>,
    /// What plans are made with, and whether they are carried out, unless operators have set otherwise.
    pub policy: Policy,
    /// The scheduler ends when this completes. VMs go on running.
    pub shutdown: Shutdown,
}

impl fmt::Debug for SchedulerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SchedulerConfig")
            .field("listen", &self.listen)
            .field("insecure", &self.insecure)
            .field("state_dir", &self.state_dir)
            .field("vmm_binary", &self.vmm_binary)
            .finish_non_exhaustive()
    }
}
