//! A real etcd of one member, on loopback ports that were free, with its data in a temporary directory.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PROGRAM: &str = "/usr/bin/etcd";
/// How long it may take to answer.
const READY: Duration = Duration::from_secs(60);
/// Other tests take ports, too.
const TRIES: usize = 5;

/// One that runs until it is dropped.
#[derive(Debug)]
pub struct EtcdServer {
    directory: tempfile::TempDir,
    port: u16,
    peer_port: u16,
    child: Child,
}

impl EtcdServer {
    /// Starts one. `None`, which is said, if there is none to start and `SHOAL_SKIP_ETCD=1` allows that.
    #[must_use]
    pub fn start() -> Option<Self> {
        if !Path::new(PROGRAM).exists() {
            assert!(
                std::env::var("SHOAL_SKIP_ETCD").is_ok_and(|value| value == "1"),
                "there is no {PROGRAM}: install etcd-server, as `cargo xtask test` does, or set SHOAL_SKIP_ETCD=1"
            );
            eprintln!("skipped: there is no {PROGRAM}");
            return None;
        }
        for _ in 0..TRIES {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let (port, peer_port) = two_ports();
            let mut server = Self {
                child: spawn(directory.path(), port, peer_port),
                port,
                peer_port,
                directory,
            };
            if server.becomes_ready() {
                return Some(server);
            }
        }
        panic!("etcd does not start");
    }

    /// The store below a prefix.
    #[must_use]
    pub fn url(&self, prefix: &str) -> String {
        format!("etcd://127.0.0.1:{}/{prefix}", self.port)
    }

    /// Ends it as a crash would; its data stay.
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }

    /// Starts it again with its data.
    pub fn start_again(&mut self) {
        self.child = spawn(self.directory.path(), self.port, self.peer_port);
        assert!(self.becomes_ready(), "etcd does not start again");
    }

    /// False if it ended, as it does where a port was taken meanwhile.
    fn becomes_ready(&mut self) -> bool {
        let deadline = Instant::now() + READY;
        while Instant::now() < deadline {
            if self.child.try_wait().expect("a child").is_some() {
                return false;
            }
            if is_healthy(self.port) {
                return true;
            }
            thread::sleep(Duration::from_millis(50));
        }
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        panic!("etcd does not answer in {READY:?}: {log}");
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn spawn(directory: &Path, port: u16, peer_port: u16) -> Child {
    let (client, peer) = (
        format!("http://127.0.0.1:{port}"),
        format!("http://127.0.0.1:{peer_port}"),
    );
    let log = File::create(directory.join("log")).expect("a log file");
    Command::new(PROGRAM)
        .args(["--name", "test", "--log-level", "warn"])
        .arg("--data-dir")
        .arg(directory.join("data"))
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .args(["--initial-cluster", &format!("test={peer}")])
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("the log again"))
        .stderr(log)
        .spawn()
        .expect("etcd starts")
}

fn is_healthy(port: u16) -> bool {
    let answer = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    answer().is_ok_and(|answer| answer.contains(r#""health":"true""#))
}

/// Free now.
fn two_ports() -> (u16, u16) {
    let bound = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    let [one, other] = bound.map(|listener| listener.local_addr().expect("its address").port());
    (one, other)
}
