//! Several schedulers on one machine, with a real etcd, and agents that know them all.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use shoal_agent::ProcessIdentity;

use crate::cluster::free_port;
use crate::etcd::EtcdServer;
use crate::guest::tail;
use crate::shoal::Shoal;
use crate::{paths, wait};

/// The default: shorter ones end by themselves on a machine that also does other things.
const LEASE: &str = "5s";

/// The cluster. All of it ends when this is dropped.
#[derive(Debug)]
pub struct Schedulers {
    /// The command, which knows every scheduler.
    pub shoal: Shoal,
    etcd: EtcdServer,
    directory: tempfile::TempDir,
    /// By name: `s1`, `s2`, …
    addresses: BTreeMap<String, String>,
    daemons: BTreeMap<String, Child>,
    more: Vec<String>,
}

impl Schedulers {
    /// Starts so many, with these arguments, and waits until one leads. `None`, which is said, where there is no etcd.
    #[must_use]
    pub fn start(count: usize, more: &[&str]) -> Option<Self> {
        let etcd = EtcdServer::start()?;
        let addresses: BTreeMap<String, String> = (1..=count)
            .map(|number| (format!("s{number}"), format!("127.0.0.1:{}", free_port())))
            .collect();
        let all: Vec<&str> = addresses.values().map(String::as_str).collect();
        let mut schedulers = Self {
            shoal: Shoal::new(&all.join(",")),
            etcd,
            directory: tempfile::tempdir().expect("a temporary directory"),
            addresses: addresses.clone(),
            daemons: BTreeMap::new(),
            more: more.iter().map(|&arg| arg.to_owned()).collect(),
        };
        for name in addresses.keys() {
            schedulers.start_scheduler(name);
        }
        schedulers.wait_for_leader("");
        Some(schedulers)
    }

    /// Starts one, again or for the first time.
    pub fn start_scheduler(&mut self, name: &str) {
        let mut args = vec!["scheduler".to_owned()];
        args.extend(["--listen".to_owned(), self.addresses[name].clone()]);
        args.extend(["--store".to_owned(), self.etcd.url("shoal")]);
        args.extend(["--lease".to_owned(), LEASE.to_owned()]);
        args.extend(self.more.clone());
        self.spawn(name, &args);
    }

    /// Starts the agent of a node.
    pub fn start_agent(&mut self, name: &str, more: &[&str]) {
        let mut args = vec!["agent".to_owned()];
        args.extend(["--name", name, "--listen", "127.0.0.1:0"].map(str::to_owned));
        args.extend(["--scheduler".to_owned(), self.shoal.endpoint().to_owned()]);
        args.extend(more.iter().map(|&arg| arg.to_owned()));
        self.spawn(name, &args);
    }

