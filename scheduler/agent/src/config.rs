//! What an agent is told when it starts, and what of it is refused.

use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use shoal_proto::NodeName;
use shoal_proto::vm::MemoryBacking;
use shoal_secret::ClusterSecret;

/// Resolves when the agent should end. Its VMMs go on running.
pub type Shutdown = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How one node's agent is to run.
pub struct AgentConfig {
    /// The node's name in the cluster.
    pub node: NodeName,
    /// Where the agent serves the scheduler; port 0 for any. VMMs listen for migrations on the same IP address.
    pub listen: SocketAddr,
    /// Where others reach this agent, if that is not `listen`. Required when `listen` is the unspecified address.
    pub advertise: Option<SocketAddr>,
    /// Endpoints of the schedulers, such as `http://127.0.0.1:7470`; the one that leads is found among them.
    pub schedulers: Vec<String>,
    /// The agent's own directory; created if missing, and locked while the agent runs.
    pub state_dir: PathBuf,
    /// Memory in bytes that the node lends. `None`: all of the host's.
    pub memory_budget: Option<u64>,
    /// CPUs that the node lends. `None`: all of the host's.
    pub cpus: Option<u32>,
    /// The directory of a control group that exists; VMMs are put into it, and its CPU quota is what VMs get at most.
    /// `None`: they stay in the agent's own.
    pub cgroup: Option<PathBuf>,
    /// The `shoal-vmm` executable.
    pub vmm_binary: PathBuf,
    /// Allow a listen address that is not loopback, although nothing is encrypted or authenticated yet.
    pub insecure: bool,
    /// Holds `ca.pem`, `cert.pem` and `key.pem` for migrations over TLS. `None`: they go over plain TCP.
    pub migration_tls: Option<PathBuf>,
    /// What calls to and from the schedulers carry. `None`: whoever reaches the agent is obeyed.
    pub cluster_secret: Option<ClusterSecret>,
    /// What guest memory is made of; another VMM of the node can take over shared memory without a copy.
    pub memory_backing: MemoryBacking,
    /// Between two samples of how a VM writes its memory. `None`: it is not sampled.
    pub memory_sampling: Option<Duration>,
    /// Ends the agent.
    pub shutdown: Shutdown,
}

impl fmt::Debug for AgentConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentConfig")
            .field("node", &self.node)
            .field("listen", &self.listen)
            .field("advertise", &self.advertise)
            .field("schedulers", &self.schedulers)
            .field("state_dir", &self.state_dir)
            .field("memory_budget", &self.memory_budget)
            .field("cpus", &self.cpus)
            .field("cgroup", &self.cgroup)
            .field("vmm_binary", &self.vmm_binary)
            .field("insecure", &self.insecure)
            .field("migration_tls", &self.migration_tls)
            .field("cluster_secret", &self.cluster_secret)
            .field("memory_backing", &self.memory_backing)
            .field("memory_sampling", &self.memory_sampling)
            .finish_non_exhaustive()
    }
}

/// A configuration that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not loopback, and not allowed.
    #[error(
        "listen: {0} is reachable from other hosts and nothing is encrypted yet; \
         use a loopback address, or pass --insecure on a network you trust"
    )]
    NotLoopback(SocketAddr),
    /// Others cannot connect to the unspecified address.
    #[error("advertise: listening on {0} needs the address where other nodes reach this one")]
    AdvertiseMissing(SocketAddr),
    /// The advertised address is no address of one host.
    #[error("advertise: {0} is not an address that other nodes can connect to")]
    AdvertiseUnusable(SocketAddr),
    /// No such program.
    #[error("vmm_binary: {0} is not a file; build it, or say where it is with --vmm-binary or SHOAL_VMM")]
    VmmBinaryMissing(PathBuf),
    /// Paths travel as text in gRPC messages.
    #[error("state_dir: {0:?} is not valid UTF-8")]
    StateDirNotUtf8(PathBuf),
    /// Nothing could ever be placed here.
    #[error("{0}: must be more than 0")]
    Zero(&'static str),
    /// VMMs would not take that.
    #[error("memory_sampling: {0:?} is not 100 ms to an hour")]
    Sampling(Duration),
}

