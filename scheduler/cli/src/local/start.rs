//! Starts the daemons of a local cluster and waits until every node is ready.

use std::collections::HashSet;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::ValueEnum as _;
use shoal_agent::ProcessIdentity;
use shoal_proto::NodeName;
use shoal_proto::cluster::{ListNodesRequest, Node, NodeState};
use shoal_secret::ClusterSecret;
use tokio::time::{Instant, sleep};

use crate::certificates::{self, Authority};
use crate::client::{Client, connect};
use crate::commands::agent::MemoryBacking;
use crate::daemon;
use crate::error::CliError;
use crate::local::record::{UpProcess, UpRecord, file_error};

/// How long the daemons may take until they answer.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks.
const POLL: Duration = Duration::from_millis(50);
/// Of the authority that `up` makes.
const AUTHORITY_DAYS: u32 = 3650;
/// Of the nodes' certificates, which every `up` makes anew.
const NODE_DAYS: u32 = 365;
/// In the state directory, kept from one start to the next.
const SECRET: &str = "cluster.secret";
/// How much of a log is shown when its daemon ends early.
const LOG_TAIL: usize = 2_000;

/// How a local cluster is to be.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// Holds everything.
    pub state_dir: PathBuf,
    /// Where the scheduler listens.
    pub listen: SocketAddr,
    /// How many nodes.
    pub nodes: u32,
    /// What each lends.
    pub node_memory: u64,
    /// What each lends.
    pub node_cpus: u32,
    /// See `--cgroup`.
    pub cgroup: Option<PathBuf>,
    /// See `--insecure`.
    pub insecure: bool,
    /// See `--manual`.
    pub manual: bool,
    /// See `--no-migration-tls`.
    pub migration_tls: bool,
    /// See `--memory-backing`.
    pub memory_backing: MemoryBacking,
    /// See `--vmm-binary`.
    pub vmm_binary: PathBuf,
}

/// A local cluster, of whose daemons this process started some or all.
#[derive(Debug)]
pub struct LocalCluster {
    config: LocalConfig,
    /// What `up.json` says.
    pub record: UpRecord,
    /// Those that this process started, and so has to wait for.
    children: Vec<Child>,
    /// Names of daemons whose end was told.
    told: HashSet<String>,
    begun: Instant,
}

impl LocalCluster {
    /// Starts scheduler and nodes and waits until all are ready. What is started is on record at once, so that
    /// `down` can end it whatever happens here.
    pub async fn start(config: LocalConfig) -> Result<(Self, Client), CliError> {
        let record = UpRecord {
            endpoint: endpoint(config.listen),
            processes: Vec::new(),
        };
        let secret = config.state_dir.join(SECRET);
        ClusterSecret::read_or_create(&secret).map_err(|error| CliError::Failed(error.to_string()))?;
        let mut cluster = Self::new(config, record);
        cluster.start_scheduler()?;
        let client = cluster.scheduler_ready().await?;
        let authority = cluster.authority()?;
        for number in 1..=cluster.config.nodes {
            cluster.start_node(&format!("node{number}"), authority.as_ref())?;
        }
        cluster.nodes_ready(client.clone()).await?;
        Ok((cluster, client))
    }

    /// Starts those daemons of an earlier cluster that have ended, as they were started then. VMs that outlived them are adopted.
    /// Answers their names, too.
    pub async fn complete(
        config: LocalConfig,
        record: UpRecord,
    ) -> Result<(Self, Client, Vec<String>), CliError> {
        let mut cluster = Self::new(config, record);
        let mut restarted = Vec::new();
        for number in 0..cluster.record.processes.len() {
            let process = cluster.record.processes[number].clone();
            if !process.identity().is_running() {
                cluster.record.processes[number] = cluster.launch(&process.name, process.args)?;
                cluster.record.save(&cluster.config.state_dir)?;
                restarted.push(process.name);
            }
        }
        let client = cluster.scheduler_ready().await?;
        cluster.nodes_ready(client.clone()).await?;
        Ok((cluster, client, restarted))
    }

    fn new(config: LocalConfig, record: UpRecord) -> Self {
        Self {
            config,
            record,
            children: Vec::new(),
            told: HashSet::new(),
            begun: Instant::now(),
        }
    }

    /// Names of daemons that have ended since the last call.
    pub fn ended(&mut self) -> Vec<String> {
        self.children
            .retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        let ended = self
            .record
            .processes
            .iter()
            .filter(|process| !process.identity().is_running());
        let names = ended.map(|process| process.name.clone());
        names.filter(|name| self.told.insert(name.clone())).collect()
    }

    fn start_scheduler(&mut self) -> Result<(), CliError> {
        let config = self.config.clone();
        let mut args = self.daemon("scheduler")?;
        args.extend(["--listen".to_owned(), config.listen.to_string()]);
        if config.insecure {
            args.push("--insecure".to_owned());
        }
        if config.manual {
            args.push("--manual".to_owned());
        }
        self.spawn("scheduler", args, &config.state_dir.join("scheduler"))
    }

