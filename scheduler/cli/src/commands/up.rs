//! `shoal up`

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use shoal_proto::cluster::ListNodesRequest;

use crate::client::{Client, Context};
use crate::commands::agent::MemoryBacking;
use crate::commands::image::import;
use crate::daemon::{self, Signals};
use crate::error::CliError;
use crate::format;
use crate::format::parse_size;
use crate::local::record::{StateLock, UpProcess, UpRecord};
use crate::local::start::{LocalCluster, LocalConfig};
use crate::local::stop::stop;
use crate::page::Page;

/// The part of the host's available memory that the nodes share.
const MEMORY_SHARE_PERCENT: u64 = 75;
/// Default budgets are multiples of this.
const MEMORY_STEP: u64 = 64 << 20;
/// So many nodes unless said otherwise.
const DEFAULT_NODES: u32 = 3;
/// Between two looks at the daemons.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// Arguments of `up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// How many nodes, 3 unless said; they are named node1, node2, …
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub nodes: Option<u32>,
    /// What each node lends, such as 1GiB; otherwise an equal part of 75 % of what is available.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub node_memory: Option<u64>,
    /// What each node lends; otherwise an equal part, at least 1.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub node_cpus: Option<u32>,
    /// The VMs of node1, node2, … run in the cgroups node1, node2, … in this directory, which exist: as for `shoal agent`.
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Where everything is kept; otherwise $XDG_STATE_HOME/shoal or ~/.local/state/shoal.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where the cluster answers.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7470")]
    pub listen: SocketAddr,
    /// Return when it is up, instead of staying until Ctrl-C and then stopping it.
    #[arg(long, short)]
    pub detach: bool,
    /// Import the images in this directory; otherwise those that the workspace built.
    #[arg(long, value_name = "DIR")]
    pub images_dir: Option<PathBuf>,
    /// The VMM; otherwise `shoal-vmm` beside this program.
    #[arg(long, value_name = "FILE", env = "SHOAL_VMM", value_parser = daemon::path_or_nothing())]
    pub vmm_binary: Option<PathBuf>,
    /// Listen on an address that is not loopback although nothing is encrypted or authenticated yet.
    #[arg(long)]
    pub insecure: bool,
    /// Migrate over plain TCP, not over TLS with certificates made for this cluster.
    #[arg(long)]
    pub no_migration_tls: bool,
    /// What guest memory is made of: as for `shoal agent`.
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    pub memory_backing: MemoryBacking,
    /// Move nothing unless asked to: begins with the policy automation=manual.
    #[arg(long)]
    pub manual: bool,
    /// End what is left of an earlier cluster, its VMs too, and begin anew. Otherwise daemons that have ended are started again as they
    /// were, and adopt the VMs.
    #[arg(long)]
    pub fresh: bool,
}

#[derive(Debug, Serialize)]
struct UpView {
    endpoint: String,
    state_dir: PathBuf,
    nodes: u32,
    node_memory_bytes: u64,
    node_cpus: u32,
    images: Vec<String>,
    /// Daemons of an earlier cluster that had ended; empty for a new one.
    restarted: Vec<String>,
    processes: Vec<UpProcess>,
}

/// Starts a cluster on this machine, or what has ended of one. A new one that does not come up is stopped again.
pub async fn run(context: &Context, args: UpArgs) -> Result<ExitCode, CliError> {
    let mut signals = daemon::signals_to_up()?;
    let config = config(&args)?;
    let state_dir = config.state_dir.clone();
    let lock = StateLock::take(&state_dir)?;
    let record = UpRecord::load(&state_dir)?.filter(|record| !record.processes.is_empty());
    if let Some(record) = record.as_ref().filter(|record| record.is_running()) {
        return Err(CliError::Failed(format!(
            "a cluster is up already at {} (state in {}): `shoal down` stops it, --state-dir and --listen make another",
            record.endpoint,
            state_dir.display()
        )));
    }
    let earlier = record.filter(|_| !args.fresh);
    if let Some(words) = earlier.as_ref().and_then(|earlier| kept_shape(&args, earlier)) {
        context.output.note(&words);
    }
    let is_new = earlier.is_none();
    if is_new {
        stop(&state_dir, false).await?;
    }
    let begun = tokio::select! {
        begun = start(config, earlier, args.images_dir.as_deref()) => begun,
        signal = &mut signals => Err(CliError::Interrupted {
            signal,
            goes_on: if is_new { "what was started is stopped" } else { "what runs goes on" }.to_owned(),
        }),
    };
    let (mut cluster, view) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            // VMs of an earlier cluster are not to pay for it.
            if is_new {
                stop(&state_dir, false).await?;
            }
            return Err(error);
        }
    };
    context.output.show(&view, text)?;
    drop(lock);
    if args.detach {
        return Ok(ExitCode::SUCCESS);
    }
    context.output.note("Ctrl-C stops the cluster and its VMs");
    watch(context, &mut cluster, signals).await;
    context.output.note("stopping");
    let _lock = StateLock::take(&state_dir)?;
    stop(&state_dir, false).await?;
    Ok(ExitCode::SUCCESS)
}

