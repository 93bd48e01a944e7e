//! A real scheduler, as a process of its own.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use shoal_proto::cluster::cluster_client::ClusterClient;
use shoal_proto::cluster::{ListNodesRequest, Node};
use shoal_server::seed::{SeedNode, SeedVm, seed};
use tempfile::TempDir;

use crate::paths;

const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);
const MOST_BYTES: usize = 64 << 20;

/// The scheduler; killed in the end.
#[derive(Debug)]
pub struct Scheduler {
    directory: TempDir,
    child: Option<Child>,
    listen: SocketAddr,
    metrics: SocketAddr,
}

impl Scheduler {
    pub(super) async fn prepare(nodes: Vec<SeedNode>, vms: Vec<SeedVm>) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        seed(directory.path(), nodes, vms).await?;
        // Both at once, so that they differ.
        let ports = [
            TcpListener::bind("127.0.0.1:0")?,
            TcpListener::bind("127.0.0.1:0")?,
        ];
        Ok(Self {
            directory,
            child: None,
            listen: ports[0].local_addr()?,
            metrics: ports[1].local_addr()?,
        })
    }

    pub(super) async fn start(mut self) -> Result<Self> {
        let log = File::create(self.directory.path().join("log"))?;
        let mut child = Command::new(paths::program("shoal"))
            .arg("scheduler")
            .args(["--listen", &self.listen.to_string()])
            .args(["--metrics", &self.metrics.to_string()])
            .arg("--state-dir")
            .arg(self.directory.path())
            .env_remove("SHOAL_ENDPOINT")
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("the scheduler does not start")?;
        let answers = async {
            while tokio::net::TcpStream::connect(self.listen).await.is_err() {
                ensure!(child.try_wait()?.is_none(), "the scheduler has ended");
                tokio::time::sleep(POLL).await;
            }
            Ok(())
        };
        let started = tokio::time::timeout(PATIENCE, answers).await;
        self.child = Some(child);
        let started = started.map_err(anyhow::Error::from).flatten();
        started.with_context(|| format!("the scheduler does not answer: {}", self.log()))?;
        Ok(self)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Where it serves.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.listen)
    }

    /// What it wrote to its log.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// All nodes as users see them.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn nodes(&self) -> Result<Vec<Node>> {
        let client = ClusterClient::connect(self.endpoint()).await?;
        let mut client = client.max_decoding_message_size(MOST_BYTES);
        Ok(client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes)
    }

    /// A value of its metrics; 0 if there is no such line.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let mut stream = TcpStream::connect(self.metrics)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.and_then(|value| value.trim().parse().ok()).unwrap_or(0.0))
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}
