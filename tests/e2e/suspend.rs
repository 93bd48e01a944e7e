//! A VM's vCPUs are stopped, and run on unharmed, where it was or where it has been moved meanwhile.

use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest::{self, last_word as word};
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};

use crate::CALM;

fn beats(cluster: &Cluster) -> usize {
    guest::heartbeats(&cluster.logs("sleepy")).len()
}

/// Console bytes that were on their way when the vCPUs stopped are there; answers how many heartbeats that makes.
fn settled(cluster: &Cluster) -> usize {
    let mut seen = beats(cluster);
    let mut same = 0;
    wait::until_true("heartbeats to stop", seconds(60), || {
        let now = beats(cluster);
        same = if now == seen { same + 1 } else { 0 };
        seen = now;
        same >= 20
    });
    seen
}

#[test]
fn a_suspended_guest_stands_still_also_when_it_is_moved_and_goes_on_unharmed() {
    let Some(machine) = Machine::with_kvm("suspend and resume of a probe") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let id = cluster.run_probe("sleepy", "node1", "128MiB", CALM);
    cluster.wait_for_heartbeats("sleepy", 2);
    let suspended = cluster.shoal.json(&["suspend", "sleepy", "--reason", "a test"]);
    assert_eq!(suspended[0]["state"], "suspended", "{suspended}");
    let stopped_at = settled(&cluster);
    let before = cluster.logs("sleepy");
    let again = cluster.shoal.json(&["suspend", "sleepy"]);
    assert_eq!(again[0]["suspended"]["reason"], "asked for by a user: a test");

    let moved = cluster
        .shoal
        .json(&["migrate", "sleepy", "--to", "node2", "--verify"]);
    assert_eq!(
        (&moved["result"], &moved["suspended"], &moved["downtime_ms"]),
        (&"completed".into(), &true.into(), &0.0.into()),
        "{moved}"
    );
    let there = cluster.vm("sleepy");
    assert_eq!(
        (&there["state"], &there["node"], &there["epoch"]),
        (&"suspended".into(), &"node2".into(), &2.into()),
        "{there}"
    );
    // To a new VMM on its node, too.
    let within = cluster.shoal.json(&["migrate", "sleepy", "--to", "node2"]);
    assert_eq!(
        (&within["result"], &within["suspended"]),
        (&"completed".into(), &true.into()),
        "{within}"
    );
    let vmm = cluster.only_vmm(&id);
    assert_eq!((vmm.node.as_str(), vmm.epoch), ("node2", 3));

    // Neither a new agent nor a new scheduler lets it run.
    for daemon in ["node2", "scheduler"] {
        cluster.kill_daemon(daemon);
        cluster.start_daemon(daemon);
        cluster.wait_for_state("sleepy", "suspended", seconds(60));
    }
    wait::never("it should not run", seconds(5), || {
        let now = beats(&cluster);
        (now != stopped_at || cluster.vm("sleepy")["state"] != "suspended").then_some(now)
    });
    assert_eq!(cluster.only_vmm(&id), vmm, "in the same process");

    let resumed = cluster.shoal.json(&["resume", "sleepy"]);
    assert_eq!(
        (&resumed[0]["state"], &resumed[0]["suspended"]),
        (&"running".into(), &serde_json::Value::Null),
        "{resumed}"
    );
    cluster.wait_for_heartbeats("sleepy", 3);
    let after = cluster.logs("sleepy");
    guest::assert_unharmed(&after);
    assert_eq!(word(&after, "tsc_backwards"), 0);
    assert_eq!(word(&after, "clock_backwards"), 0);
    // It was still for the five seconds above, and its clocks have gone on meanwhile.
    for clock in ["uptime_ms", "clock_ms"] {
        assert!(word(&after, clock) - word(&before, clock) >= 5000, "{after}");
    }
    assert!(
        word(&after, "stops") > word(&before, "stops"),
        "the guest is told that it was stopped: {}",
        guest::tail(&after)
    );

    cluster.shoal.ok(&["suspend", "sleepy"]);
    let stopped_at = settled(&cluster);
    cluster.shoal.ok(&["drain", "node2"]);
    let drained = cluster.vm("sleepy");
    assert_eq!(
        (&drained["state"], &drained["node"]),
        (&"suspended".into(), &"node1".into()),
        "{drained}"
    );
    assert_eq!(settled(&cluster), stopped_at, "it ran on its way");
    cluster.shoal.ok(&["stop", "sleepy"]);
    assert_eq!(cluster.vm("sleepy")["state"], "exited");
    let kinds = |kind: &str| cluster.events_of_kind(kind).len();
    assert_eq!((kinds("vm-suspended"), kinds("vm-resumed")), (2, 1));
}

#[test]
fn a_guest_is_suspended_when_no_node_has_memory_left_and_resumed_when_one_has() {
    let Some(machine) = Machine::with_kvm("suspending as the last resort") else {
        return;
    };
    let shape = Shape {
        nodes: 1,
        node_memory: "1GiB",
        node_cpus: 32,
        automatic: true,
        ..Shape::default()
    };
    let cluster = Cluster::start(machine, &shape);
    // Guests that do not grow gain nothing by being suspended, whatever their priority.
    for name in ["steady", "filled"] {
        cluster.run_probe(
            name,
            "node1",
            "320MiB",
            "fill=290MiB wss=4MiB rate=100 pattern=random",
        );
    }
    let grows = "fill=400MiB fill_rate=10MiB wss=4MiB rate=100 pattern=random";
    cluster.start_probe("batch", "node1", "416MiB", grows);

    let suspended = cluster.wait_for_state("batch", "suspended", seconds(180));
    let why = suspended["suspended"]["reason"].as_str().unwrap_or_default();
    assert!(
        why.contains("of 1 GiB") && why.contains("'batch' (priority 5)"),
        "it must say why: {suspended}"
    );
    let stuck = cluster.events_of_kind("plan-stuck");
    assert!(!stuck.is_empty(), "{:#?}", cluster.events());
    cluster.wait_for_heartbeats("filled", 2);
    assert_eq!(cluster.vm("batch")["state"], "suspended", "there is no room yet");

    cluster.shoal.ok(&["stop", "steady"]);
    cluster.wait_for_state("batch", "running", seconds(120));
    let resumed = cluster.events_of_kind("vm-resumed");
    assert!(
        resumed.iter().any(|event| event["vm"] == "batch"),
        "{:#?}",
        cluster.events()
    );
    wait::until_true("it to fill its memory", seconds(180), || {
        guest::heartbeats(&cluster.logs("batch"))
            .last()
            .is_some_and(|beat| beat.filled >= 400 << 20)
    });
    for name in ["batch", "filled"] {
        guest::assert_unharmed(&cluster.logs(name));
    }
}
