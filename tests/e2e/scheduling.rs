//! What users tell the scheduler, with guests that run: rules, locks, the queue, expel and bring, the policy.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use serde_json::Value;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};

use crate::CALM;

fn cluster(machine: Machine, shape: &Shape) -> Cluster {
    Cluster::start(
        machine,
        &Shape {
            node_memory: "1GiB",
            node_cpus: 32,
            ..shape.clone()
        },
    )
}

/// Runs a small probe with more options, and waits until it beats. Answers the node that was chosen.
fn run(cluster: &Cluster, name: &str, options: &[&str]) -> String {
    let mut args = vec!["run", "probe", "--detach", "--name", name, "--memory", "128MiB"];
    args.extend(options);
    args.push("--");
    args.extend(CALM.split(' '));
    cluster.shoal.json(&args);
    cluster.wait_for_heartbeats(name, 1);
    home(cluster, name)
}

fn home(cluster: &Cluster, name: &str) -> String {
    text(&cluster.vm(name)["node"])
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn assert_all_run_unharmed(cluster: &Cluster, names: &[&str]) {
    for name in names {
        cluster.wait_for_state(name, "running", seconds(60));
        cluster.wait_for_heartbeats(name, 2);
        guest::assert_unharmed(&cluster.logs(name));
    }
}

#[test]
fn rules_and_locks_hold_for_guests_that_run() {
    let Some(machine) = Machine::with_kvm("rules of scheduling") else {
        return;
    };
    let shape = Shape {
        nodes: 3,
        automatic: true,
        ..Shape::default()
    };
    let cluster = cluster(machine, &shape);
    let shoal = &cluster.shoal;
    shoal.ok(&["node", "label", "node2", "disk=ssd"]);
    shoal.ok(&["node", "taint", "node3", "dedicated=db"]);

    assert_eq!(run(&cluster, "db", &["--selector", "disk=ssd"]), "node2");
    let web = ["--label", "app=web", "--anti-affinity", "app=web"];
    let mut homes = [run(&cluster, "web1", &web), run(&cluster, "web2", &web)];
    homes.sort();
    assert_eq!(homes, ["node1", "node2"], "apart, and not on the tainted node");
    let refused = shoal.fails(&[&["run", "probe", "--detach"], &web[..]].concat());
    assert_eq!(refused.code, 3, "{refused:?}");
    assert!(
        refused.stderr.contains("dedicated=db") && refused.stderr.contains("app=web"),
        "each node with its reason: {refused:?}"
    );
    assert_eq!(
        run(
            &cluster,
            "web3",
            &[&web[..], &["--tolerate", "dedicated=db"]].concat()
        ),
        "node3"
    );

    // A node's labels change: the VM that asks for them follows, unless it is locked.
    shoal.ok(&["lock", "db"]);
    shoal.ok(&["node", "label", "node2", "disk-"]);
    shoal.ok(&["node", "label", "node1", "disk=ssd"]);
    let why = wait::until("the lock to be the reason", seconds(60), || {
        let why = shoal.json(&["explain", "db"]);
        text(&why["verdict"]).contains("lock").then_some(why)
    });
    assert_eq!(why["node"], "node2", "{why}");
    shoal.ok(&["unlock", "db"]);
    wait::until_true("the VM to go where its rules hold", seconds(60), || {
        home(&cluster, "db") == "node1"
    });
    let moved = cluster.events_of_kind("migration-planned");
    let moved = moved.iter().find(|event| event["vm"] == "db");
    let reason = moved.map(|event| text(&event["message"])).unwrap_or_default();
    assert!(reason.contains("disk=ssd"), "{reason}");
    assert_all_run_unharmed(&cluster, &["db", "web1", "web2", "web3"]);
}

#[test]
fn what_waits_in_the_queue_runs_when_there_is_room() {
    let Some(machine) = Machine::with_kvm("the queue") else {
        return;
    };
    let shape = Shape {
        nodes: 1,
        ..Shape::default()
    };
    let cluster = cluster(machine, &shape);
    let large = ["--memory", "900MiB"];
    let queue = |name| {
        let words = ["run", "probe", "--detach", "--queue", "--name", name];
        cluster
            .shoal
            .json(&[&words[..], &large, &["--", "fill=16MiB"]].concat())
    };
    run(&cluster, "first", &[]);
    queue("second");
    cluster.wait_for_state("second", "running", seconds(60));
    queue("third");
    queue("fourth");

    let waiting = cluster.shoal.json(&["queue"]);
    let order: Vec<String> = waiting
        .as_array()
        .expect("a list")
        .iter()
        .map(|vm| text(&vm["name"]))
        .collect();
    assert_eq!(order, ["third", "fourth"], "{waiting}");
    assert_eq!(
        (&waiting[0]["place"], &waiting[1]["place"]),
        (&1.into(), &2.into())
    );
    assert!(
        text(&waiting[0]["reason"]).contains("node1"),
        "it must say where it does not fit, and why: {waiting}"
    );

    cluster.shoal.ok(&["stop", "second"]);
    cluster.wait_for_state("third", "running", seconds(60));
    cluster.shoal.ok(&["rm", "fourth"]);
    assert_eq!(cluster.shoal.json(&["queue"]), serde_json::json!([]));
    assert_all_run_unharmed(&cluster, &["first", "third"]);
}

#[test]
fn the_queue_runs_as_many_guests_as_there_are_cpus() {
    let Some(machine) = Machine::with_kvm("slots of the queue") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let shoal = &cluster.shoal;
    let names = ["a", "b", "c", "d", "e", "f"];
    for name in names {
        let mut args = vec!["run", "probe", "--detach", "--queue", "--name", name];
        args.extend(["--memory", "128MiB", "--"]);
        args.extend(CALM.split(' '));
        shoal.json(&args);
    }
    // Two nodes of two CPUs.
    for name in &names[..4] {
        cluster.wait_for_state(name, "running", seconds(60));
    }
    let mut homes: Vec<String> = names[..4].iter().map(|name| home(&cluster, name)).collect();
    homes.sort();
    assert_eq!(homes, ["node1", "node1", "node2", "node2"]);
    // A job that is watched waits behind the two that are left.
    let job = [
        "run",
        "probe",
        "--queue",
        "--name",
        "job",
        "--",
        "seconds=1",
        "status=3",
    ];
    let mut job = shoal.command(&job);
    let job = job.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut job = job.expect("shoal starts");
    let mut told = BufReader::new(job.stderr.take().expect("a pipe"));
    let mut said = String::new();
    let mut hear = |place: u32| {
        let words = format!("job waits, place {place} in the queue: nothing fits: node1: ");
        while !said.contains(&words) {
            assert!(
                told.read_line(&mut said).expect("text") > 0,
                "no '{words}': {said}"
            );
        }
    };
    let waiting = || -> Vec<String> {
        let queue = shoal.json(&["queue"]);
        let queue = queue.as_array().expect("a list").clone();
        queue.iter().map(|vm| text(&vm["name"])).collect()
    };
    hear(3);
    assert_eq!(waiting(), ["e", "f", "job"]);
    let why = text(&shoal.json(&["queue"])[0]["reason"]);
    let slots = "its 2 slots for the queue";
    assert!(
        why.contains("node1: 2 vCPUs declared there") && why.contains(slots),
        "{why}"
    );

    for (ended, next, left) in [("b", "e", &["f", "job"][..]), ("c", "f", &["job"])] {
        shoal.ok(&["stop", ended]);
        cluster.wait_for_state(next, "running", seconds(60));
        assert_eq!(waiting(), left, "one for one");
        assert_eq!(home(&cluster, next), home(&cluster, ended), "in its slot");
        hear(u32::try_from(left.len()).expect("few"));
    }
    shoal.ok(&["stop", "a"]);
    let output = job.wait_with_output().expect("it ends");
    assert_eq!(
        output.status.code(),
        Some(3),
        "the workload's own status: {output:?}"
    );
    assert!(
        guest::heartbeats(&String::from_utf8_lossy(&output.stdout)).len() > 1,
        "its console: {output:?}"
    );
    assert_all_run_unharmed(&cluster, &["d", "e", "f"]);
}

#[test]
fn expelled_guests_are_brought_back() {
    let Some(machine) = Machine::with_kvm("expel and bring") else {
        return;
    };
    let shape = Shape {
        automatic: true,
        ..Shape::default()
    };
    let cluster = cluster(machine, &shape);
    let names = ["a", "b", "c"];
    for name in names {
        run(&cluster, name, &["--prefer-node", "node1"]);
    }
    run(&cluster, "stays", &["--prefer-node", "node2"]);

    for (command, to) in [("expel", "node2"), ("bring", "node1")] {
        let done = cluster.shoal.json(&[command, "node1"]);
        assert_eq!(
            (&done["moved"], &done["remaining"]),
            (&3.into(), &0.into()),
            "{done}"
        );
        for name in names {
            assert_eq!(home(&cluster, name), to, "after {command}");
        }
        assert_eq!(home(&cluster, "stays"), "node2");
        assert_eq!(
            cluster.node("node1")["state"],
            "ready",
            "it takes VMs all the time"
        );
    }
    assert_all_run_unharmed(&cluster, &["a", "b", "c", "stays"]);
}

#[test]
fn a_rebalance_does_what_its_dry_run_says_and_the_policy_decides_who_asks() {
    let Some(machine) = Machine::with_kvm("rebalance by hand") else {
        return;
    };
    let shape = Shape {
        node_memory: "1GiB",
        node_cpus: 1,
        ..Shape::default()
    };
    let cluster = Cluster::start(machine, &shape);
    let shoal = &cluster.shoal;
    let started_with = shoal.json(&["policy", "get", "automation"]);
    assert_eq!(started_with[0]["value"], "manual", "{started_with}");
    shoal.ok(&["policy", "set", "automation=advise", "cool_down=1s", "settle=0s"]);
    // A probe never sleeps: each wants a CPU, and the node has one.
    for name in ["a", "b"] {
        run(&cluster, name, &["--prefer-node", "node1"]);
    }

    let dry = wait::until("the load to be seen", seconds(120), || {
        let dry = shoal.json(&["rebalance", "--dry-run"]);
        (dry["moves"].as_array().is_some_and(|moves| !moves.is_empty())).then_some(dry)
    });
    assert!(
        dry["slowdown_after"].as_f64() < dry["slowdown_before"].as_f64(),
        "{dry}"
    );
    let planned = &dry["moves"][0];
    assert_eq!(
        (&planned["from"], &planned["to"]),
        (&"node1".into(), &"node2".into())
    );
    assert!(
        text(&planned["reason"]).starts_with("slowdown on node1"),
        "{planned}"
    );
    assert!(text(&planned["details"]).contains("load"), "{planned}");
    wait::until_true("the advice to be told", seconds(60), || {
        !cluster.events_of_kind("migration-advised").is_empty()
    });
    assert_eq!(cluster.events_of_kind("migration-planned"), Vec::<Value>::new());
    assert_eq!(
        (home(&cluster, "a"), home(&cluster, "b")),
        ("node1".into(), "node1".into())
    );

    let done = shoal.json(&["rebalance"]);
    assert_eq!(done["results"][0]["result"], "completed", "{done}");
    let mut homes = [home(&cluster, "a"), home(&cluster, "b")];
    homes.sort();
    assert_eq!(homes, ["node1", "node2"]);
    let moved = text(&done["moves"][0]["vm"]);
    let why = shoal.json(&["explain", &moved]);
    assert!(
        text(&why["placement"]).contains("slowdown"),
        "its last move and why: {why}"
    );
    assert_all_run_unharmed(&cluster, &["a", "b"]);
}

/// What a guest wrote since it was begun anew for the last time.
fn last_run(logs: &str) -> &str {
    logs.rsplit_once("what follows is another run]\n")
        .map_or("", |(_, run)| run)
}

#[test]
fn a_guest_gives_way_to_a_higher_priority_and_begins_anew() {
    let Some(machine) = Machine::with_kvm("preemption") else {
        return;
    };
    let shape = Shape {
        nodes: 1,
        ..Shape::default()
    };
    let cluster = cluster(machine, &shape);
    let shoal = &cluster.shoal;
    let large = ["--memory", "900MiB"];
    let start = |name: &str, more: &[&str]| {
        let words = ["run", "probe", "--detach", "--name", name];
        let guest = ["--", "fill=16MiB"];
        shoal.json(&[&words[..], &large, more, &guest].concat())
    };
    let low = start("low", &["--preemptible", "--priority", "2"]);
    cluster.wait_for_heartbeats("low", 2);
    let before = cluster.logs("low");

    let equal = ["run", "probe", "--detach", "--priority", "2"];
    let refused = shoal.fails(&[&equal[..], &large].concat());
    assert_eq!(refused.code, 3, "of equal priority: {refused:?}");
    let high = start("high", &["--priority", "8"]);
    assert_eq!(high["node"], "node1");
    cluster.wait_for_heartbeats("high", 1);
    assert_eq!(cluster.vm("high")["state"], "running");

    let waits = cluster.vm("low");
    assert_eq!((&waits["state"], &waits["id"]), (&"pending".into(), &low["id"]));
    assert_eq!(
        (&waits["preempted"]["times"], &waits["preempted"]["by"]),
        (&1.into(), &"high".into())
    );
    assert_eq!(shoal.json(&["queue"])[0]["name"], "low");
    let told = cluster.events_of_kind("vm-preempted");
    assert_eq!((told.len(), &told[0]["vm"]), (1, &"low".into()), "{told:?}");
    assert!(shoal.ok(&["inspect", "low"]).contains("for high (priority 8)"));
    assert_eq!(cluster.vmms(&text(&low["id"])).len(), 0, "nothing is left of it");
    let first_run = cluster.logs("low");
    assert!(
        first_run.starts_with(&before),
        "what it wrote is kept: {first_run}"
    );

    shoal.ok(&["rm", "--force", "high"]);
    let again = cluster.wait_for_state("low", "running", seconds(60));
    assert_eq!((&again["id"], &again["epoch"]), (&low["id"], &2.into()));
    wait::until_true("the guest to begin anew", seconds(60), || {
        guest::heartbeats(last_run(&cluster.logs("low"))).len() >= 2
    });
    let logs = cluster.logs("low");
    assert!(logs.starts_with(&first_run), "nothing is cut off: {logs}");
    let (first, second) = (&logs[..first_run.len()], last_run(&logs));
    for run in [first, second] {
        guest::assert_unharmed(run);
    }
    let first_beat = |run: &str| guest::heartbeats(run)[0].n;
    assert_eq!(
        first_beat(first),
        first_beat(second),
        "both from the start: {logs}"
    );
    assert!(!logs.contains("bytes of console output are missing"), "{logs}");
    assert_eq!(cluster.vmms(&text(&low["id"])).len(), 1);
}
