//! Migrations that are cancelled, changed and capped while they run, and what may be done to a VM meanwhile.

use serde_json::Value;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::moving::Moving;
use shoal_tests::wait::{self, seconds};

use crate::CALM;

const MIB: u64 = 1 << 20;
/// Its 64 MiB take longer than any of these tests needs to get hold of it.
const SLOWLY: [&str; 4] = ["--to", "node2", "--bandwidth", "2MiB"];
/// Writes more than 24 MiB a second.
const FAST: &str = "fill=48MiB wss=48MiB rate=12000 pattern=random";

#[test]
fn a_migration_is_cancelled_in_the_middle_and_the_vm_goes_on_where_it_was() {
    let Some(machine) = Machine::alone_with_kvm("cancelling a migration") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("a", "node1", "96MiB", CALM);
    let source = cluster.only_vmm(&vm);
    refuses_to_cancel(&cluster, "a", "failed-precondition", "is not being migrated");
    refuses_to_cancel(&cluster, "nobody", "not-found", "nobody");

    let mut moving = Moving::start(&cluster.shoal, "a", &SLOWLY);
    let now = moving.wait_until_sent(2 * MIB)["progress"].clone();
    let sent = now["bytes_sent"].as_u64().expect("a number");
    assert!(
        sent < 16 * MIB,
        "progress is told as pages go out, not in leaps: {now}"
    );
    let destination = cluster.vmm_on(&vm, "node2");
    let cancelled = moving.cancel();
    assert_eq!(
        (&cancelled["result"], &cancelled["vm"]),
        (&"cancelled".into(), &"a".into()),
        "{cancelled}"
    );
    assert!(
        !destination.identity.is_running(),
        "the destination is gone by then"
    );
    assert_eq!(
        cluster.vmms(&vm),
        std::slice::from_ref(&source),
        "the same process runs it"
    );
    let ended = moving.end();
    assert_eq!((ended.code, &ended.report), (1, &cancelled), "{ended:?}");
    assert!(ended.stderr.contains("cancelled"), "{ended:?}");
    assert!(
        cancelled["bytes_sent"].as_u64() >= Some(sent),
        "what was sent is not forgotten: {cancelled}"
    );
    let now = cluster.vm("a");
    assert_eq!(
        (&now["state"], &now["node"], &now["epoch"]),
        (&"running".into(), &"node1".into(), &1.into())
    );
    refuses_to_cancel(&cluster, "a", "failed-precondition", "is not being migrated");

    cluster.wait_for_heartbeats("a", 1);
    let report = cluster.shoal.json(&["migrate", "a", "--to", "node2"]);
    assert_eq!(
        (&report["result"], &report["epoch"]),
        (&"completed".into(), &3.into())
    );
    refuses_to_cancel(&cluster, "a", "failed-precondition", "is not being migrated");
    cluster.wait_for_heartbeats("a", 1);
    guest::assert_unharmed(&cluster.logs("a"));
}

fn refuses_to_cancel(cluster: &Cluster, vm: &str, kind: &str, words: &str) {
    let refusal = cluster.shoal.fails(&["migrations", "cancel", vm]);
    assert_eq!(
        (refusal.code, &refusal.json["error"]["kind"]),
        (1, &kind.into()),
        "{refusal:?}"
    );
    assert!(refusal.stderr.contains(words), "{refusal:?}");
}

