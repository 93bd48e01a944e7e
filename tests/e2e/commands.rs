//! The `shoal` command: keys, exit codes, streams.

use serde_json::Value;
use shoal_tests::cluster::{Cluster, Shape, free_port};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::shoal::Shoal;
use shoal_tests::wait::{self, seconds};

use crate::CALM;

#[test]
fn scripts_find_the_keys_that_they_rely_on() {
    let Some(machine) = Machine::with_kvm("JSON keys") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    cluster.run_probe("a", "node1", "128MiB", CALM);

    let ps = cluster.shoal.json(&["ps"]);
    has_keys(
        &ps[0],
        &[
            "id",
            "name",
            "node",
            "state",
            "epoch",
            "image",
            "cpus",
            "memory_bytes",
            "age_seconds",
        ],
    );
    let nodes = cluster.shoal.json(&["nodes"]);
    let keys = [
        "name",
        "address",
        "state",
        "cpus",
        "memory_bytes",
        "memory_available_bytes",
        "cpu_load",
        "vms",
    ];
    has_keys(&nodes[0], &keys);
    let report = cluster.shoal.json(&["migrate", "a"]);
    let keys = [
        "vm",
        "from",
        "to",
        "result",
        "reason",
        "downtime_ms",
        "total_ms",
        "passes",
        "bytes_sent",
    ];
    has_keys(&report, &keys);
    has_keys(&report, &["pages_sent", "zero_pages"]);
    for command in [
        vec!["image", "ls"],
        vec!["inspect", "a"],
        vec!["logs", "a"],
        vec!["events"],
    ] {
        let value = cluster.shoal.json(&command);
        assert!(value.is_array() || value.is_object(), "{command:?}");
    }
    let plan = cluster.shoal.json(&["rebalance", "--dry-run"]);
    has_keys(&plan, &["moves", "slowdown_before", "slowdown_after", "summary"]);
    for table in [["ps"], ["nodes"], ["events"]] {
        assert!(cluster.shoal.ok(&table).contains("node2"), "a was moved there");
    }
}

#[test]
fn a_cluster_is_recorded_and_replayed() {
    let Some(machine) = Machine::with_kvm("record and simulate") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    cluster.run_probe("a", "node1", "128MiB", CALM);
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("noise.gz");
    let file = file.to_str().expect("a path of letters");
    let recorded = cluster.shoal.json(&["record", file, "--for", "3s"]);
    let moments = recorded["moments"].as_u64().expect("a count");
    assert!(moments >= 2, "{recorded}");
    let replayed = cluster.shoal.json(&["simulate", file]);
    assert_eq!(
        (&replayed["rounds"], &replayed["would"]),
        (&moments.into(), &Value::Array(Vec::new())),
        "nothing need be done for one calm VM: {replayed}"
    );
    assert!(cluster.shoal.ok(&["simulate", file]).starts_with("nothing in "));
    // What is there is not written over.
    let refused = cluster.shoal.fails(&["record", file, "--for", "1s"]);
    assert!(refused.stderr.contains(file), "{refused:?}");
}

#[test]
fn a_guest_that_says_why_it_fails_is_quoted() {
    let Some(machine) = Machine::with_kvm("last words of a guest") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    // The status that it never wrote, or wrote before, does not make it a success.
    let run = [
        "run",
        "probe",
        "--name",
        "broken",
        "--",
        "panic=no_root",
        "status=0",
    ];
    let output = cluster.shoal.output(&run);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("broken is failed: the guest says: no_root"),
        "{said}"
    );

    let failed = cluster.vm("broken");
    assert_eq!(failed["state"], "failed");
    assert_eq!(failed["message"], "the guest says: no_root");
    assert!(
        cluster
            .shoal
            .ok(&["inspect", "broken"])
            .contains("the guest says: no_root")
    );
}

