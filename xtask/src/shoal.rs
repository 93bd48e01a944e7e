//! The `shoal` command, used as a script would use it, and a cluster made by it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Deserializer, Value};

const POLL: Duration = Duration::from_millis(200);
/// How often a long wait says that it goes on.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);

/// A cluster on this machine. Ctrl-C ends it too, unless it is kept.
#[derive(Debug)]
pub struct Cluster {
    program: PathBuf,
    endpoint: String,
    state_dir: PathBuf,
    /// `shoal up` in the foreground, in our process group; none if the cluster is kept.
    up: Option<Child>,
}

impl Cluster {
    /// Starts one in a fresh state directory.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(
        program: PathBuf,
        state_dir: &Path,
        images: &Path,
        nodes: &[&str],
        keep: bool,
    ) -> Result<Self> {
        let endpoint = format!("127.0.0.1:{}", free_port()?);
        let mut cluster = Self {
            program,
            endpoint: format!("http://{endpoint}"),
            state_dir: state_dir.to_owned(),
            up: None,
        };
        cluster.down(true)?; // what an earlier run may have left
        let mut command = cluster.command(&["-o", "json", "up"]);
        command.args(nodes).arg("--listen").arg(&endpoint);
        command
            .arg("--state-dir")
            .arg(state_dir)
            .arg("--images-dir")
            .arg(images);
        if keep {
            command.arg("--detach");
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("shoal up")?;
        let stdout = child.stdout.take().context("the output of shoal up")?;
        let first = Deserializer::from_reader(stdout).into_iter::<Value>().next();
        let up = first.context("shoal up said nothing")?.context("shoal up")?;
        ensure!(up["error"].is_null(), "shoal up: {}", up["error"]["message"]);
        cluster.up = Some(child);
        if keep {
            cluster.reap()?;
        }
        Ok(cluster)
    }

    /// Where it answers.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A `shoal` command for it.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(args)
            .env("SHOAL_ENDPOINT", &self.endpoint)
            .env_remove("SHOAL_VMM")
            .stdin(Stdio::null());
        command
    }

    /// Runs a command with `-o json`, its notes and progress on our stderr.
    ///
    /// # Errors
    /// If it fails.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let mut all = vec!["-o", "json"];
        all.extend(args);
        let output = self
            .command(&all)
            .stderr(Stdio::inherit())
            .output()
            .context("shoal")?;
        if !output.status.success() {
            bail!("shoal {} ended with {}", args.join(" "), output.status);
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("the output of shoal {}", args.join(" ")))
    }

    /// Runs a command that lists things.
    ///
    /// # Errors
    /// If it fails or lists nothing.
    pub fn list(&self, args: &[&str]) -> Result<Vec<Value>> {
        match self.json(args)? {
            Value::Array(items) => Ok(items),
            other => bail!("shoal {}: not a list: {other}", args.join(" ")),
        }
    }

    /// The console of a VM so far.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn console(&self, vm: &str) -> Result<String> {
        let output = self
            .command(&["logs", vm])
            .stderr(Stdio::inherit())
            .output()
            .context("shoal")?;
        ensure!(
            output.status.success(),
            "shoal logs {vm} ended with {}",
            output.status
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Ends it, and removes all it kept if `purge`.
    ///
    /// # Errors
    /// If something does not end.
    pub fn down(&mut self, purge: bool) -> Result<()> {
        let mut command = self.command(&["down", "--state-dir"]);
        command
            .arg(&self.state_dir)
            .args(purge.then_some("--purge"))
            .stdout(Stdio::null());
        let status = command.status().context("shoal down")?;
        if let Some(up) = &mut self.up {
            up.kill().context("shoal up")?; // all that it watched over is gone
        }
        self.reap()?;
        ensure!(status.success(), "shoal down ended with {status}");
        Ok(())
    }

    fn reap(&mut self) -> Result<()> {
        match self.up.take() {
            Some(mut up) => up.wait().map(drop).context("shoal up"),
            None => Ok(()),
        }
    }
}

/// Looks again and again until `look` answers something.
///
/// # Errors
/// If it does not within `limit`, or fails.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    let mut next_sign = SIGN_OF_LIFE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(start.elapsed() < limit, "waited {} s for {what}", limit.as_secs());
        if start.elapsed() >= next_sign {
            println!("    ... {} s, waiting for {what}", next_sign.as_secs());
            next_sign += SIGN_OF_LIFE;
        }
        thread::sleep(POLL);
    }
}

/// A port that nobody listens on now.
fn free_port() -> Result<u16> {
    // Below the range from which the kernel hands out ports, so that no connection takes it meanwhile.
    (17_470..18_470)
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .context("no free port")
}