#[test]
fn the_timeout_cuts_a_pass_short_where_the_policy_goes_on() {
    let Some(machine) = Machine::with_kvm("a timeout in the middle of a pass") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    for (vm, on_stall) in [("fetched", "post-copy"), ("forced", "force")] {
        cluster.run_probe(vm, "node1", "96MiB", CALM);
        // Its first pass would take 8 s, and the guest writes hardly anything meanwhile.
        let report = Moving::start(
            &cluster.shoal,
            vm,
            &[
                "--to",
                "node2",
                "--bandwidth",
                "8MiB",
                "--timeout",
                "1s",
                "--on-stall",
                on_stall,
            ],
        )
        .completes();
        let left = if on_stall == "post-copy" {
            report["post_copy_pages"].as_u64()
        } else {
            let id = report["id"].as_str().expect("an id");
            let shown = cluster.shoal.json(&["migrations", "show", id]);
            let last = shown["pass_table"].as_array().and_then(|passes| passes.last());
            last.and_then(|pass| pass["pages"].as_u64())
        };
        assert!(
            left > Some(32 * MIB / 4096),
            "half of it at least: {left:?}, {report}"
        );
        cluster.wait_for_heartbeats(vm, 2);
        guest::assert_unharmed(&cluster.logs(vm));
    }
}

#[test]
fn a_slow_migration_is_sped_up_and_one_that_stalls_is_told_what_to_do() {
    let Some(machine) = Machine::alone_with_kvm("changing a migration while it runs") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    cluster.run_probe("slow", "node1", "96MiB", CALM);
    let mut moving = Moving::start(&cluster.shoal, "slow", &SLOWLY);
    moving.wait_until_sent(2 * MIB);
    let set = |args: &[&str], code: i32, words: &str| {
        let refusal = cluster.shoal.fails(&[&["migrations", "set"], args].concat());
        assert!(
            refusal.code == code && refusal.stderr.contains(words),
            "{args:?}: {refusal:?}"
        );
    };
    set(&["slow"], 2, "nothing to set");
    set(&["slow", "--bandwidth", "lots"], 2, "lots");
    set(
        &["slow", "--bandwidth", "1KiB"],
        1,
        "bandwidth_bytes_per_second: ",
    );
    set(&["slow", "--priority", "10"], 2, "10");
    set(&["slow", "--max-downtime", "0s"], 2, "0s");
    set(&["slow", "--timeout", "1000days"], 1, "timeout_ms: ");
    set(&["slow", "--on-stall", "hope"], 2, "hope");
    set(&["slow", "--verify"], 2, "--verify");
    set(&["nobody", "--priority", "1"], 1, "nobody");
    let was = moving.now().expect("it goes on")["policy"].clone();
    assert_eq!(
        was["bandwidth_bytes_per_second"],
        2 * MIB,
        "what is refused changes nothing"
    );

    let policy = moving.set(&["--bandwidth", "0", "--max-downtime", "200ms", "--priority", "9"]);
    let report = moving.completes();
    assert_eq!(report["policy"], policy, "as it held at the end");
    for (key, value) in [
        ("bandwidth_bytes_per_second", 0),
        ("max_downtime_ms", 200),
        ("priority", 9),
    ] {
        assert_eq!(policy[key], value, "{policy}");
    }
    set(&["slow", "--bandwidth", "1GiB"], 1, "is not being migrated");
    cluster.wait_for_heartbeats("slow", 1);
    guest::assert_unharmed(&cluster.logs("slow"));

    cluster.run_probe("fast", "node1", "96MiB", FAST);
    let args = ["--to", "node2", "--bandwidth", "24MiB", "--max-downtime", "5ms"];
    let mut moving = Moving::start(&cluster.shoal, "fast", &args);
    moving.wait_for("a pass that gains nothing", |now| {
        now["progress"]["pass"].as_u64() > Some(2)
    });
    moving.set(&["--on-stall", "force"]);
    let report = moving.completes();
    assert_eq!(report["policy"]["on_stall"], "force", "{report}");
    cluster.wait_for_heartbeats("fast", 1);
    guest::assert_unharmed(&cluster.logs("fast"));
}