impl AgentConfig {
    /// Refuses what cannot work, before anything is opened.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !self.listen.ip().is_loopback() && !self.insecure {
            return Err(ConfigError::NotLoopback(self.listen));
        }
        match self.advertise {
            None if self.listen.ip().is_unspecified() => {
                return Err(ConfigError::AdvertiseMissing(self.listen));
            }
            Some(address) if address.ip().is_unspecified() || address.port() == 0 => {
                return Err(ConfigError::AdvertiseUnusable(address));
            }
            _ => {}
        }
        if !self.vmm_binary.is_file() {
            return Err(ConfigError::VmmBinaryMissing(self.vmm_binary.clone()));
        }
        if self.state_dir.to_str().is_none() {
            return Err(ConfigError::StateDirNotUtf8(self.state_dir.clone()));
        }
        if self.memory_budget == Some(0) {
            return Err(ConfigError::Zero("memory_budget"));
        }
        if self.cpus == Some(0) {
            return Err(ConfigError::Zero("cpus"));
        }
        let sampling = Duration::from_millis(100)..=Duration::from_secs(3600);
        if let Some(interval) = self
            .memory_sampling
            .filter(|interval| !sampling.contains(interval))
        {
            return Err(ConfigError::Sampling(interval));
        }
        Ok(())
    }

    /// The IP address under which other nodes reach this one.
    pub(crate) fn reachable_ip(&self) -> IpAddr {
        self.advertise.unwrap_or(self.listen).ip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(listen: &str) -> AgentConfig {
        AgentConfig {
            node: "node1".parse().expect("a name"),
            listen: listen.parse().expect("an address"),
            advertise: None,
            schedulers: vec!["http://127.0.0.1:7470".into()],
            state_dir: "state".into(),
            memory_budget: None,
            cpus: None,
            cgroup: None,
            vmm_binary: "/proc/self/exe".into(),
            insecure: false,
            migration_tls: None,
            cluster_secret: None,
            memory_backing: MemoryBacking::Auto,
            memory_sampling: None,
            shutdown: Box::pin(std::future::pending()),
        }
    }

    #[test]
    fn only_loopback_without_insecure() {
        assert!(config("127.0.0.1:0").validate().is_ok());
        assert!(config("[::1]:0").validate().is_ok());
        let mut open = config("10.0.0.1:7471");
        assert!(
            open.validate()
                .expect_err("refused")
                .to_string()
                .contains("--insecure")
        );
        open.insecure = true;
        assert!(open.validate().is_ok());
    }

    #[test]
    fn the_unspecified_address_needs_an_advertised_one() {
        let mut any = config("0.0.0.0:7471");
        any.insecure = true;
        assert!(matches!(any.validate(), Err(ConfigError::AdvertiseMissing(_))));
        any.advertise = Some("0.0.0.0:7471".parse().expect("an address"));
        assert!(matches!(any.validate(), Err(ConfigError::AdvertiseUnusable(_))));
        any.advertise = Some("10.0.0.1:7471".parse().expect("an address"));
        assert!(any.validate().is_ok());
    }

    #[test]
    fn a_missing_vmm_binary_and_empty_budgets_are_named() {
        let mut bad = config("127.0.0.1:0");
        bad.vmm_binary = "no/such/program".into();
        assert!(
            bad.validate()
                .expect_err("refused")
                .to_string()
                .starts_with("vmm_binary: ")
        );
        let mut bad = config("127.0.0.1:0");
        bad.memory_budget = Some(0);
        assert!(
            bad.validate()
                .expect_err("refused")
                .to_string()
                .starts_with("memory_budget: ")
        );
        let mut bad = config("127.0.0.1:0");
        bad.memory_sampling = Some(Duration::from_millis(99));
        assert!(matches!(bad.validate(), Err(ConfigError::Sampling(_))));
    }
}
