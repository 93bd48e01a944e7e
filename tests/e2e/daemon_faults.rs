//! Agents and schedulers that die and come back.

use shoal_proto::vm::{MigrationResult, VmState};
use shoal_tests::cluster::{Cluster, Shape, assert_at_most_one_runs};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};

use crate::{CALM, RESTLESS};

#[test]
fn vms_go_on_without_their_agent_and_the_next_one_adopts_them() {
    let Some(machine) = Machine::with_kvm("death of an agent") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("steady", "node1", "128MiB", CALM);
    let before = cluster.only_vmm(&vm);

    cluster.kill_daemon("node1");
    cluster.wait_for_state("steady", "unknown", seconds(30));
    assert_eq!(cluster.node("node1")["state"], "unreachable");
    assert_eq!(cluster.only_vmm(&vm), before);

    cluster.start_daemon("node1");
    let now = cluster.wait_for_state("steady", "running", seconds(30));
    assert_eq!((&now["node"], &now["epoch"]), (&"node1".into(), &1.into()));
    assert_eq!(cluster.only_vmm(&vm), before, "the same process must run it");
    cluster.wait_for_heartbeats("steady", 2);
    let report = cluster.shoal.json(&["migrate", "steady", "--to", "node2"]);
    assert_eq!(report["result"], "completed", "{report}");
    cluster.wait_for_heartbeats("steady", 2);
    guest::assert_unharmed(&cluster.logs("steady"));
}