    fn spawn(&mut self, name: &str, args: &[String]) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path(name))
            .expect("a log");
        let child = Command::new(paths::program("shoal"))
            .args(args)
            .arg("--state-dir")
            .arg(self.directory.path().join(name))
            .env_remove("SHOAL_ENDPOINT")
            .env_remove("SHOAL_STORE")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log again"))
            .stderr(log)
            .spawn()
            .expect("shoal starts");
        self.daemons.insert(name.to_owned(), child);
    }

    /// Where one listens.
    #[must_use]
    pub fn address(&self, name: &str) -> &str {
        &self.addresses[name]
    }

    /// Where the store is.
    #[must_use]
    pub fn store(&self) -> String {
        self.etcd.url("shoal")
    }

    /// Directories of schedulers and nodes.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What `schedulers` says.
    #[must_use]
    pub fn list(&self) -> Vec<Value> {
        let output = self.shoal.output(&["-o", "json", "schedulers"]);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Waits until one leads that is not the one of this name. Answers its name and its term.
    pub fn wait_for_leader(&self, other_than: &str) -> (String, u64) {
        wait::until("a scheduler that leads", wait::seconds(90), || {
            let all = self.list();
            let leader = all.iter().find(|scheduler| scheduler["role"] == "leader")?;
            let (name, _) = self
                .addresses
                .iter()
                .find(|(_, address)| leader["address"] == address.as_str())?;
            (name != other_than).then(|| (name.clone(), leader["term"].as_u64().expect("a term")))
        })
    }

    /// One that does not lead.
    #[must_use]
    pub fn follower(&self) -> String {
        let (leader, _) = self.wait_for_leader("");
        let mut names = self.addresses.keys();
        names
            .find(|&name| *name != leader)
            .expect("there are several")
            .clone()
    }

    /// Waits until all these nodes answer. Those without a VMM are never ready.
    pub fn wait_for_nodes(&self, names: &[&str]) {
        wait::until_true("the nodes to be ready", wait::seconds(90), || {
            names.iter().all(|name| {
                let state = self.node(name)["state"].clone();
                ["ready", "not-ready", "draining", "cordoned"]
                    .iter()
                    .any(|answers| state == *answers)
            })
        });
    }

    /// What `nodes` says of one.
    #[must_use]
    pub fn node(&self, name: &str) -> Value {
        self.find(&["-o", "json", "nodes"], name)
    }

    /// What `ps` says of a VM.
    #[must_use]
    pub fn vm(&self, name: &str) -> Value {
        self.find(&["-o", "json", "ps", "--all"], name)
    }

    /// One of a list by name; null if it is not there, or the command fails as it may while none leads.
    fn find(&self, args: &[&str], name: &str) -> Value {
        let output = self.shoal.output(args);
        let all: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
        all.into_iter().find(|it| it["name"] == name).unwrap_or_default()
    }

    /// Ends a daemon as a crash would.
    pub fn kill(&mut self, name: &str) {
        let mut child = self.daemons.remove(name).expect("it runs");
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    /// Ends a daemon as its operator would.
    pub fn terminate(&mut self, name: &str) {
        self.signal(name, Signal::TERM);
        let mut child = self.daemons.remove(name).expect("it runs");
        child.wait().expect("reaped");
    }

    /// A daemon stands still until [`Self::resume`].
    ///
    /// # Panics
    /// If it does not.
    pub fn pause(&self, name: &str) {
        self.signal(name, Signal::STOP);
        // One thread takes the signal and stops the others; on a busy machine these may run until then.
        let tasks = format!("/proc/{}/task", self.daemons[name].id());
        let stands = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
            stat.is_ok_and(|stat| {
                stat.rsplit_once(')')
                    .is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
            })
        };
        wait::until_true("every thread to stand still", wait::seconds(30), || {
            std::fs::read_dir(&tasks).is_ok_and(|mut tasks| tasks.all(stands))
        });
    }

    /// A daemon goes on.
    pub fn resume(&self, name: &str) {
        self.signal(name, Signal::CONT);
    }

    fn signal(&self, name: &str, signal: Signal) {
        let pid = Pid::from_child(&self.daemons[name]);
        kill_process(pid, signal).expect("it runs");
    }

    /// What a daemon has logged.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.log"))
    }
}

impl Drop for Schedulers {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in self.daemons.keys().chain(self.addresses.keys()) {
                eprintln!("--- {name}:\n{}", tail(&self.log(name)));
            }
        }
        for child in self.daemons.values_mut() {
            drop(child.kill()); // it may have ended
            drop(child.wait());
        }
        for name in self.daemons.keys() {
            let vms = self.directory.path().join(name).join("vms");
            for entry in fs::read_dir(vms).into_iter().flatten().filter_map(Result::ok) {
                let pid = fs::read_to_string(entry.path().join("pid")).unwrap_or_default();
                if let Ok(vmm) = pid.parse::<ProcessIdentity>() {
                    drop(vmm.kill()); // nothing more can be done
                }
            }
        }
    }
}
