//! `up` on what an earlier one left, and `up` that is interrupted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};
use shoal_tests::{guest, paths};

use crate::CALM;

fn up(cluster: &Cluster, more: &[&str]) -> Value {
    let (state, images) = (cluster.state_dir(), paths::images());
    let (state, images) = (state.to_string_lossy(), images.to_string_lossy());
    let mut args = vec!["up", "--detach", "--state-dir", &state, "--images-dir", &images];
    args.extend(more);
    cluster.shoal.json(&args)
}

#[test]
fn up_after_a_crash_starts_what_is_missing_and_keeps_the_vms() {
    let Some(machine) = Machine::with_kvm("up after a crash of daemons") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("a", "node1", "128MiB", CALM);
    let vmm = cluster.only_vmm(&vm);
    // What a script has open when it calls `up`.
    let open = tempfile::NamedTempFile::new().expect("a file");
    rustix::io::fcntl_setfd(open.as_file(), rustix::io::FdFlags::empty()).expect("it is inherited");

    for (crashed, told) in [
        (
            &["scheduler", "node1", "node2"][..],
            json!(["scheduler", "node1", "node2"]),
        ),
        (&["node1"], json!(["node1"])),
    ] {
        for daemon in crashed {
            cluster.kill_daemon(daemon);
        }
        let view = up(&cluster, &[]);
        assert_eq!(view["restarted"], told, "{view}");
        assert_eq!(
            (&view["nodes"], &view["endpoint"]),
            (&json!(2), &json!(cluster.shoal.endpoint()))
        );
        assert_eq!(holders(&cluster.state_dir(), open.path()), Vec::<String>::new());
        cluster.wait_for_state("a", "running", seconds(30));
        assert_eq!(cluster.only_vmm(&vm), vmm, "the VM goes on in its VMM");
        cluster.wait_for_heartbeats("a", 2);
    }
    assert_eq!(cluster.shoal.json(&["migrate", "a"])["result"], "completed");
    guest::assert_unharmed(&cluster.logs("a"));

    for daemon in ["scheduler", "node2"] {
        cluster.kill_daemon(daemon);
    }
    let listen = cluster.shoal.endpoint().replace("http://", "");
    let view = up(&cluster, &["--fresh", "--nodes", "1", "--listen", &listen]);
    assert_eq!((&view["restarted"], &view["nodes"]), (&json!([]), &json!(1)));
    assert!(cluster.vmms(&vm).is_empty(), "--fresh ends VMs");
}

/// Processes that have this directory among their arguments, by their directories in /proc.
fn users(state: &Path) -> Vec<PathBuf> {
    let state = state.to_string_lossy();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = processes.map(|entry| entry.path());
    processes
        .filter(|process| {
            let line = fs::read(process.join("cmdline"));
            line.is_ok_and(|line| String::from_utf8_lossy(&line).contains(&*state))
        })
        .collect()
}

fn is_used(state: &Path) -> bool {
    !users(state).is_empty()
}

/// Which of them have `file` open.
fn holders(state: &Path, file: &Path) -> Vec<String> {
    let has_open = |process: &PathBuf| {
        let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        open.into_iter()
            .any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == file))
    };
    let holders = users(state).into_iter().filter(has_open);
    holders.map(|process| process.display().to_string()).collect()
}

#[test]
fn an_interrupted_up_leaves_no_daemons() {
    let _machine = Machine::shared();
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let state = dir.path().join("s");
        let up = Command::new(paths::program("shoal"))
            .args([
                "up",
                "--listen",
                "127.0.0.1:0",
                "--nodes",
                "8",
                "--node-memory",
                "64MiB",
                "--state-dir",
            ])
            .arg(&state)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("shoal starts");
        wait::until_true("the first daemon", seconds(20), || state.join("up.json").exists());
        kill_process(Pid::from_child(&up), signal).expect("it runs");
        let output = up.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        assert!(!state.join("up.json").exists() && !is_used(&state), "{signal:?}");
    }
}

#[test]
fn port_0_is_a_free_port_and_down_makes_nothing() {
    let _machine = Machine::shared();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (state, wrong) = (dir.path().join("s"), dir.path().join("wrong"));
    let shoal = |args: &[&str], state: &Path| {
        let mut command = Command::new(paths::program("shoal"));
        // Variables that are set to nothing are not set.
        command.env("SHOAL_ENDPOINT", "").env("SHOAL_VMM", "");
        command.args(args).args(["-o", "json", "--state-dir"]).arg(state);
        let output = command.output().expect("shoal starts");
        assert!(output.status.success(), "{args:?}: {output:?}");
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON")
    };
    let up = [
        "up",
        "--detach",
        "--listen",
        "127.0.0.1:0",
        "--nodes",
        "1",
        "--node-memory",
        "64MiB",
    ];
    let view = shoal(&up, &state);
    let endpoint = view["endpoint"].as_str().expect("text");
    assert!(
        endpoint.starts_with("http://127.0.0.1:") && !endpoint.ends_with(":0"),
        "{view}"
    );
    // Whoever says where the cluster answers, and not where its state is, is not told that all is well.
    let elsewhere = Command::new(paths::program("shoal"))
        .arg("down")
        .env("SHOAL_ENDPOINT", endpoint)
        .env("XDG_STATE_HOME", &wrong)
        .output()
        .expect("shoal starts");
    let said = String::from_utf8_lossy(&elsewhere.stderr);
    assert!(
        elsewhere.status.code() == Some(1)
            && said.contains(&*wrong.join("shoal").to_string_lossy())
            && said.contains(&format!("a cluster answers at {endpoint}")),
        "{elsewhere:?}"
    );
    assert_eq!(shoal(&["down"], &wrong)["daemons"], 0);
    assert!(!wrong.exists(), "down makes nothing");
    assert_eq!(shoal(&["down", "--purge"], &state)["daemons"], 2);
}
