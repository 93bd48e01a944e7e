//! `shoal agent`

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use shoal_agent::AgentConfig;
use shoal_proto::{NodeName, vm};

use crate::client::{self, Context};
use crate::daemon;
use crate::error::CliError;
use crate::format::{parse_duration, parse_size};

/// Arguments of `agent`. `--scheduler` says where the schedulers are.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// The node's name in the cluster; otherwise the host's.
    #[arg(long)]
    pub name: Option<NodeName>,
    /// Where the scheduler reaches this agent; VMs migrate over the same IP address.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7471")]
    pub listen: SocketAddr,
    /// How others reach it, if not by the address it listens on.
    #[arg(long, value_name = "ADDRESS")]
    pub advertise: Option<SocketAddr>,
    /// Its own directory; otherwise `agent` in $XDG_STATE_HOME/shoal or ~/.local/state/shoal.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Memory that the node lends, such as 8GiB; otherwise all of the host's.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// CPUs that the node lends; otherwise all of the host's.
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// A cgroup that exists, such as a slice's directory below /sys/fs/cgroup: VMs run in it, and what its CPU quota allows is all
    /// that the scheduler counts on.
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// The VMM; otherwise `shoal-vmm` beside this program.
    #[arg(long, value_name = "FILE", env = "SHOAL_VMM", value_parser = daemon::path_or_nothing())]
    pub vmm_binary: Option<PathBuf>,
    /// Listen on an address that is not loopback although nothing is encrypted or authenticated yet.
    #[arg(long)]
    pub insecure: bool,
    /// Migrate over TLS only, with the ca.pem, cert.pem and key.pem in this directory (see `shoal certs`).
    #[arg(long, value_name = "DIR")]
    pub migration_tls: Option<PathBuf>,
    /// The secret that all daemons of the cluster share, in a file of mode 0600: calls without it are refused. `shoal up`
    /// makes one.
    #[arg(long, value_name = "FILE")]
    pub cluster_secret: Option<PathBuf>,
    /// What guest memory is made of. A new VMM on the node takes over shared memory without a copy (`shoal upgrade`); auto:
    /// shared where the host gives it huge pages.
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    pub memory_backing: MemoryBacking,
    /// How often VMs' writes to memory are sampled, for their dirty rate and working set: such as 5s, or off.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_sampling)]
    pub memory_sampling: Sampling,
}

/// How often VMs' writes to memory are sampled; none: never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling(pub Option<Duration>);

fn parse_sampling(text: &str) -> Result<Sampling, String> {
    if text == "off" {
        return Ok(Sampling(None));
    }
    parse_duration(text)
        .map(|interval| Sampling(Some(interval)))
        .map_err(|error| format!("{error}, nor 'off'"))
}

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MemoryBacking {
    /// Shared where the host gives it huge pages, otherwise anonymous.
    Auto,
    /// Memory of the VMM alone.
    Anonymous,
    /// A memory file.
    Shared,
}

impl From<MemoryBacking> for vm::MemoryBacking {
    fn from(backing: MemoryBacking) -> Self {
        match backing {
            MemoryBacking::Auto => Self::Auto,
            MemoryBacking::Anonymous => Self::Anonymous,
            MemoryBacking::Shared => Self::Shared,
        }
    }
}

/// Serves until SIGTERM or Ctrl-C. VMs go on without it, and the next agent adopts them.
pub async fn run(context: &Context, args: AgentArgs) -> Result<(), CliError> {
    daemon::log_to_stderr();
    let state_dir = match args.state_dir {
        Some(dir) => dir,
        None => daemon::default_state_dir()?.join("agent"),
    };
    client::check_endpoints(&context.endpoints)?;
    let config = AgentConfig {
        node: args.name.map_or_else(host_name, Ok)?,
        listen: args.listen,
        advertise: args.advertise,
        schedulers: context.endpoints.clone(),
        state_dir,
        memory_budget: args.memory,
        cpus: args.cpus,
        cgroup: args.cgroup,
        vmm_binary: daemon::vmm_binary(args.vmm_binary)?,
        insecure: args.insecure,
        migration_tls: args.migration_tls,
        cluster_secret: daemon::cluster_secret(args.cluster_secret.as_deref())?,
        memory_backing: args.memory_backing.into(),
        memory_sampling: args.memory_sampling.0,
        shutdown: daemon::shutdown()?,
    };
    shoal_agent::serve(config)
        .await
        .map_err(|error| CliError::Daemon(Box::new(error)))
}

fn host_name() -> Result<NodeName, CliError> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let label = name
        .trim()
        .split('.')
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase();
    label.parse().map_err(|_| {
        CliError::Usage(format!(
            "--name: the host's name '{label}' cannot name a node: say one"
        ))
    })
}
