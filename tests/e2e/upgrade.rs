//! `shoal upgrade`: every VM of a node gets a new VMM on that node.

use serde_json::Value;
use shoal_tests::cluster::{Cluster, Shape, VmmProcess};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};

use crate::CALM;

#[test]
fn every_vm_of_a_node_gets_a_new_vmm_there_and_shared_memory_is_not_copied() {
    let Some(machine) = Machine::with_kvm("an upgrade of a node") else {
        return;
    };
    let shape = Shape {
        node_memory: "512MiB",
        up: &["--memory-backing", "shared"],
        ..Shape::default()
    };
    let mut cluster = Cluster::start(machine, &shape);
    let names = ["a", "b"];
    let vms = names.map(|name| cluster.run_probe(name, "node1", "96MiB", CALM));
    let elsewhere = cluster.run_probe("elsewhere", "node2", "96MiB", CALM);
    let old: Vec<VmmProcess> = vms.iter().map(|vm| cluster.only_vmm(vm)).collect();
    let not_touched = cluster.only_vmm(&elsewhere);

    cluster.shoal.ok(&["suspend", "b"]);

    let upgraded = cluster.shoal.json(&["upgrade", "node1", "--parallel", "2"]);
    assert_eq!(
        (&upgraded["node"], &upgraded["upgraded"], &upgraded["left"]),
        (&"node1".into(), &2.into(), &Value::Array(vec![])),
        "{upgraded}"
    );
    let migrations = upgraded["migrations"].as_array().expect("a list");
    assert_eq!(migrations.len(), 2, "{upgraded}");
    for migration in migrations {
        assert_eq!(
            (&migration["from"], &migration["to"], &migration["epoch"]),
            (&"node1".into(), &"node1".into(), &2.into())
        );
        assert_eq!(migration["handed_over"], true, "{migration}");
        assert_eq!(migration["pages_sent"], 0, "nothing is copied: {migration}");
        let suspended = migration["vm"] == "b";
        assert_eq!(migration["suspended"], suspended, "{migration}");
        assert!(
            suspended || migration["downtime_ms"].as_f64() > Some(0.0),
            "{migration}"
        );
        let reason = migration["requested_because"].as_str().expect("text");
        assert!(reason.contains("its memory is handed over"), "{reason}");
    }
    assert_eq!(cluster.vm("b")["state"], "suspended");
    cluster.shoal.ok(&["resume", "b"]);
    for (vm, old) in vms.iter().zip(&old) {
        runs_in_a_new_vmm(&cluster, vm, old);
    }
    assert_eq!(cluster.only_vmm(&elsewhere), not_touched);
    let text = cluster.shoal.ok(&["upgrade", "node2"]);
    assert!(text.contains("node2: 1 VMs run in new VMMs"), "{text}");

    // A VM that was handed over can be moved like any, and an agent that was replaced knows it.
    let before = cluster.node("node1");
    cluster.kill_daemon("node1");
    cluster.start_daemon("node1");
    cluster.wait_for_return(&before);
    cluster.wait_for_state("a", "running", seconds(30));
    let report = cluster.shoal.json(&["migrate", "a", "--to", "node2"]);
    assert_eq!(
        (&report["result"], &report["handed_over"], &report["tls"]),
        (&"completed".into(), &false.into(), &true.into()),
        "{report}"
    );
    for name in ["a", "b", "elsewhere"] {
        cluster.wait_for_heartbeats(name, 1);
        guest::assert_unharmed(&cluster.logs(name));
    }
}

#[test]
fn memory_that_cannot_be_handed_over_is_copied_where_there_is_room_for_it() {
    let Some(machine) = Machine::with_kvm("an upgrade of a node without shared memory") else {
        return;
    };
    let shape = Shape {
        node_memory: "256MiB",
        up: &["--memory-backing", "anonymous"],
        ..Shape::default()
    };
    let cluster = Cluster::start(machine, &shape);
    let vm = cluster.run_probe("a", "node1", "96MiB", CALM);
    let old = cluster.only_vmm(&vm);
    let upgraded = cluster.shoal.json(&["upgrade", "node1"]);
    let migration = &upgraded["migrations"][0];
    assert_eq!(
        (&migration["result"], &migration["handed_over"], &migration["to"]),
        (&"completed".into(), &false.into(), &"node1".into()),
        "{upgraded}"
    );
    assert!(
        migration["pages_sent"].as_u64() >= Some((64 << 20) / 4096) && migration["tls"] == false,
        "{migration}"
    );
    runs_in_a_new_vmm(&cluster, &vm, &old);
    cluster.wait_for_heartbeats("a", 1);
    guest::assert_unharmed(&cluster.logs("a"));

    let nowhere = cluster.shoal.fails(&["upgrade", "node9"]);
    assert_eq!(
        (nowhere.code, &nowhere.json["error"]["kind"]),
        (1, &"not-found".into()),
        "{nowhere:?}"
    );
    let large = cluster.run_probe("large", "node2", "192MiB", "fill=160MiB");
    let old = cluster.only_vmm(&large);
    // Until its node has reported how much it holds, less is expected of it.
    wait::until_true("node2 to report what was filled", seconds(20), || {
        let node = cluster.node("node2");
        let bytes = |key: &str| node[key].as_u64().expect("a size");
        bytes("memory_available_bytes") + (160 << 20) <= bytes("memory_bytes")
    });
    let refused = cluster.shoal.fails(&["upgrade", "node2"]);
    let left = &refused.json["left"][0];
    assert_eq!(left["vm"], "large", "{refused:?}");
    let why = left["reason"].as_str().unwrap_or_default();
    assert!(why.contains("does not fit on node2"), "{refused:?}");
    assert_eq!(
        (refused.code, &refused.json["upgraded"]),
        (1, &0.into()),
        "{refused:?}"
    );
    assert_eq!(cluster.only_vmm(&large), old, "it stays as it was");
    cluster.wait_for_heartbeats("large", 1);
    guest::assert_unharmed(&cluster.logs("large"));
}

fn runs_in_a_new_vmm(cluster: &Cluster, vm: &str, old: &VmmProcess) {
    let new = cluster.only_vmm(vm);
    assert_eq!((&new.node, new.epoch), (&old.node, old.epoch + 1));
    assert_ne!(new.identity, old.identity);
    let now = cluster.vm(vm);
    assert_eq!(
        (&now["state"], &now["epoch"]),
        (&"running".into(), &new.epoch.into()),
        "{now}"
    );
    cluster.wait_for_heartbeats(vm, 1);
    guest::assert_unharmed(&cluster.logs(vm));
}
