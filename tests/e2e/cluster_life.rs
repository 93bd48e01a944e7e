//! `up`, `down`, drain, and daemons that refuse to be open to all.

use std::process::Command;

use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};
use shoal_tests::{guest, paths};

use crate::CALM;

#[test]
fn up_refuses_a_second_cluster_and_down_leaves_no_process() {
    let Some(machine) = Machine::with_kvm("up and down") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("a", "node1", "128MiB", CALM);
    let state = cluster.state_dir();
    let state = state.to_string_lossy();
    let refusal = cluster.shoal.fails(&["up", "--detach", "--state-dir", &state]);
    assert!(
        refusal.code == 1 && refusal.stderr.contains("shoal down"),
        "{refusal:?}"
    );

    cluster.shoal.ok(&["down", "--state-dir", &state]);
    assert!(cluster.vmms(&vm).is_empty());
    assert_eq!(cluster.shoal.fails(&["ps"]).code, 4);
    assert!(
        cluster
            .shoal
            .ok(&["down", "--state-dir", &state])
            .contains("nothing was up")
    );
}

#[test]
fn vmms_are_ended_by_down_even_if_every_daemon_is_dead() {
    let Some(machine) = Machine::with_kvm("down without daemons") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("left", "node1", "128MiB", CALM);
    for daemon in ["scheduler", "node1", "node2"] {
        cluster.kill_daemon(daemon);
    }
    assert_eq!(cluster.vmms(&vm).len(), 1);
    let stopped = cluster
        .shoal
        .json(&["down", "--state-dir", &cluster.state_dir().to_string_lossy()]);
    assert_eq!(stopped["killed_vmms"], 1, "{stopped}");
    assert!(cluster.vmms(&vm).is_empty());
}

#[test]
fn a_drained_node_is_empty_and_stays_so_until_it_is_uncordoned() {
    let Some(machine) = Machine::with_kvm("drain") else {
        return;
    };
    let cluster = Cluster::start(
        machine,
        &Shape {
            nodes: 2,
            node_memory: "1GiB",
            automatic: true,
            ..Shape::default()
        },
    );
    for name in ["a", "b"] {
        cluster.run_probe(name, "node1", "128MiB", CALM);
    }
    let drained = cluster.shoal.json(&["drain", "node1"]);
    assert_eq!(
        (&drained["moved"], &drained["remaining"]),
        (&2.into(), &0.into()),
        "{drained}"
    );
    for name in ["a", "b"] {
        assert_eq!(cluster.vm(name)["node"], "node2");
    }
    let refusal = cluster
        .shoal
        .fails(&["run", "probe", "--detach", "--node", "node1"]);
    assert_eq!(refusal.code, 3, "{refusal:?}");

    cluster.shoal.ok(&["uncordon", "node1"]);
    assert_eq!(cluster.node("node1")["state"], "ready");
    cluster.run_probe("c", "node1", "128MiB", CALM);
    for name in ["a", "b", "c"] {
        cluster.wait_for_heartbeats(name, 1);
        guest::assert_unharmed(&cluster.logs(name));
    }
}

#[test]
fn what_cannot_leave_a_drained_node_is_named() {
    let Some(machine) = Machine::with_kvm("drain of a node with nowhere to go") else {
        return;
    };
    let cluster = Cluster::start(
        machine,
        &Shape {
            nodes: 2,
            node_memory: "512MiB",
            automatic: true,
            ..Shape::default()
        },
    );
    cluster.run_probe("big", "node1", "448MiB", "fill=384MiB");
    cluster.run_probe("other", "node2", "448MiB", "fill=384MiB");
    let refusal = cluster.shoal.fails(&["drain", "node1"]);
    assert_eq!(refusal.code, 1, "{refusal:?}");
    assert!(
        refusal.json["remaining"] == 1 && refusal.stderr.contains("big"),
        "{refusal:?}"
    );
    wait::until_true("both to go on", seconds(10), || {
        ["big", "other"]
            .iter()
            .all(|name| cluster.vm(name)["state"] == "running")
    });
}

#[test]
fn daemons_refuse_addresses_that_others_can_reach() {
    for daemon in ["scheduler", "agent"] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let output = Command::new(paths::program("shoal"))
            .args([daemon, "--listen", "0.0.0.0:0", "--state-dir"])
            .arg(dir.path())
            .output()
            .expect("shoal starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && stderr.contains("--insecure"),
            "{daemon}: {stderr}"
        );
    }
}