/// What was asked for and does not hold: an earlier cluster goes on as it was.
fn kept_shape(args: &UpArgs, earlier: &UpRecord) -> Option<String> {
    let agents = earlier.processes.get(1..).unwrap_or_default();
    let recorded = |option: &str| -> Option<u64> {
        let args = &agents.first()?.args;
        let at = args.iter().position(|arg| arg == option)?;
        args.get(at + 1)?.parse().ok()
    };
    let mut kept = Vec::new();
    let nodes = u32::try_from(agents.len()).unwrap_or(u32::MAX);
    if args.nodes.is_some_and(|asked| asked != nodes) {
        kept.push(format!("--nodes {nodes}"));
    }
    let memory = recorded("--memory").filter(|&memory| args.node_memory.is_some_and(|asked| asked != memory));
    kept.extend(memory.map(|memory| format!("--node-memory {}", format::size(memory))));
    let cpus =
        recorded("--cpus").filter(|&cpus| args.node_cpus.is_some_and(|asked| u64::from(asked) != cpus));
    kept.extend(cpus.map(|cpus| format!("--node-cpus {cpus}")));
    (!kept.is_empty()).then(|| {
        format!(
            "note: an earlier cluster goes on as it was, with {}; --fresh ends it and begins anew",
            kept.join(" ")
        )
    })
}

async fn start(
    config: LocalConfig,
    earlier: Option<UpRecord>,
    images_dir: Option<&Path>,
) -> Result<(LocalCluster, UpView), CliError> {
    let state_dir = config.state_dir.clone();
    let (cluster, mut client, restarted) = match earlier {
        None => {
            let (cluster, client) = LocalCluster::start(config).await?;
            (cluster, client, Vec::new())
        }
        Some(record) => LocalCluster::complete(config, record).await?,
    };
    let images = import_images(&mut client, images_dir).await?;
    let nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
    let agents = cluster.record.processes.len() - 1;
    let view = UpView {
        endpoint: cluster.record.endpoint.clone(),
        state_dir,
        nodes: u32::try_from(agents).unwrap_or(u32::MAX),
        node_memory_bytes: nodes.first().map_or(0, |node| node.memory_bytes),
        node_cpus: nodes.first().map_or(0, |node| node.cpus),
        images,
        restarted,
        processes: cluster.record.processes.clone(),
    };
    Ok((cluster, view))
}

/// Until a signal; says if a daemon ends by itself.
async fn watch(context: &Context, cluster: &mut LocalCluster, mut signals: Signals) {
    let mut ticks = tokio::time::interval(WATCH_INTERVAL);
    loop {
        tokio::select! {
            _ = &mut signals => return,
            _ = ticks.tick() => {
                for name in cluster.ended() {
                    context.output.note(&format!("{name} has ended; see {name}.log; its VMs, if any, go on"));
                }
            }
        }
    }
}

fn config(args: &UpArgs) -> Result<LocalConfig, CliError> {
    let absolute = |path: PathBuf| {
        std::path::absolute(&path).map_err(|source| CliError::File {
            path,
            what: "not a usable path".into(),
            source,
        })
    };
    let state_dir = absolute(
        args.state_dir
            .clone()
            .map_or_else(daemon::default_state_dir, Ok)?,
    )?;
    let nodes = args.nodes.unwrap_or(DEFAULT_NODES);
    let cpus = available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    Ok(LocalConfig {
        state_dir,
        listen: with_port(args.listen)?,
        nodes,
        node_memory: args.node_memory.map_or_else(|| default_memory(nodes), Ok)?,
        cgroup: args.cgroup.clone().map(absolute).transpose()?,
        node_cpus: args.node_cpus.unwrap_or((cpus / nodes).max(1)),
        insecure: args.insecure,
        manual: args.manual,
        migration_tls: !args.no_migration_tls,
        memory_backing: args.memory_backing,
        vmm_binary: daemon::vmm_binary(args.vmm_binary.clone())?,
    })
}

/// Port 0 asks for a free one, which is chosen here: the scheduler is started again at the same.
fn with_port(listen: SocketAddr) -> Result<SocketAddr, CliError> {
    if listen.port() != 0 {
        return Ok(listen);
    }
    TcpListener::bind(listen)
        .and_then(|free| free.local_addr())
        .map_err(|error| CliError::Failed(format!("--listen: {listen}: no free port: {error}")))
}

