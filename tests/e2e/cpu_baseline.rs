//! Hosts whose CPUs differ.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use shoal_cpuid::{Entry, Table};
use shoal_proto::vm::BootRequest;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use shoal_tests::vmm::{Vmm, probe_spec};
use shoal_tests::{guest, paths, wait};
use tonic::Code;

use crate::CALM;

const CMPXCHG16B: u32 = 1 << 13;

/// What guests get on this machine.
fn own_table() -> Table {
    let output = Command::new(paths::program("shoal-vmm"))
        .arg("print-cpuid")
        .output()
        .expect("it runs");
    let hex = String::from_utf8(output.stdout).expect("text");
    let (pairs, _) = hex.trim().as_bytes().as_chunks::<2>();
    let byte =
        |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).expect("text"), 16).expect("hex");
    Table::from_bytes(&pairs.iter().map(byte).collect::<Vec<_>>()).expect("a table")
}

/// The VMM, but for a host whose CPU lacks CMPXCHG16B.
fn vmm_of_a_lesser_host(directory: &Path) -> String {
    let lesser = |entry: &Entry| match entry.function {
        1 => Entry {
            ecx: entry.ecx & !CMPXCHG16B,
            ..*entry
        },
        _ => *entry,
    };
    let entries: Vec<Entry> = own_table().entries().iter().map(lesser).collect();
    let hex: String = Table::from(entries)
        .to_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let vmm = paths::program("shoal-vmm");
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = print-cpuid ]; then echo {hex}; else exec '{}' \"$@\"; fi\n",
        vmm.display()
    );
    let path = directory.join("lesser-vmm");
    fs::write(&path, script).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
    path.to_string_lossy().into_owned()
}

#[test]
fn a_vm_with_the_baseline_moves_between_unlike_hosts_and_one_without_does_not() {
    let Some(machine) = Machine::with_kvm("a CPU baseline") else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let lesser = vmm_of_a_lesser_host(directory.path());
    let mut cluster = Cluster::start(machine, &Shape::default());
    cluster.kill_daemon("node2");
    cluster.start_daemon_with("node2", &[("--vmm-binary", &lesser)]);
    let node1_has_more = || {
        let baseline = cluster.shoal.json(&["cpu", "baseline"]);
        assert_eq!(baseline["applied"], false, "{baseline}");
        baseline["nodes"][0]["extra_features"] == serde_json::json!(["CX16"])
    };
    wait::until_true(
        "node2 to tell that it has less",
        wait::seconds(30),
        node1_has_more,
    );

    cluster.run_probe("wide", "node1", "128MiB", CALM);
    let refused = cluster.shoal.fails(&["migrate", "wide", "--to", "node2"]);
    assert_eq!(refused.code, 3, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("its CPU lacks CX16"),
        "{}",
        refused.stderr
    );

    let applied = cluster.shoal.json(&["cpu", "baseline", "apply"]);
    assert_eq!(applied["applied"], true, "{applied}");
    let features = applied["features"].as_array().expect("a list");
    assert!(
        features.contains(&"SSE2".into()) && !features.contains(&"CX16".into()),
        "{applied}"
    );
    let vm = cluster.run_probe("common", "node1", "128MiB", CALM);
    let report = cluster.shoal.json(&["migrate", "common", "--to", "node2"]);
    assert_eq!(report["result"], "completed", "{report}");
    assert_eq!(cluster.only_vmm(&vm).node, "node2");
    cluster.wait_for_heartbeats("common", 2);
    guest::assert_unharmed(&cluster.logs("common"));

    let cleared = cluster.shoal.json(&["cpu", "baseline", "clear"]);
    assert_eq!(cleared["applied"], false, "{cleared}");
}

#[tokio::test]
async fn a_baseline_with_features_that_the_host_lacks_is_refused_by_name() {
    let Some(_machine) = Machine::with_kvm("an impossible CPU baseline") else {
        return;
    };
    let impossible = |entry: &Entry| match (entry.function, entry.index) {
        (7, 0) => Entry {
            ecx: u32::MAX,
            ..*entry
        },
        _ => *entry,
    };
    let own = own_table();
    let more: Table = own.entries().iter().map(impossible).collect::<Vec<_>>().into();
    let lacking: Vec<String> = more
        .features_without(&own)
        .map(|feature| feature.to_string())
        .collect();
    assert!(!lacking.is_empty(), "no host has them all");
    let spec = |baseline: &Table| {
        let mut spec = probe_spec("7a6cf9c4-6a67-4b53-b8a5-9b5e1c4b2c10", 1, 128 << 20, CALM);
        spec.cpu_baseline = baseline.to_bytes();
        spec
    };
    let mut vmm = Vmm::start().await;
    let boot = BootRequest {
        spec: Some(spec(&more)),
    };
    let refused = vmm.client.boot(boot).await.expect_err("impossible");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let expected = format!("cpu_baseline: this host lacks {}", lacking.join(", "));
    assert_eq!(refused.message(), expected);
    vmm.boot(spec(&own.features_only())).await;
}
