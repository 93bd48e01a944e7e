//! Migrations that go well.

use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::wait::seconds;

use crate::CALM;

#[test]
fn a_busy_probe_is_moved_twenty_times_and_never_notices() {
    let Some(machine) = Machine::with_kvm("twenty moves of a busy probe") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let args = "fill=512MiB wss=512MiB rate=20000 pattern=random";
    let vm = cluster.run_probe("busy", "node1", "640MiB", args);

    for round in 1..=20 {
        let (from, to) = if round % 2 == 1 {
            ("node1", "node2")
        } else {
            ("node2", "node1")
        };
        let report = cluster.shoal.json(&["migrate", "busy", "--to", to]);
        assert_eq!(report["result"], "completed", "{report}");
        assert_eq!((&report["from"], &report["to"]), (&from.into(), &to.into()));

        let now = cluster.vm("busy");
        assert_eq!(
            (&now["state"], &now["node"], &now["epoch"]),
            (&"running".into(), &to.into(), &(1 + round).into())
        );
        let vmm = cluster.only_vmm(&vm);
        assert_eq!((vmm.node.as_str(), vmm.epoch), (to, 1 + round));
        cluster.wait_for_heartbeats("busy", 1);
        let last = guest::heartbeats(&cluster.logs("busy"))
            .pop()
            .expect("a heartbeat");
        assert_eq!(last.corrupt, 0, "after move {round}: {last:?}");
    }
    guest::assert_unharmed(&cluster.logs("busy"));
}

#[test]
fn the_scheduler_chooses_where_to_if_the_user_does_not() {
    let Some(machine) = Machine::with_kvm("a move to a node of the scheduler's choice") else {
        return;
    };
    let cluster = Cluster::start(
        machine,
        &Shape {
            nodes: 3,
            ..Shape::default()
        },
    );
    cluster.run_probe("here", "node1", "128MiB", CALM);
    cluster.run_probe("there", "node2", "1GiB", "fill=768MiB");

    let report = cluster
        .shoal
        .json(&["migrate", "here", "--max-downtime", "500ms", "--timeout", "1m"]);
    assert_eq!(
        (&report["result"], &report["to"]),
        (&"completed".into(), &"node3".into()),
        "{report}"
    );
    for key in ["downtime_ms", "total_ms", "passes", "bytes_sent", "pages_sent"] {
        assert!(
            report[key].as_f64().is_some_and(|figure| figure > 0.0),
            "{key} in {report}"
        );
    }
    assert!(
        report["zero_pages"].is_u64() && report["vm"] == "here" && report["reason"].is_string(),
        "{report}"
    );
    let history = &cluster.shoal.json(&["inspect", "here"])["migrations"];
    assert_eq!(history[0]["result"], "completed", "{history}");
}

#[test]
fn a_guest_that_ends_while_it_is_moved_is_seen_to_have_ended() {
    let Some(machine) = Machine::with_kvm("a guest that ends in the middle of a move") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let args = "fill=256MiB wss=256MiB rate=60000 pattern=random seconds=8 status=9";
    let vm = cluster.run_probe("short", "node1", "384MiB", args);
    let migration = cluster.migrate_without_end("short", "node2", seconds(120));
    migration.wait_until_sent(32 << 20, seconds(20));

    let ended = cluster.wait_for_state("short", "exited", seconds(60));
    assert_eq!(ended["exit_status"], 9, "{ended}");
    assert_ne!(
        migration.report().result(),
        shoal_proto::vm::MigrationResult::Completed
    );
    shoal_tests::wait::until_true("every VMM to be gone", seconds(20), || {
        cluster.vmms(&vm).is_empty()
    });
}