fn default_memory(nodes: u32) -> Result<u64, CliError> {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = mem_available(&text).ok_or_else(|| {
        CliError::Failed("--node-memory: the host's memory cannot be read, so say how much".into())
    })?;
    let share = available / 100 * MEMORY_SHARE_PERCENT / u64::from(nodes);
    Ok((share / MEMORY_STEP * MEMORY_STEP).max(MEMORY_STEP))
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Imports every image found; the default place is `images` beside the directory of this program.
async fn import_images(client: &mut Client, said: Option<&Path>) -> Result<Vec<String>, CliError> {
    let directory = match said {
        Some(path) => path.to_owned(),
        None => daemon::own_binary()?
            .parent()
            .and_then(Path::parent)
            .unwrap_or(Path::new("/"))
            .join("images"),
    };
    let mut paths: Vec<PathBuf> = match fs::read_dir(&directory) {
        Ok(entries) => entries.filter_map(Result::ok).map(|entry| entry.path()).collect(),
        Err(_) if said.is_none() => Vec::new(),
        Err(source) => {
            return Err(CliError::File {
                path: directory,
                what: "--images-dir".into(),
                source,
            });
        }
    };
    paths.retain(|path| path.join("image.toml").is_file());
    paths.sort();
    let mut names = Vec::new();
    for path in paths {
        names.push(import(client, &path, String::new()).await?.name);
    }
    Ok(names)
}

fn text(view: &UpView) -> Page {
    let has = |name: &str| view.images.iter().any(|image| image == name);
    let mut lines = vec![];
    if !view.restarted.is_empty() {
        lines.push(format!(
            "started again as before: {}; VMs that outlived them go on (--fresh: ends them and begins anew)",
            view.restarted.join(", ")
        ));
    }
    lines.extend([
        format!(
            "the cluster is up at {}: {} nodes of {} and {} CPUs (state in {})",
            view.endpoint,
            view.nodes,
            format::size(view.node_memory_bytes),
            view.node_cpus,
            view.state_dir.display()
        ),
        format!("  export SHOAL_ENDPOINT={}", view.endpoint),
    ]);
    if has("linux") {
        lines.push("  shoal run --detach --name counter linux -- \\".into());
        lines.push("    sh -c 'i=0; while :; do echo count $i; i=$((i+1)); sleep 1; done'".into());
    } else if has("probe") {
        lines.push("  shoal run --detach --name counter probe -- wss=16MiB rate=1000".into());
    } else {
        lines.push(
            "no images were found: `cargo xtask images` builds some, `shoal image import` brings them in"
                .into(),
        );
        return lines.into_iter().collect();
    }
    lines.push("  shoal migrate counter".into());
    lines.push("  shoal logs -f counter".into());
    lines.push(format!("  shoal down --state-dir {}", view.state_dir.display()));
    lines.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_of_an_earlier_cluster_and_does_not_hold_is_told() {
        use clap::Parser as _;
        let process = |name: &str| UpProcess {
            name: name.to_owned(),
            pid: 1,
            start_ticks: 1,
            boot_id: None,
            args: ["agent", "--memory", "1073741824", "--cpus", "2"]
                .map(str::to_owned)
                .to_vec(),
        };
        let earlier = UpRecord {
            endpoint: String::new(),
            processes: ["scheduler", "node1", "node2"].map(process).to_vec(),
        };
        let told = |line: &str| {
            let cli = crate::args::Cli::try_parse_from(line.split(' ')).expect("well formed");
            match cli.command {
                crate::args::Command::Up(args) => kept_shape(&args, &earlier),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(told("shoal up"), None);
        assert_eq!(told("shoal up --nodes 2 --node-memory 1GiB --node-cpus 2"), None);
        let words = told("shoal up --nodes 3 --node-memory 512MiB --node-cpus 1").expect("told");
        for kept in ["--nodes 2", "--node-memory 1.0 GiB", "--node-cpus 2", "--fresh"] {
            assert!(words.contains(kept), "{words}");
        }
    }

    #[test]
    fn meminfo_is_read_and_garbage_is_not() {
        assert_eq!(
            mem_available("MemTotal: 9 kB\nMemAvailable:     2048 kB\n"),
            Some(2 << 20)
        );
        for bad in [
            "",
            "MemAvailable:",
            "MemAvailable: x kB",
            "MemAvailable: 99999999999999999999 kB",
        ] {
            assert_eq!(mem_available(bad), None, "{bad}");
        }
    }
}