    /// The cluster's own, kept from one start to the next.
    fn authority(&self) -> Result<Option<Authority>, CliError> {
        if !self.config.migration_tls {
            return Ok(None);
        }
        let dir = self.certificates_dir();
        let authority = if dir.join(certificates::CA).exists() {
            Authority::open(&dir)?
        } else {
            Authority::create(&dir, AUTHORITY_DAYS)?
        };
        Ok(Some(authority))
    }

    fn certificates_dir(&self) -> PathBuf {
        self.config.state_dir.join("certs")
    }

    fn start_node(&mut self, name: &str, authority: Option<&Authority>) -> Result<(), CliError> {
        let config = self.config.clone();
        let certificates = self.certificates_dir().join(name);
        let mut args = self.daemon("agent")?;
        let mut say = |option: &str, value: &str| args.extend([option.to_owned(), value.to_owned()]);
        say("--name", name);
        say("--listen", "127.0.0.1:0");
        say("--scheduler", &self.record.endpoint);
        say("--memory", &config.node_memory.to_string());
        say("--cpus", &config.node_cpus.to_string());
        if let Some(backing) = config.memory_backing.to_possible_value() {
            say("--memory-backing", backing.get_name());
        }
        if let Some(cgroup) = &config.cgroup {
            say("--cgroup", &text(&cgroup.join(name))?);
        }
        if let Some(authority) = authority {
            let node: NodeName = name
                .parse()
                .map_err(|error| CliError::Failed(format!("cannot name a node: {error}")))?;
            authority.issue(&node, NODE_DAYS, &certificates)?;
            say("--migration-tls", &text(&certificates)?);
        }
        self.spawn(name, args, &config.state_dir.join(name))
    }

    fn daemon(&self, subcommand: &str) -> Result<Vec<String>, CliError> {
        let vmm = text(&self.config.vmm_binary)?;
        let secret = text(&self.config.state_dir.join(SECRET))?;
        let args = [subcommand, "--vmm-binary", &vmm, "--cluster-secret", &secret];
        Ok(args.map(str::to_owned).to_vec())
    }

    fn spawn(&mut self, name: &str, mut args: Vec<String>, state_dir: &Path) -> Result<(), CliError> {
        args.extend(["--state-dir".to_owned(), text(state_dir)?]);
        let process = self.launch(name, args)?;
        self.record.processes.push(process);
        self.record.save(&self.config.state_dir)
    }

    fn launch(&mut self, name: &str, args: Vec<String>) -> Result<UpProcess, CliError> {
        let log_path = self.log_path(name);
        let log_error = |error| file_error(log_path.clone(), "cannot write", error);
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(log_error)?;
        let child = Command::new(daemon::own_binary()?)
            .args(&args)
            .env_remove("SHOAL_ENDPOINT")
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(log_error)?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|error| CliError::Failed(format!("cannot start {name}: {error}")))?;
        // Not yet waited for, so the pid is still its own.
        let identity = ProcessIdentity::of(child.id())
            .map_err(|error| CliError::Failed(format!("cannot look at {name}: {error}")))?;
        self.children.push(child);
        Ok(UpProcess {
            name: name.to_owned(),
            pid: identity.pid,
            start_ticks: identity.start_ticks,
            boot_id: identity.boot_id,
            args,
        })
    }

    async fn scheduler_ready(&mut self) -> Result<Client, CliError> {
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            self.check_running()?;
            match connect(std::slice::from_ref(&self.record.endpoint)).await {
                Ok(client) => return Ok(client),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => sleep(POLL).await,
            }
        }
    }

    async fn nodes_ready(&mut self, mut client: Client) -> Result<(), CliError> {
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            self.check_running()?;
            let nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
            // One whose agent has ended is not unreachable at once.
            let since = self.begun.elapsed().as_millis();
            let reports = |node: &Node| node.silent_ms.is_some_and(|ms| u128::from(ms) < since);
            let answers = |name: &str| {
                nodes
                    .iter()
                    .any(|n| n.name == name && n.state() != NodeState::Unreachable && reports(n))
            };
            let agents = self.record.processes.iter().skip(1);
            let missing: Vec<&str> = agents
                .map(|process| process.name.as_str())
                .filter(|name| !answers(name))
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(CliError::Failed(format!(
                    "{} did not join the cluster in {} s; see the logs in {}",
                    missing.join(", "),
                    READY_TIMEOUT.as_secs(),
                    self.config.state_dir.display()
                )));
            }
            sleep(POLL).await;
        }
    }

    fn check_running(&mut self) -> Result<(), CliError> {
        match self.ended().first() {
            None => Ok(()),
            Some(name) => {
                let path = self.log_path(name);
                let tail = log_tail(&path);
                Err(CliError::Failed(format!(
                    "{name} ended early; the end of {}:\n{tail}",
                    path.display()
                )))
            }
        }
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.config.state_dir.join(format!("{name}.log"))
    }
}

/// A path as it stands in `up.json`, from which daemons are started again.
fn text(path: &Path) -> Result<String, CliError> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| CliError::Usage(format!("{}: up: paths must be UTF-8", path.display())))
}

/// How clients on this machine reach a scheduler that listens there.
fn endpoint(listen: SocketAddr) -> String {
    let mut address = listen;
    if address.ip().is_unspecified() {
        address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    format!("http://{address}")
}

fn log_tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(LOG_TAIL)..];
    String::from_utf8_lossy(tail).trim().to_owned()
}
