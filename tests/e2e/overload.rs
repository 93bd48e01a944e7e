//! Ushering: a node that would run out of memory is relieved in time.

use std::collections::BTreeSet;

use serde_json::Value;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};

const THRESHOLD: f64 = 0.90;
const NODES: [&str; 3] = ["node1", "node2", "node3"];
const VMS: [&str; 4] = ["a", "b", "c", "d"];

#[test]
fn vms_are_moved_before_their_node_runs_out_of_memory() {
    let Some(machine) = Machine::with_kvm("overload of a node") else {
        return;
    };
    let cluster = Cluster::start(
        machine,
        &Shape {
            nodes: 3,
            node_memory: "1GiB",
            node_cpus: 32,
            automatic: true,
            ..Shape::default()
        },
    );
    for name in VMS {
        let args = "fill=320MiB fill_rate=12MiB wss=16MiB rate=500 pattern=random";
        cluster.start_probe(name, "node1", "384MiB", args);
    }

    let mut worst = 0.0_f64;
    wait::until_true("every VM to have filled its memory", seconds(120), || {
        worst = worst.max(usage(&cluster.node("node1")));
        assert!(
            worst < THRESHOLD,
            "node1 came to {worst:.3} of its memory\n{:#?}",
            cluster.events()
        );
        VMS.iter().all(|name| {
            guest::heartbeats(&cluster.logs(name))
                .last()
                .is_some_and(|beat| beat.filled >= 320 << 20)
        })
    });

    wait::until_true("every node to be below its threshold", seconds(60), || {
        NODES.iter().all(|name| usage(&cluster.node(name)) < THRESHOLD)
    });
    wait::until_true("moves to end", seconds(60), || {
        VMS.iter().all(|name| cluster.vm(name)["state"] == "running")
    });
    let moves = cluster.events_of_kind("migration-planned");
    assert!(!moves.is_empty(), "{:#?}", cluster.events());
    for planned in &moves {
        let reason = planned["message"].as_str().unwrap_or_default();
        assert!(
            reason.contains("MiB of 1 GiB") || reason.contains("% of 1 GiB"),
            "it must say how full: {planned}"
        );
    }
    let ushered = moves
        .iter()
        .any(|planned| planned["message"].as_str().is_some_and(|m| m.contains("usher:")));
    assert!(ushered, "memory must be a reason: {moves:#?}");
    wait::never("nothing should move any more", seconds(20), || {
        let now = cluster.events_of_kind("migration-planned");
        (now.len() > moves.len()).then(|| now[moves.len()..].to_vec())
    });

    let homes: BTreeSet<String> = VMS
        .iter()
        .map(|name| cluster.vm(name)["node"].to_string())
        .collect();
    assert!(homes.len() > 1, "they must not all be on one node");
    for name in VMS {
        cluster.wait_for_heartbeats(name, 1);
        guest::assert_unharmed(&cluster.logs(name));
    }
}

fn usage(node: &Value) -> f64 {
    let bytes = |key: &str| node[key].as_f64().expect("a number");
    1.0 - bytes("memory_available_bytes") / bytes("memory_bytes")
}
