//! Starts the daemons of a local cluster and waits until every node is ready.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::ValueEnum as _;
use shoal_agent::ProcessIdentity;
use shoal_proto::NodeName;
use shoal_proto::cluster::{ListNodesRequest, NodeState};
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

/// A local cluster that was started by this process.
#[derive(Debug)]
pub struct LocalCluster {
    config: LocalConfig,
    /// What `up.json` says.
    pub record: UpRecord,
    children: Vec<(String, Child)>,
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
        let mut cluster = Self {
            config,
            record,
            children: Vec::new(),
        };
        cluster.start_scheduler()?;
        let client = cluster.scheduler_ready().await?;
        let authority = cluster.authority()?;
        for number in 1..=cluster.config.nodes {
            cluster.start_node(&format!("node{number}"), authority.as_ref())?;
        }
        cluster.nodes_ready(client.clone()).await?;
        Ok((cluster, client))
    }

    /// Names of daemons that have ended since the last call.
    pub fn ended(&mut self) -> Vec<String> {
        let mut names = Vec::new();
        self.children.retain_mut(|(name, child)| {
            let running = matches!(child.try_wait(), Ok(None));
            if !running {
                names.push(name.clone());
            }
            running
        });
        names
    }

    fn start_scheduler(&mut self) -> Result<(), CliError> {
        let config = self.config.clone();
        let mut command = self.daemon("scheduler")?;
        command.arg("--listen").arg(config.listen.to_string());
        if config.insecure {
            command.arg("--insecure");
        }
        if config.manual {
            command.arg("--manual");
        }
        self.spawn("scheduler", command, &config.state_dir.join("scheduler"))
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
        let mut command = self.daemon("agent")?;
        command
            .args(["--name", name, "--listen", "127.0.0.1:0"])
            .args(["--scheduler", &self.record.endpoint])
            .args(["--memory", &config.node_memory.to_string()])
            .args(["--cpus", &config.node_cpus.to_string()]);
        if let Some(backing) = config.memory_backing.to_possible_value() {
            command.args(["--memory-backing", backing.get_name()]);
        }
        if let Some(authority) = authority {
            let node: NodeName = name
                .parse()
                .map_err(|error| CliError::Failed(format!("cannot name a node: {error}")))?;
            authority.issue(&node, NODE_DAYS, &certificates)?;
            command.arg("--migration-tls").arg(&certificates);
        }
        self.spawn(name, command, &config.state_dir.join(name))
    }

    fn daemon(&self, subcommand: &str) -> Result<Command, CliError> {
        let mut command = Command::new(daemon::own_binary()?);
        command
            .arg(subcommand)
            .arg("--vmm-binary")
            .arg(&self.config.vmm_binary)
            .arg("--cluster-secret")
            .arg(self.config.state_dir.join(SECRET));
        Ok(command)
    }

    fn spawn(&mut self, name: &str, mut command: Command, state_dir: &Path) -> Result<(), CliError> {
        let log_path = self.log_path(name);
        let log_error = |error| file_error(log_path.clone(), "cannot write", error);
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(log_error)?;
        let child = command
            .arg("--state-dir")
            .arg(state_dir)
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
        self.children.push((name.to_owned(), child));
        self.record.processes.push(UpProcess {
            name: name.to_owned(),
            pid: identity.pid,
            start_ticks: identity.start_ticks,
            args: command
                .get_args()
                .map(|arg| arg.to_string_lossy().into_owned())
                .collect(),
        });
        self.record.save(&self.config.state_dir)
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
            let answers = |name: &str| {
                nodes
                    .iter()
                    .any(|n| n.name == name && n.state() != NodeState::Unreachable)
            };
            let missing: Vec<&str> = self
                .children
                .iter()
                .skip(1)
                .map(|(name, _)| name.as_str())
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