#[test]
fn defaults_hold_for_what_comes_next_and_caps_are_shared() {
    let Some(machine) = Machine::alone_with_kvm("defaults of migrations") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let built_in = cluster.shoal.json(&["migrations", "defaults"]);
    assert_eq!(
        (
            &built_in["on_stall"],
            &built_in["on_stall_leaving"],
            &built_in["max_downtime_ms"]
        ),
        (&"cancel".into(), &"throttle".into(), &50.into()),
        "{built_in}"
    );
    cluster.run_probe("a", "node1", "96MiB", CALM);
    cluster.run_probe("b", "node2", "96MiB", CALM);
    let defaults = |more: &[&str]| cluster.shoal.json(&[&["migrations", "defaults"], more].concat());
    defaults(&[
        "set",
        "--max-downtime",
        "70ms",
        "--on-stall",
        "force",
        "--compress",
        "off",
    ]);
    let set = defaults(&["set", "--verify=sampled", "--cluster-bandwidth", "16MiB"]);
    for (key, value) in [
        ("max_downtime_ms", Value::from(70)),
        ("on_stall", "force".into()),
        ("on_stall_leaving", "force".into()),
        ("compression", "off".into()),
        ("verify", "sampled".into()),
        ("timeout_ms", 600_000.into()),
        ("cluster_bandwidth_bytes_per_second", (16 * MIB).into()),
        ("link_bandwidth_bytes_per_second", 0.into()),
    ] {
        assert_eq!(set[key], value, "{key} in {set}");
    }
    for (bad, code, words) in [
        (&["set"][..], 2, "nothing to set"),
        (
            &["set", "--cluster-bandwidth", "5"],
            1,
            "cluster_bandwidth_bytes_per_second: ",
        ),
        (&["set", "--priority", "77"], 2, "77"),
    ] {
        let refusal = cluster.shoal.fails(&[&["migrations", "defaults"], bad].concat());
        assert!(
            refusal.code == code && refusal.stderr.contains(words),
            "{bad:?}: {refusal:?}"
        );
    }
    assert_eq!(defaults(&["get"]), set);
    cluster.kill_daemon("scheduler");
    cluster.start_daemon("scheduler");
    let defaults = |more: &[&str]| cluster.shoal.json(&[&["migrations", "defaults"], more].concat());
    assert_eq!(defaults(&[]), set, "after a restart of the scheduler");
    for name in ["a", "b"] {
        cluster.wait_for_state(name, "running", seconds(30));
    }

    // One in each direction: they share no link but the cluster's cap.
    let moves = [
        Moving::start(&cluster.shoal, "a", &["--to", "node2", "--max-downtime", "80ms"]),
        Moving::start(&cluster.shoal, "b", &["--to", "node1"]),
    ];
    share_a_cap(&cluster, moves, 16 * MIB);
    let all = cluster.shoal.json(&["migrations"]);
    for migration in all.as_array().expect("a list") {
        let (policy, own) = (&migration["policy"], if migration["vm"] == "a" { 80 } else { 70 });
        assert_eq!(
            (&policy["max_downtime_ms"], &policy["on_stall"], &policy["verify"]),
            (&own.into(), &"force".into(), &"sampled".into()),
            "{migration}"
        );
        assert_eq!(
            policy["bandwidth_bytes_per_second"], 0,
            "its own cap, not its share"
        );
        assert_eq!(migration["verified"], "sampled", "{migration}");
    }

    let reset = defaults(&["set", "--reset", "--link-bandwidth", "16MiB"]);
    assert_eq!(reset["link_bandwidth_bytes_per_second"], 16 * MIB);
    assert_eq!(
        Value::Object(without_caps(&reset)),
        Value::Object(without_caps(&built_in)),
        "all but the cap is forgotten"
    );
    let moves = [
        Moving::start(&cluster.shoal, "a", &["--to", "node1"]),
        Moving::start(&cluster.shoal, "b", &["--to", "node2"]),
    ];
    share_a_cap(&cluster, moves, 16 * MIB);
}

fn without_caps(defaults: &Value) -> serde_json::Map<String, Value> {
    let mut all = defaults.as_object().expect("an object").clone();
    all.retain(|key, _| {
        ![
            "cluster_bandwidth_bytes_per_second",
            "link_bandwidth_bytes_per_second",
        ]
        .contains(&key.as_str())
    });
    all
}

