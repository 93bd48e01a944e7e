//! VMMs that die in the middle of a migration.

use std::process::Command;

use shoal_proto::vm::MigrationResult;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};
use shoal_tests::{paths, vmm};

use crate::RESTLESS;

/// Sent when a migration is surely in the middle of its first pass.
const SOME: u64 = 64 << 20;

#[test]
fn the_source_goes_on_when_the_destination_vmm_dies_in_pre_copy() {
    let Some(machine) = Machine::with_kvm("death of the destination's VMM") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("busy", "node1", "512MiB", RESTLESS);
    let source = cluster.only_vmm(&vm);

    let migration = cluster.migrate_without_end("busy", "node2", seconds(120));
    migration.wait_until_sent(SOME, seconds(20));
    cluster.vmm_on(&vm, "node2").identity.kill().expect("killed");

    let report = migration.report();
    assert_eq!(report.result(), MigrationResult::Failed, "{report:?}");
    assert!(!report.reason.is_empty(), "the report must say why");
    let now = cluster.wait_for_state("busy", "running", seconds(20));
    assert_eq!((&now["node"], &now["epoch"]), (&"node1".into(), &1.into()));
    assert_eq!(
        cluster.only_vmm(&vm).identity,
        source.identity,
        "the same process must run it"
    );
    cluster.wait_for_heartbeats("busy", 2);

    let again = cluster
        .shoal
        .json(&["migrate", "busy", "--to", "node2", "--max-downtime", "2s"]);
    assert_eq!(again["result"], "completed", "{again}");
    assert_eq!(
        cluster.vm("busy")["epoch"],
        3,
        "the failed attempt used up epoch 2"
    );
    cluster.wait_for_heartbeats("busy", 2);
    guest::assert_unharmed(&cluster.logs("busy"));
}

#[test]
fn the_source_goes_on_when_the_destination_freezes_with_commit_in_its_hands() {
    let Some(machine) = Machine::with_kvm("a VMM that freezes at Commit") else {
        return;
    };
    let shape = Shape {
        fault: Some("destination.commit=hang"),
        ..Shape::default()
    };
    let cluster = Cluster::start(machine, &shape);
    let vm = cluster.run_probe("held", "node1", "128MiB", crate::CALM);
    let source = cluster.only_vmm(&vm);
    let shown = cluster.vm("held")["message"].clone();
    assert!(
        shown.as_str().is_some_and(|text| text.contains("FAULTS ARE ARMED") && text.contains("destination.commit=hang")),
        "{shown}"
    );

    std::thread::scope(|scope| {
        let migration = scope.spawn(|| cluster.shoal.fails(&["migrate", "held", "--to", "node2"]));
        wait::until_true("Commit to come to the destination", seconds(60), || {
            let destination = cluster.vmms(&vm).into_iter().find(|vmm| vmm.node == "node2");
            destination.is_some_and(|vmm| vmm.has_logged("FAULT: ") && vmm.freeze())
        });
        let failed = migration.join().expect("no panic");
        assert_eq!(failed.code, 1, "{failed:?}");
    });
    let now = cluster.wait_for_state("held", "running", seconds(60));
    assert_eq!((&now["node"], &now["epoch"]), (&"node1".into(), &1.into()));
    wait::until_true("the VMM that froze to be gone", seconds(60), || {
        cluster.vmms(&vm).len() == 1
    });
    assert_eq!(cluster.only_vmm(&vm).identity, source.identity);
    cluster.wait_for_heartbeats("held", 2);
    guest::assert_unharmed(&cluster.logs("held"));
}

#[test]
fn a_vmm_that_is_not_told_to_allow_faults_obeys_none() {
    let look = |more: &[&str]| {
        let kernel = vmm::probe_kernel();
        let output = Command::new(paths::program("shoal-vmm"))
            .args(more)
            .args(["check-image", "--kernel"])
            .arg(kernel)
            .env("SHOAL_FAULT", "nowhere=kill")
            .output()
            .expect("shoal-vmm starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    let (code, said) = look(&[]);
    assert!(
        code == Some(0) && said.contains("SHOAL_FAULT is set and not obeyed"),
        "{code:?}: {said}"
    );
    let (code, said) = look(&["--allow-faults"]);
    assert!(
        code == Some(2) && said.contains("nowhere=kill"),
        "{code:?}: {said}"
    );
}

#[test]
fn the_destination_cleans_up_when_the_source_vmm_dies_in_pre_copy() {
    let Some(machine) = Machine::with_kvm("death of the source's VMM") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("doomed", "node1", "512MiB", RESTLESS);

    let migration = cluster.migrate_without_end("doomed", "node2", seconds(120));
    migration.wait_until_sent(SOME, seconds(20));
    cluster.vmm_on(&vm, "node1").identity.kill().expect("killed");

    let failed = cluster.wait_for_state("doomed", "failed", seconds(60));
    assert!(
        !failed["message"].as_str().unwrap_or_default().is_empty(),
        "it must say why: {failed}"
    );
    wait::until_true("every VMM to be gone", seconds(20), || {
        cluster.vmms(&vm).is_empty()
    });
    let outcome = migration.outcome();
    let completed = outcome.as_ref().is_ok_and(|m| {
        m.report
            .as_ref()
            .is_some_and(|report| report.result() == MigrationResult::Completed)
    });
    assert!(!completed, "{outcome:?}");
    wait::until_true("both nodes to have their memory back", seconds(20), || {
        ["node1", "node2"].iter().all(|name| {
            let node = cluster.node(name);
            node["vms"] == 0 && node["memory_available_bytes"] == node["memory_bytes"]
        })
    });
}

#[test]
fn a_vm_whose_vmm_dies_is_reported_failed_with_what_is_known() {
    let Some(machine) = Machine::with_kvm("death of a VMM at rest") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("victim", "node1", "128MiB", crate::CALM);
    cluster.only_vmm(&vm).identity.kill().expect("killed");

    let failed = cluster.wait_for_state("victim", "failed", seconds(20));
    assert!(
        !failed["message"].as_str().unwrap_or_default().is_empty(),
        "{failed}"
    );
    let refusal = cluster.shoal.fails(&["migrate", "victim", "--to", "node2"]);
    assert_eq!(refusal.code, 1, "{refusal:?}");
    cluster.shoal.ok(&["rm", "victim"]);
    assert_eq!(cluster.shoal.json(&["ps", "--all"]), serde_json::json!([]));
}