#[test]
fn run_streams_the_console_and_exits_with_the_workloads_status() {
    let Some(machine) = Machine::with_kvm("exit status of a workload") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let output = cluster
        .shoal
        .output(&["run", "probe", "--name", "brief", "--", "seconds=3", "status=5"]);
    assert_eq!(
        output.status.code(),
        Some(5),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let console = String::from_utf8_lossy(&output.stdout);
    guest::assert_unharmed(&console);
    assert!(
        console.contains("probe: done"),
        "the last line must be there:\n{console}"
    );
    assert_eq!(cluster.logs("brief"), console, "the log must hold the same");

    let ended = cluster.vm("brief");
    assert_eq!(
        (&ended["state"], &ended["exit_status"]),
        (&"exited".into(), &5.into())
    );
    let vm = ended["id"].as_str().expect("an id");
    wait::until_true("its VMM to be gone", seconds(20), || cluster.vmms(vm).is_empty());
    assert!(!cluster.shoal.ok(&["ps"]).contains("brief"), "it has ended");
    assert!(cluster.shoal.ok(&["ps", "--all"]).contains("exited (5)"));

    // One JSON value on stdout, and the console beside it.
    let output = cluster.shoal.output(&[
        "-o",
        "json",
        "run",
        "probe",
        "--name",
        "scripted",
        "--",
        "seconds=1",
    ]);
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON and nothing else");
    assert_eq!(
        (&told["name"], &told["exit_status"]),
        (&"scripted".into(), &0.into())
    );
    let console = String::from_utf8_lossy(&output.stderr);
    assert!(console.contains("probe: done"), "{console}");
    cluster.shoal.ok(&["rm", "scripted"]);

    let once = [
        "run",
        "probe",
        "--rm",
        "--name",
        "once",
        "--",
        "seconds=1",
        "status=3",
    ];
    assert_eq!(cluster.shoal.output(&once).status.code(), Some(3));
    assert_eq!(cluster.shoal.fails(&["inspect", "once"]).code, 1, "it is removed");
    let again = ["run", "probe", "--name", "again", "--", "seconds=1"];
    assert!(cluster.shoal.output(&again).status.success());
    cluster.shoal.ok(&["rm", "brief", "again"]);
    assert_eq!(cluster.shoal.json(&["ps", "--all"]), serde_json::json!([]));
    assert_eq!(cluster.shoal.fails(&["inspect", "brief"]).code, 1);
}

#[test]
fn a_stopped_vm_ends_its_log_and_frees_its_memory() {
    let Some(machine) = Machine::with_kvm("stop and remove") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe("a", "node1", "128MiB", CALM);
    let follower = cluster.shoal.start(&["logs", "-f", "a"]);
    cluster.wait_for_heartbeats("a", 1);

    assert_eq!(cluster.shoal.json(&["stop", "a"])["state"], "exited");
    let output = follower.wait_with_output().expect("logs -f ends with the VM");
    assert!(output.status.success());
    let lines = String::from_utf8_lossy(&output.stdout);
    let text: String = lines
        .lines()
        .map(|line| {
            let chunk: Value = serde_json::from_str(line).expect("an object a line");
            chunk["text"].as_str().expect("text").to_owned()
        })
        .collect();
    guest::assert_unharmed(&text);
    wait::until_true("its VMM to be gone", seconds(20), || cluster.vmms(&vm).is_empty());
    wait::until_true("its memory to be free", seconds(20), || {
        let node = cluster.node("node1");
        node["memory_available_bytes"] == node["memory_bytes"]
    });
    let kinds: Vec<String> = cluster
        .events()
        .iter()
        .map(|e| e["kind"].as_str().unwrap_or("").to_owned())
        .collect();
    assert!(kinds.iter().any(|kind| kind == "vm-started"), "{kinds:?}");
}

#[test]
fn exit_codes_tell_usage_from_an_unreachable_cluster() {
    let nowhere = Shoal::new(&format!("http://127.0.0.1:{}", free_port()));
    let failure = nowhere.fails(&["ps"]);
    assert_eq!(
        (failure.code, &failure.json["error"]["kind"]),
        (4, &"unreachable".into()),
        "{failure:?}"
    );
    assert!(
        failure.stderr.contains("shoal up"),
        "it should say what to do: {}",
        failure.stderr
    );
    for args in [
        &["frobnicate"][..],
        &["migrate"],
        &["run", "x", "--memory", "lots"],
        &["ps", "--endpoint", "ftp:x"],
    ] {
        let failure = nowhere.fails(args);
        assert_eq!(
            (failure.code, &failure.json["error"]["kind"]),
            (2, &"usage".into()),
            "{args:?}: {failure:?}"
        );
    }
    let help = nowhere.ok(&["-o", "json", "run", "--help"]);
    assert!(help.contains("Usage:") && !help.contains("\"error\""), "{help}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(nowhere.ok(&["completions", shell]).contains("shoal"));
    }
}

fn has_keys(object: &Value, keys: &[&str]) {
    for key in keys {
        assert!(object.get(key).is_some(), "'{key}' is missing in {object}");
    }
}