/// Both go on at once, neither is starved, and together they stay below the cap.
fn share_a_cap(cluster: &Cluster, moves: [Moving; 2], cap: u64) {
    let [mut one, mut other] = moves;
    for moving in [&mut one, &mut other] {
        moving.wait_until_sent(4 * MIB);
    }
    let bytes = |moving: &Moving| {
        let now = moving.now().expect("both go on");
        now["progress"]["bytes_sent"].as_u64().expect("a number")
    };
    let (a, b) = (bytes(&one), bytes(&other));
    assert!(a < 5 * b && b < 5 * a, "one is starved: {a} and {b} bytes");
    let reports = [one.completes(), other.completes()];
    // A slow machine makes rates lower, never higher. The pause is not held to the cap.
    let rate = |report: &Value| {
        let figure = |key: &str| report[key].as_f64().expect("a number");
        figure("bytes_sent") * 1e3 / figure("total_ms")
    };
    let first_alone = reports.iter().map(rate).fold(0.0, f64::max);
    let cap = u32::try_from(cap).map_or(f64::MAX, f64::from);
    assert!(
        first_alone < 0.9 * cap,
        "no share of {cap} bytes a second, but {first_alone}: {reports:?}"
    );
    for name in ["a", "b"] {
        cluster.wait_for_heartbeats(name, 1);
        guest::assert_unharmed(&cluster.logs(name));
    }
}

#[test]
fn a_cap_without_room_for_all_lets_one_after_another_and_holds() {
    let Some(machine) = Machine::with_kvm("moves that wait for a cap") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let too_little = cluster
        .shoal
        .fails(&["migrations", "defaults", "set", "--cluster-bandwidth", "64KiB"]);
    assert!(
        too_little.code == 1 && too_little.stderr.contains("at least 1.0 MiB a second"),
        "{too_little:?}"
    );
    // The first would take a minute, the others some seconds.
    cluster.run_probe("a", "node1", "96MiB", CALM);
    for name in ["b", "c"] {
        let small = "fill=3MiB wss=64KiB rate=20 pattern=random";
        cluster.run_probe(name, "node1", "32MiB", small);
    }
    let too_little = cluster.shoal.fails(&["migrate", "a", "--bandwidth", "64KiB"]);
    assert!(
        too_little.code == 1 && too_little.stderr.contains("bandwidth_bytes_per_second: "),
        "{too_little:?}"
    );
    cluster
        .shoal
        .json(&["migrations", "defaults", "set", "--cluster-bandwidth", "1MiB"]);
    let mut first = Moving::start(&cluster.shoal, "a", &["--to", "node2"]);
    first.wait_until_sent(1);
    let moves = ["b", "c"].map(|name| Moving::start(&cluster.shoal, name, &["--to", "node2"]));
    wait::until_true("all three to be known", seconds(20), || {
        cluster.events_of_kind("migration-waits").len() == 2
    });
    let waits = |now: &Value| {
        let why = now["reason"].as_str().unwrap_or("");
        now["result"] == "waiting" && why.contains("that all migrations may use are taken by another one")
    };
    let all = cluster.shoal.json(&["migrations", "--running"]);
    let waiting: Vec<&str> = all
        .as_array()
        .expect("a list")
        .iter()
        .filter(|now| waits(now))
        .filter_map(|now| now["vm"].as_str())
        .collect();
    assert_eq!(waiting.len(), 2, "{all}");
    for vm in waiting {
        let shown = [
            cluster.vm(vm)["message"].clone(),
            cluster.shoal.json(&["explain", vm])["verdict"].clone(),
        ];
        for said in shown {
            assert!(
                said.as_str()
                    .is_some_and(|said| said.starts_with("waits to move to node2: ")),
                "{said}"
            );
        }
    }

    first.cancel();
    let ended = first.end();
    assert_eq!(
        (ended.code, &ended.report["result"]),
        (1, &"cancelled".into()),
        "{ended:?}"
    );
    for report in std::iter::once(ended.report).chain(moves.map(Moving::completes)) {
        assert_eq!(
            (
                &report["bandwidth_taken_bytes_per_second"],
                &report["policy"]["bandwidth_bytes_per_second"]
            ),
            (&MIB.into(), &0.into()),
            "its VMM says what it held to: {report}"
        );
        // By the source's own clock, which the cap is held by as well.
        let (ms, bytes) = (report["total_ms"].as_f64(), report["pages_sent"].as_f64());
        let (seconds, bytes) = (ms.expect("a number") / 1e3, bytes.expect("a number") * 4096.0);
        // What one frame holds, what may go at once after a rest, and the pause, which is not held to the cap.
        let at_once = 4.0 * 256.0 * 1024.0;
        assert!(bytes <= seconds * 1048576.0 + at_once, "{report}");
    }
    for name in ["a", "b", "c"] {
        cluster.wait_for_heartbeats(name, 1);
        guest::assert_unharmed(&cluster.logs(name));
    }
}