#[test]
fn a_node_that_was_declared_lost_gives_up_its_vms_and_ends_them_when_it_comes_back() {
    let Some(machine) = Machine::with_kvm("a host that is lost, as an operator believes") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let first = cluster.run_probe("steady", "node1", "128MiB", CALM);
    let refused = |cluster: &Cluster, args: &[&str], code: i32, words: &str| {
        let output = cluster.shoal.output(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
    };
    for lost in [
        &["node", "lost", "node1"][..],
        &["node", "lost", "node1", "--yes"],
    ] {
        refused(&cluster, lost, 1, "node1 reports");
    }
    refused(&cluster, &["node", "rm", "node1"], 1, "is connected");

    // The host is cut off, and its VM runs on.
    let before = cluster.node("node1");
    cluster.kill_daemon("node1");
    cluster.wait_for_state("steady", "unknown", seconds(30));
    let advice = "`shoal node lost node1`";
    refused(&cluster, &["migrate", "steady", "--to", "node2"], 1, advice);
    refused(&cluster, &["rm", "steady"], 1, advice);
    refused(&cluster, &["node", "rm", "node1"], 1, advice);
    refused(&cluster, &["stop", "steady"], 1, advice);
    refused(
        &cluster,
        &["node", "lost", "node1"],
        2,
        "Its VMs (steady) have failed then",
    );
    let lost = cluster.shoal.json(&["node", "lost", "node1", "--yes"]);
    assert_eq!(lost["failed_vms"][0], "steady", "{lost}");
    let vm = cluster.vm("steady");
    assert_eq!(
        (&vm["state"], &vm["message"]),
        (&"failed".into(), &"node node1 was declared lost".into())
    );
    assert_eq!(cluster.node("node1")["state"], "lost");
    let old = cluster.only_vmm(&first);

    // Its name is free.
    cluster.shoal.ok(&["rm", "steady"]);
    let second = cluster.run_probe("steady", "node2", "128MiB", CALM);
    assert!(old.identity.is_running(), "nobody could end it yet");
    cluster.start_daemon("node1");
    cluster.wait_for_return(&before);
    assert!(
        !old.identity.is_running(),
        "it had to end before its node was ready"
    );
    assert_eq!(cluster.vmms(&first), []);
    assert_eq!(cluster.events_of_kind("node-returned").len(), 1);
    assert_eq!(cluster.only_vmm(&second).node, "node2");
    cluster.wait_for_heartbeats("steady", 2);
    guest::assert_unharmed(&cluster.logs("steady"));

    // An empty node that is not connected can be removed.
    cluster.kill_daemon("node1");
    wait::until_true("its connection to be gone", seconds(30), || {
        cluster.shoal.output(&["node", "rm", "node1"]).status.success()
    });
    let nodes = cluster.shoal.json(&["nodes"]);
    assert_eq!(nodes.as_array().map(Vec::len), Some(1), "{nodes}");
}

#[test]
fn a_vm_stays_at_its_source_when_the_node_that_it_moves_to_is_declared_lost() {
    let Some(machine) = Machine::with_kvm("a destination that is lost in the middle of a move") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("busy", "node1", "512MiB", RESTLESS);
    let source = cluster.only_vmm(&vm);
    let before = cluster.node("node2");
    let migration = cluster.migrate_without_end("busy", "node2", seconds(60));
    migration.wait_until_sent(64 << 20, seconds(20));

    // The scheduler hears nothing of it any more, while the two VMMs go on.
    cluster.kill_daemon("node2");
    wait::until_true("it to be believed", seconds(30), || {
        let output = cluster.shoal.output(&["node", "lost", "node2", "--yes"]);
        output.status.success()
    });
    let report = migration.report();
    assert_eq!(report.result(), MigrationResult::Cancelled, "{report:?}");
    assert_eq!(report.reason, "node node2 was declared lost");
    assert_eq!(
        cluster.wait_for_state("busy", "running", seconds(20))["node"],
        "node1"
    );

    cluster.start_daemon("node2");
    cluster.wait_for_return(&before);
    assert_eq!(cluster.only_vmm(&vm), source);
    let report = cluster
        .shoal
        .json(&["migrate", "busy", "--to", "node2", "--max-downtime", "2s"]);
    assert_eq!(report["result"], "completed", "{report}");
    cluster.wait_for_heartbeats("busy", 2);
    guest::assert_unharmed(&cluster.logs("busy"));
}

#[test]
fn a_migration_outlives_the_agents_of_both_nodes() {
    let Some(machine) = Machine::with_kvm("death of agents in the middle of a move") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("busy", "node1", "512MiB", RESTLESS);
    let source = cluster.only_vmm(&vm);

    for victim in ["node1", "node2"] {
        let migration = cluster.migrate_without_end("busy", "node2", seconds(15));
        migration.wait_until_sent(64 << 20, seconds(20));
        cluster.kill_daemon(victim);
        assert_eq!(
            source.state(),
            Some(VmState::Migrating),
            "the migration goes on without {victim}'s agent"
        );
        assert_at_most_one_runs(&cluster.vmms(&vm));
        cluster.start_daemon(victim);

        let report = migration.report();
        assert_eq!(
            report.result(),
            MigrationResult::Failed,
            "its own time ran out, nothing else: {report:?}"
        );
        assert_eq!(
            cluster.wait_for_state("busy", "running", seconds(20))["node"],
            "node1"
        );
        assert_eq!(cluster.only_vmm(&vm), source);
        cluster.wait_for_heartbeats("busy", 1);
    }
    let report = cluster
        .shoal
        .json(&["migrate", "busy", "--to", "node2", "--max-downtime", "2s"]);
    assert_eq!(report["result"], "completed", "{report}");
    cluster.wait_for_heartbeats("busy", 2);
    guest::assert_unharmed(&cluster.logs("busy"));
}

#[test]
fn the_scheduler_may_die_at_any_time_of_a_migration() {
    let Some(machine) = Machine::with_kvm("death of the scheduler in the middle of moves") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe(
        "busy",
        "node1",
        "512MiB",
        "fill=256MiB wss=64MiB rate=5000 pattern=random",
    );

    for sent in [0, 1, 32, 128, 200, 256] {
        let from = cluster.vm("busy")["node"].as_str().expect("a node").to_owned();
        let to = if from == "node1" { "node2" } else { "node1" };
        let migration = cluster.migrate("busy", to);
        wait::until_true("a moment of the migration", seconds(30), || {
            migration.progress().bytes_sent >= sent << 20 || migration.has_ended()
        });
        cluster.kill_daemon("scheduler");
        assert_at_most_one_runs(&cluster.vmms(&vm));
        cluster.start_daemon("scheduler");

        let now = cluster.wait_for_state("busy", "running", seconds(60));
        let vmm = cluster.only_vmm(&vm);
        assert_eq!(
            (&now["node"], &now["epoch"]),
            (&vmm.node.clone().into(), &vmm.epoch.into()),
            "{now}"
        );
        assert_eq!(vmm.state(), Some(VmState::Running));
        cluster.wait_for_heartbeats("busy", 1);
    }
    guest::assert_unharmed(&cluster.logs("busy"));
}
