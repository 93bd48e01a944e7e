//! Where the two ends of a migration are: both on this machine, or each on a host of its own at the ends of a slow link.

use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Instant;
use std::{env, io};

use anyhow::{Context as _, Result, ensure};
use shoal_tests::certificates::Certificates;
use shoal_tests::cluster;
use shoal_tests::netns::Network;

use crate::case::Case;

/// The source's node, and its name in certificates. QEMU has no choice of names.
pub const SOURCE: &str = "client";
/// The destination's.
pub const DESTINATION: &str = "server";
const LINK_RATE: &str = "1gbit";
/// A port of a host that has nothing else.
const PORT: u16 = 7480;
const CHUNK: usize = 1 << 20;
const REFERENCE_BYTES: u64 = 256 << 20;

/// What migrations need around them.
#[derive(Debug)]
pub struct Place {
    /// Of both nodes.
    pub certificates: Certificates,
    network: Option<Network>,
}

impl Place {
    /// With hosts of their own, if some case wants them.
    pub fn new(with_network: bool) -> Self {
        Self {
            certificates: Certificates::of(&[SOURCE, DESTINATION]),
            network: with_network.then(|| Network::new(&[SOURCE, DESTINATION], LINK_RATE)),
        }
    }

    /// Why a network of hosts cannot be made here; `None` if it can.
    pub fn no_network() -> Option<&'static str> {
        let found = |program: &str| {
            Command::new(program)
                .arg("-V")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok()
        };
        if !rustix::process::geteuid().is_root() {
            Some("network namespaces need root")
        } else if !(found("ip") && found("tc")) {
            Some("iproute2 is not installed")
        } else {
            None
        }
    }

    /// The words before a command that runs on `node` for this case.
    pub fn words(&self, case: &Case, node: &str) -> Vec<String> {
        self.network_of(case)
            .map_or_else(Vec::new, |network| network.on(node))
    }

    /// Where the destination of this case listens, without a port.
    pub fn address(&self, case: &Case) -> String {
        self.network_of(case)
            .map_or_else(|| "127.0.0.1".into(), |network| network.address(DESTINATION))
    }

    /// A port that is free there.
    pub fn port(&self, case: &Case) -> u16 {
        self.network_of(case).map_or_else(cluster::free_port, |_| PORT)
    }

    fn network_of(&self, case: &Case) -> Option<&Network> {
        self.network.as_ref().filter(|_| case.settings.gigabit)
    }

    /// Bytes per second of one TCP stream over the link; `None` without one.
    ///
    /// # Errors
    /// If they cannot be sent.
    pub fn link_rate(&self) -> Result<Option<f64>> {
        let Some(network) = &self.network else {
            return Ok(None);
        };
        let own = env::current_exe()?;
        let address = format!("{}:{PORT}", network.address(DESTINATION));
        let start = |node: &str, role: &str| {
            let mut words = network.on(node).into_iter();
            Command::new(words.next().unwrap_or_default())
                .args(words)
                .arg(&own)
                .args(["stream", role, &address])
                .stdout(Stdio::piped())
                .spawn()
                .context("iproute2 is not installed")
        };
        let mut receiver = start(DESTINATION, "receive")?;
        let sender = start(SOURCE, "send").and_then(|child| Ok(child.wait_with_output()?));
        if sender.as_ref().map_or(true, |output| !output.status.success()) {
            drop(receiver.kill()); // it may have ended
        }
        drop(receiver.wait());
        let output = sender?;
        let seconds: f64 = String::from_utf8_lossy(&output.stdout)
            .trim()
            .parse()
            .context("the link carries nothing")?;
        Ok(Some(REFERENCE_BYTES as f64 / seconds))
    }
}

/// One end of the stream that tells what the link carries; run as a process of its own on its host.
///
/// # Errors
/// If there is no other end.
pub fn stream(role: &str, address: &str) -> Result<Option<f64>> {
    if role == "receive" {
        let (mut from, _) = TcpListener::bind(address)?.accept()?;
        io::copy(&mut from, &mut io::sink())?;
        return Ok(None);
    }
    let mut to = connect(address)?;
    let chunk = vec![1u8; CHUNK];
    let start = Instant::now();
    for _ in 0..REFERENCE_BYTES / CHUNK as u64 {
        io::Write::write_all(&mut to, &chunk)?;
    }
    // The receiver reads to the end, so it closes when it has everything.
    to.shutdown(std::net::Shutdown::Write)?;
    let left = io::copy(&mut to, &mut io::sink())?;
    ensure!(left == 0, "{address} is somebody else");
    Ok(Some(start.elapsed().as_secs_f64()))
}

/// The other end may still be about to listen.
fn connect(address: &str) -> Result<TcpStream> {
    let deadline = Instant::now() + std::time::Duration::from_secs(10);
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => return Err(error).context(address.to_owned()),
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(10)),
        }
    }
}