#[test]
fn what_races_with_a_migration_waits_or_is_refused() {
    let Some(machine) = Machine::with_kvm("what races with a migration") else {
        return;
    };
    let shape = Shape {
        nodes: 3,
        node_memory: "512MiB",
        ..Shape::default()
    };
    let cluster = Cluster::start(machine, &shape);
    let stopped = cluster.run_probe("stopped", "node1", "96MiB", CALM);
    let removed = cluster.run_probe("removed", "node1", "96MiB", CALM);
    let twice = cluster.run_probe("twice", "node1", "96MiB", CALM);
    let mut moves: Vec<Moving> = ["stopped", "removed", "twice"]
        .iter()
        .map(|vm| Moving::start(&cluster.shoal, vm, &SLOWLY))
        .collect();
    for moving in &mut moves {
        moving.wait_until_sent(MIB);
    }
    for to in ["node2", "node3", "node1"] {
        let refusal = cluster.shoal.fails(&["migrate", "twice", "--to", to]);
        assert!(
            refusal.code == 1
                && refusal.json["error"]["kind"] == "failed-precondition"
                && refusal.stderr.contains("is being migrated to node2 already"),
            "{refusal:?}"
        );
    }
    let refusal = cluster.shoal.fails(&["rm", "removed"]);
    assert!(
        refusal.code == 1 && refusal.stderr.contains("has not ended"),
        "{refusal:?}"
    );

    assert_eq!(cluster.shoal.json(&["stop", "stopped"])["state"], "exited");
    cluster.shoal.ok(&["rm", "--force", "removed"]);
    let last = moves.pop().expect("three");
    for moving in moves {
        let ended = moving.end();
        assert_eq!(
            (ended.code, &ended.report["result"]),
            (1, &"cancelled".into()),
            "{ended:?}"
        );
    }
    for vm in [&stopped, &removed] {
        wait::until_true("its VMMs to be gone", seconds(20), || cluster.vmms(vm).is_empty());
    }
    guest::assert_unharmed(&cluster.logs("stopped"));

    // Both nodes are to be emptied: the one it leaves, and the one it goes to.
    let drains = ["node1", "node2"].map(|node| cluster.shoal.start(&["drain", node]));
    wait::until_true("both to be drained", seconds(20), || {
        ["node1", "node2"]
            .iter()
            .all(|node| cluster.node(node)["state"] == "draining")
    });
    assert_eq!(cluster.node("node1")["vms"], 1, "it waits for the migration");
    last.set(&["--bandwidth", "0"]);
    assert_eq!(last.completes()["to"], "node2");
    for drain in drains {
        let output = drain.wait_with_output().expect("an end of the drain");
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!(cluster.only_vmm(&twice).node, "node3");
    for node in ["node1", "node2"] {
        wait::until_true("it to stay cordoned", seconds(20), || {
            cluster.node(node)["state"] == "cordoned"
        });
    }
    cluster.wait_for_heartbeats("twice", 1);
    guest::assert_unharmed(&cluster.logs("twice"));
}
