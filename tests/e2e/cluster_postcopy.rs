//! Post-copy in a cluster: who owns the VM, what may be done to it, and which daemons may die meanwhile.

use shoal_proto::vm::VmState;
use shoal_tests::cluster::{Cluster, Shape, assert_at_most_one_runs};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::moving::Moving;
use shoal_tests::wait::{self, seconds};

/// Writes faster than [`OUTRUN`] takes, and touches all of it within a second.
const FAST: &str = "fill=48MiB wss=48MiB rate=12000 pattern=random";
/// Takes seconds to touch all of its memory: what is not fetched for it hardly comes.
const SLOW: &str = "fill=48MiB wss=48MiB rate=1500 pattern=random";
const OUTRUN: [&str; 6] = [
    "--bandwidth",
    "24MiB",
    "--max-downtime",
    "5ms",
    "--on-stall",
    "post-copy",
];
/// In post-copy after its first pass, whatever the guest does.
const AT_ONCE: [&str; 8] = [
    "--bandwidth",
    "12MiB",
    "--max-downtime",
    "1ms",
    "--on-stall",
    "post-copy",
    "--timeout",
    "1ms",
];

#[test]
fn a_guest_that_outruns_the_link_ends_up_at_the_destination_and_the_report_says_how() {
    let Some(machine) = Machine::alone_with_kvm("post-copy in a cluster") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("fast", "node1", "96MiB", FAST);
    let report = Moving::start(&cluster.shoal, "fast", &OUTRUN).completes();
    assert_eq!(report["post_copy"], true, "{report}");
    for key in [
        "post_copy_ms",
        "post_copy_pages",
        "faults",
        "worst_fault_ms",
        "mean_fault_ms",
    ] {
        assert!(report[key].as_f64() > Some(0.0), "{key} in {report}");
    }
    assert!(
        report["mean_fault_ms"].as_f64() <= report["worst_fault_ms"].as_f64(),
        "{report}"
    );
    assert_eq!(
        (&report["recoveries"], &report["policy"]["on_stall"]),
        (&0.into(), &"post-copy".into()),
        "{report}"
    );
    assert_eq!(cluster.only_vmm(&vm).node, "node2");
    assert_eq!(cluster.events_of_kind("migration-post-copy").len(), 1);
    cluster.wait_for_heartbeats("fast", 2);
    guest::assert_unharmed(&cluster.logs("fast"));
}

#[test]
fn what_races_with_post_copy_waits_or_is_refused() {
    let Some(machine) = Machine::with_kvm("what races with post-copy") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("slow", "node1", "96MiB", SLOW);
    let mut moving = Moving::start(&cluster.shoal, "slow", &AT_ONCE);
    moving.hold_in_post_copy();
    let now = cluster.vm("slow");
    assert_eq!(
        (&now["node"], &now["epoch"], &now["state"]),
        (&"node2".into(), &2.into(), &"migrating".into()),
        "the destination owns it: {now}"
    );
    let message = cluster.shoal.json(&["inspect", "slow"])["message"].clone();
    assert!(
        message.as_str().is_some_and(|text| text.contains("node1")),
        "from where it fetches memory: {message}"
    );
    let late = moving.cancel_fails();
    assert!(
        late.code == 1 && late.stderr.contains("too late to cancel") && late.stderr.contains("node2"),
        "{late:?}"
    );
    for to in ["node1", "node2"] {
        let refusal = cluster.shoal.fails(&["migrate", "slow", "--to", to]);
        assert!(
            refusal.code == 1 && refusal.json["error"]["kind"] == "failed-precondition",
            "{refusal:?}"
        );
    }
    // Its old node has memory of it: that is not drained before all of it is fetched.
    let drain = cluster.shoal.start(&["drain", "node1"]);
    wait::until_true("the drain to begin", seconds(20), || {
        cluster.node("node1")["state"] == "draining"
    });
    assert!(
        cluster.vmms(&vm).iter().any(|vmm| vmm.node == "node1"),
        "its memory is still needed"
    );
    moving.set(&["--bandwidth", "0"]);
    let report = moving.completes();
    assert_eq!(report["post_copy"], true, "{report}");
    assert!(drain.wait_with_output().expect("it ends").status.success());
    cluster.shoal.ok(&["uncordon", "node1"]);
    assert_eq!(cluster.only_vmm(&vm).node, "node2");

    // Stopped in post-copy, it needs no more memory.
    let args = [&["--to", "node1"], &AT_ONCE[..]].concat();
    let mut moving = Moving::start(&cluster.shoal, "slow", &args);
    moving.hold_in_post_copy();
    assert_eq!(cluster.shoal.json(&["stop", "slow"])["state"], "exited");
    let report = moving.completes();
    assert!(report["post_copy"] == true || report["reason"] != "", "{report}");
    wait::until_true("both VMMs to be gone", seconds(20), || {
        cluster.vmms(&vm).is_empty()
    });
    guest::assert_unharmed(&cluster.logs("slow"));
}

#[test]
fn any_daemon_may_die_in_post_copy() {
    let Some(machine) = Machine::with_kvm("death of daemons in post-copy") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("slow", "node1", "96MiB", SLOW);
    for (victim, from, to) in [
        ("node1", "node1", "node2"),
        ("node1", "node2", "node1"),
        ("scheduler", "node1", "node2"),
    ] {
        let args = [&["--to", to], &AT_ONCE[..]].concat();
        let mut moving = Moving::start(&cluster.shoal, "slow", &args);
        moving.hold_in_post_copy();
        let source = cluster.vmm_on(&vm, from);
        cluster.kill_daemon(victim);
        assert_at_most_one_runs(&cluster.vmms(&vm));
        assert_eq!(
            source.state(),
            Some(VmState::PostCopy),
            "it goes on without {victim}"
        );
        cluster.start_daemon(victim);
        let shown = wait::until("the migration to be known again", seconds(60), || {
            let listed = cluster
                .shoal
                .json(&["migrations", "--vm", "slow", "--limit", "1"]);
            assert_eq!(listed[0]["to"], to, "{listed}");
            let progress = &listed[0]["progress"];
            (listed[0]["result"] != "running" || progress["phase"] == "post-copy").then(|| listed[0].clone())
        });
        if shown["result"] == "running" {
            // It may end in between.
            let speed_up = ["migrations", "set", "slow", "--bandwidth", "0"];
            wait::until_true("it to be sped up", seconds(60), || {
                cluster.shoal.output(&speed_up).status.success()
                    || cluster.shoal.json(&["migrations", "--running"]) == serde_json::json!([])
            });
        }
        let now = cluster.wait_for_state("slow", "running", seconds(90));
        assert_eq!(now["node"], to, "{now}");
        if victim != "scheduler" {
            let report = moving.completes();
            assert_eq!(report["post_copy"], true, "{report}");
        }
        let vmm = cluster.only_vmm(&vm);
        assert_eq!((vmm.node.as_str(), vmm.state()), (to, Some(VmState::Running)));
        let last = &cluster
            .shoal
            .json(&["migrations", "--vm", "slow", "--limit", "1"])[0];
        assert_eq!(
            (&last["result"], &last["to"], &last["post_copy"]),
            (&"completed".into(), &to.into(), &true.into()),
            "{last}"
        );
        cluster.wait_for_heartbeats("slow", 2);
        guest::assert_unharmed(&cluster.logs("slow"));
    }
}
