//! `shoal scheduler`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use shoal_plan::{Automation, BytesPerSecond, Policy};
use shoal_server::SchedulerConfig;

use crate::daemon;
use crate::error::CliError;
use crate::format::parse_size;

/// Arguments of `scheduler`.
#[derive(Debug, Args)]
pub struct SchedulerArgs {
    /// Where users and agents reach it.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7470")]
    pub listen: SocketAddr,
    /// How others reach it, if not by the address it listens on.
    #[arg(long, value_name = "ADDRESS")]
    pub advertise: Option<SocketAddr>,
    /// Where the state of the cluster is kept, such as etcd://10.0.0.1:2379,10.0.0.2:2379/shoal: then several schedulers
    /// can share it, one of which leads. Otherwise a file in the state directory.
    #[arg(long, value_name = "URL", env = "SHOAL_STORE")]
    pub store: Option<String>,
    /// In etcd: a leader that says nothing for so long is replaced.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    pub lease: Duration,
    /// Its own directory; otherwise `scheduler` in $XDG_STATE_HOME/shoal or ~/.local/state/shoal.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The VMM, which checks kernels at import; otherwise `shoal-vmm` beside this program.
    #[arg(long, value_name = "FILE", env = "SHOAL_VMM", value_parser = daemon::path_or_nothing())]
    pub vmm_binary: Option<PathBuf>,
    /// Listen on an address that is not loopback although nothing is encrypted or authenticated yet.
    #[arg(long)]
    pub insecure: bool,
    /// Serve metrics for Prometheus at http://ADDRESS/metrics; otherwise nowhere.
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<SocketAddr>,
    /// The secret that all daemons of the cluster share, in a file of mode 0600: calls without it are refused. `shoal up`
    /// makes one.
    #[arg(long, value_name = "FILE")]
    pub cluster_secret: Option<PathBuf>,
    /// Keep so many VMs that have ended, the latest, with their logs; others are removed.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub keep_ended: usize,
    /// Move nothing unless asked to: begins with the policy automation=manual.
    #[arg(long)]
    pub manual: bool,
    /// Bytes per second that a migration gets of the network. Taken too high, VMs leave a full node too late.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_size)]
    pub link_rate: u64,
}

/// Serves until SIGTERM or Ctrl-C. VMs go on without it.
pub async fn run(args: SchedulerArgs) -> Result<(), CliError> {
    daemon::log_to_stderr();
    let state_dir = match args.state_dir {
        Some(dir) => dir,
        None => daemon::default_state_dir()?.join("scheduler"),
    };
    let policy = Policy {
        link_rate: BytesPerSecond(args.link_rate),
        automation: if args.manual {
            Automation::Manual
        } else {
            Automation::Automatic
        },
        ..Policy::default()
    };
    policy
        .check()
        .map_err(|error| CliError::Usage(error.to_string()))?;
    let config = SchedulerConfig {
        listen: args.listen,
        advertise: args.advertise,
        insecure: args.insecure,
        state_dir,
        // A variable that is set to nothing is not set.
        store: args.store.filter(|url| !url.is_empty()),
        lease: args.lease,
        vmm_binary: Some(daemon::vmm_binary(args.vmm_binary)?),
        metrics: args.metrics,
        policy,
        keep_ended: args.keep_ended,
        cluster_secret: daemon::cluster_secret(args.cluster_secret.as_deref())?,
        shutdown: daemon::shutdown()?,
    };
    shoal_server::serve(config)
        .await
        .map_err(|error| CliError::Daemon(Box::new(error)))
}
