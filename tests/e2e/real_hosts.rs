//! Hosts of their own, joined by links of 1 Gbit/s that can be cut.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use shoal_tests::cluster::{VmmProcess, assert_at_most_one_runs, vmms_below};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::netns::Network;
use shoal_tests::paths;
use shoal_tests::shoal::Shoal;
use shoal_tests::wait::{self, seconds};

const SCHEDULER_PORT: u16 = 7470;
const AGENT_PORT: u16 = 7471;

#[test]
fn a_vm_runs_exactly_once_while_links_between_hosts_fail() {
    let Some(machine) = Machine::with_kvm_and_root("hosts in network namespaces") else {
        return;
    };
    let hosts = Hosts::start(machine);
    let probe = paths::image("probe");
    hosts.shoal.ok(&["image", "import", &probe.to_string_lossy()]);
    let args = "beat=200 fill=512MiB wss=16MiB rate=1000 pattern=random";
    let mut run = vec![
        "run",
        "probe",
        "--detach",
        "--name",
        "p",
        "--prefer-node",
        "a",
        "--memory",
        "640MiB",
        "--",
    ];
    run.extend(args.split(' '));
    let vm = hosts.shoal.json(&run)["id"].as_str().expect("an id").to_owned();
    wait::until_true("the probe to fill its memory", seconds(60), || {
        hosts
            .heartbeats()
            .last()
            .is_some_and(|beat| beat.filled >= 512 << 20)
    });

    let report = hosts.shoal.json(&["migrate", "p", "--to", "b"]);
    assert_eq!(report["result"], "completed", "{report}");
    hosts.wait_until_it_runs_once(&vm);

    for cut in ["a", "b"] {
        let from = hosts.vm()["node"].as_str().expect("a node").to_owned();
        let to = if from == "a" { "b" } else { "a" };
        let migration = hosts.shoal.start(&["migrate", "p", "--to", to]);
        wait::until_true("the middle of the migration", seconds(30), || {
            hosts
                .vmms(&vm)
                .iter()
                .any(|vmm| vmm.node == to && resident(vmm) > 128 << 20)
        });

        hosts.network.cut(cut);
        wait::until_true("the cut to be noticed", seconds(60), || {
            assert_at_most_one_runs(&hosts.vmms(&vm));
            hosts.node(cut)["state"] == "unreachable"
        });
        hosts.network.restore(cut);

        wait::until_true("the host to be back", seconds(60), || {
            assert_at_most_one_runs(&hosts.vmms(&vm));
            hosts.node(cut)["state"] == "ready"
        });
        hosts.wait_until_it_runs_once(&vm);
        let output = migration.wait_with_output().expect("an end of the migration");
        let report: Value = serde_json::from_slice(&output.stdout).expect("a report or an error");
        let completed = report["result"] == "completed";
        let node = if completed { to } else { &from };
        assert_eq!(
            hosts.vm()["node"],
            node,
            "it must be where the report says: {report}"
        );
        assert_eq!(completed, output.status.success(), "{report}");
    }
    guest::assert_unharmed(&hosts.shoal.ok(&["logs", "p"]));
}

/// A scheduler and two agents, each on a host of its own.
struct Hosts {
    network: Network,
    shoal: Shoal,
    directory: tempfile::TempDir,
    daemons: Vec<Child>,
    _machine: Machine,
}

impl Hosts {
    fn start(machine: Machine) -> Self {
        let network = Network::new(&["head", "a", "b"], "1gbit");
        let endpoint = format!("http://{}:{SCHEDULER_PORT}", network.address("head"));
        let on_head = network.on("head");
        let on_head: Vec<&str> = on_head.iter().map(String::as_str).collect();
        let shoal = Shoal::new(&endpoint).under(&on_head);
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut hosts = Self {
            network,
            shoal,
            directory,
            daemons: Vec::new(),
            _machine: machine,
        };
        hosts.daemon("head", SCHEDULER_PORT, &["scheduler", "--manual"]);
        wait::until_true("the scheduler to answer", seconds(30), || {
            hosts.shoal.output(&["nodes"]).status.success()
        });
        for name in ["a", "b"] {
            hosts.daemon(
                name,
                AGENT_PORT,
                &["agent", "--name", name, "--memory", "2GiB", "--cpus", "2"],
            );
        }
        wait::until_true("both nodes to join", seconds(30), || {
            hosts
                .shoal
                .json(&["nodes"])
                .as_array()
                .is_some_and(|nodes| nodes.len() == 2)
        });
        hosts
    }

    fn daemon(&mut self, host: &str, port: u16, args: &[&str]) {
        let log = File::create(self.directory.path().join(format!("{host}.log"))).expect("a log");
        let mut words = self.network.on(host).into_iter();
        let mut command = Command::new(words.next().expect("a command"));
        command.args(words).arg(paths::program("shoal")).args(args);
        command.args(["--insecure", "--endpoint", self.shoal.endpoint()]);
        command.args(["--listen", &format!("{}:{port}", self.network.address(host))]);
        command.arg("--state-dir").arg(self.directory.path().join(host));
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log again"))
            .stderr(log);
        self.daemons.push(command.spawn().expect("iproute2 is installed"));
    }

    fn vmms(&self, vm_id: &str) -> Vec<VmmProcess> {
        vmms_below(self.directory.path(), vm_id)
    }

    fn vm(&self) -> Value {
        self.shoal.json(&["ps", "--all"])[0].clone()
    }

    fn node(&self, name: &str) -> Value {
        let nodes = self.shoal.json(&["nodes"]);
        nodes
            .as_array()
            .expect("a list")
            .iter()
            .find(|node| node["name"] == name)
            .expect("the node")
            .clone()
    }

    fn heartbeats(&self) -> Vec<guest::Heartbeat> {
        guest::heartbeats(&self.shoal.ok(&["logs", "p"]))
    }

    /// Waits until the cluster says that the VM runs, one VMM is left, and the guest goes on.
    fn wait_until_it_runs_once(&self, vm: &str) {
        wait::until_true("exactly one running VM", seconds(90), || {
            let vmms = self.vmms(vm);
            let now = self.vm();
            assert_at_most_one_runs(&vmms);
            vmms.len() == 1 && now["state"] == "running" && now["node"] == vmms[0].node.as_str()
        });
        let before = self.heartbeats().len();
        wait::until_true("the guest to go on", seconds(30), || {
            self.heartbeats().len() >= before + 2
        });
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in ["head", "a", "b"] {
                let log =
                    fs::read_to_string(self.directory.path().join(format!("{host}.log"))).unwrap_or_default();
                eprintln!("--- {host}:\n{}", guest::tail(&log));
            }
            let output = self.shoal.output(&["events"]);
            eprintln!("--- events:\n{}", String::from_utf8_lossy(&output.stdout));
        }
        for daemon in &mut self.daemons {
            drop(daemon.kill()); // it may have ended
            drop(daemon.wait());
        }
        for host in ["a", "b"] {
            for vmm in left_vmms(&self.directory.path().join(host).join("vms")) {
                drop(vmm.kill()); // nothing more can be done
            }
        }
    }
}

fn left_vmms(vms: &Path) -> Vec<shoal_agent::ProcessIdentity> {
    let entries = fs::read_dir(vms).into_iter().flatten().filter_map(Result::ok);
    entries
        .filter_map(|entry| fs::read_to_string(entry.path().join("pid")).ok()?.parse().ok())
        .collect()
}

/// What a VMM process has in memory, guest memory included.
fn resident(vmm: &VmmProcess) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", vmm.identity.pid)).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10
}
