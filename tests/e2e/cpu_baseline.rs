//! Hosts whose CPUs differ.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use shoal_cpuid::{Entry, Table};
use shoal_proto::vm::{BootRequest, MigrationResult, VmState};
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use shoal_tests::vmm::{Vmm, probe_spec};
use shoal_tests::{guest, paths, wait};
use tonic::Code;

use crate::CALM;

const CMPXCHG16B: u32 = 1 << 13;
const KVM_FEATURES: u32 = 0x4000_0001;
const STEAL_TIME: u32 = 1 << 5;

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

/// The VMM with `environment`, as the words before its arguments, but for a host whose CPUID is that of this one but for `edit`.
fn vmm_of_another_host(directory: &Path, environment: &[String], edit: impl Fn(&Entry) -> Entry) -> String {
    let entries: Vec<Entry> = own_table().entries().iter().map(edit).collect();
    let hex: String = Table::from(entries)
        .to_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let vmm = paths::program("shoal-vmm");
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = print-cpuid ]; then echo {hex}; else exec env {} '{}' \"$@\"; fi\n",
        environment.join(" "),
        vmm.display()
    );
    let path = directory.join("other-vmm");
    fs::write(&path, script).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
    path.to_string_lossy().into_owned()
}

/// A host whose CPU lacks CMPXCHG16B.
fn without_cmpxchg16b(entry: &Entry) -> Entry {
    match entry.function {
        1 => Entry {
            ecx: entry.ecx & !CMPXCHG16B,
            ..*entry
        },
        _ => *entry,
    }
}

/// A host whose KVM has no steal time.
fn without_steal_time(entry: &Entry) -> Entry {
    match entry.function {
        KVM_FEATURES => Entry {
            eax: entry.eax & !STEAL_TIME,
            ..*entry
        },
        _ => *entry,
    }
}

/// What makes a VMM believe that KVM's MSRs are others: see `tests/fixtures/msr_shim.c`.
fn shim(directory: &Path, change: &str) -> Vec<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/msr_shim.c");
    let library = directory.join("msr_shim.so");
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([&library, &source])
        .status();
    assert!(
        compiled
            .expect("a C compiler, which links Rust as well")
            .success(),
        "{}",
        source.display()
    );
    vec![format!("LD_PRELOAD={}", library.display()), change.to_owned()]
}

#[test]
fn a_vm_with_the_baseline_moves_between_unlike_hosts_and_one_without_does_not() {
    let Some(machine) = Machine::with_kvm("a CPU baseline") else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let lesser = vmm_of_another_host(directory.path(), &[], without_cmpxchg16b);
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

/// Whether `shoal explain` says that a VM could go to node2, or else why not.
fn explained(cluster: &Cluster, vm: &str) -> Result<(), String> {
    let explained = cluster.shoal.json(&["explain", vm]);
    let nodes = explained["nodes"].as_array().expect("a list");
    let node2 = nodes.iter().find(|node| node["node"] == "node2");
    let why = node2.expect("node2 is there")["rejected"].as_str().expect("text");
    if why.is_empty() {
        Ok(())
    } else {
        Err(why.to_owned())
    }
}

#[test]
fn a_vm_with_the_baseline_moves_to_a_host_whose_kvm_lists_fewer_msrs() {
    let Some(machine) = Machine::with_kvm("fewer MSRs") else {
        return;
    };
    // MCG_CAP can be read everywhere, and is in no KVM's list.
    let directory = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    let [more, fewer] = directory.each_ref().map(tempfile::TempDir::path);
    let with_more = vmm_of_another_host(more, &shim(more, "SHIM_ADD=179"), |entry| *entry);
    let with_fewer = vmm_of_another_host(fewer, &shim(fewer, "SHIM_HIDE=4b564d03"), without_steal_time);
    let mut cluster = Cluster::start(machine, &Shape::default());
    for (node, vmm) in [("node1", &with_more), ("node2", &with_fewer)] {
        cluster.kill_daemon(node);
        cluster.start_daemon_with(node, &[("--vmm-binary", vmm)]);
    }
    let node1_has_more = || {
        let baseline = cluster.shoal.json(&["cpu", "baseline"]);
        baseline["nodes"][0]["extra_features"] == serde_json::json!(["KVM_STEAL_TIME"])
    };
    wait::until_true(
        "node2 to tell that it has less",
        wait::seconds(30),
        node1_has_more,
    );

    cluster.run_probe("wide", "node1", "128MiB", CALM);
    let why = "its CPU lacks KVM_STEAL_TIME, MSR 0x4b564d03 (KVM_STEAL_TIME), which the VM has";
    assert_eq!(explained(&cluster, "wide"), Err(why.to_owned()));
    let refused = cluster.shoal.fails(&["migrate", "wide", "--to", "node2"]);
    assert!(refused.code == 3 && refused.stderr.contains(why), "{refused:?}");

    cluster.shoal.ok(&["cpu", "baseline", "apply"]);
    let vm = cluster.run_probe("common", "node1", "128MiB", CALM);
    assert_eq!(explained(&cluster, "common"), Ok(()));
    for to in ["node2", "node1"] {
        let report = cluster.shoal.json(&["migrate", "common", "--to", to]);
        assert_eq!(report["result"], "completed", "{report}");
        assert_eq!(cluster.only_vmm(&vm).node, to);
        cluster.wait_for_heartbeats("common", 2);
    }
    guest::assert_unharmed(&cluster.logs("common"));
}

#[test]
fn a_vm_does_not_move_to_a_host_whose_kvm_lacks_an_msr_that_it_has() {
    const WHY: &str = "its CPU lacks MSR 0x4b564d01 (KVM_SYSTEM_TIME_NEW), which the VM has";
    let Some(machine) = Machine::with_kvm("a missing MSR") else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let shim = shim(directory.path(), "SHIM_HIDE=4b564d01");
    let fewer = vmm_of_another_host(directory.path(), &shim, |entry| *entry);
    let mut cluster = Cluster::start(machine, &Shape::default());
    cluster.shoal.ok(&["cpu", "baseline", "apply"]);
    cluster.run_probe("vm", "node1", "128MiB", CALM);
    assert_eq!(explained(&cluster, "vm"), Ok(()));
    cluster.kill_daemon("node2");
    cluster.start_daemon_with("node2", &[("--vmm-binary", &fewer)]);
    wait::until_true("node2 to tell what it has", wait::seconds(30), || {
        explained(&cluster, "vm") == Err(WHY.to_owned())
    });
    let refused = cluster.shoal.fails(&["migrate", "vm", "--to", "node2"]);
    assert!(refused.code == 3 && refused.stderr.contains(WHY), "{refused:?}");
    drop(cluster);
    a_destination_agrees(&shim);
}

/// Between the VMMs alone, with nobody to plan it.
#[tokio::main(flavor = "current_thread")]
async fn a_destination_agrees(shim: &[String]) {
    const VM: &str = "7a6cf9c4-6a67-4b53-b8a5-9b5e1c4b2c11";
    let spec = |epoch| probe_spec(VM, epoch, 128 << 20, CALM);
    let mut source = Vmm::start().await;
    source.boot(spec(1)).await;
    let words = [&["env".to_owned()], shim].concat();
    let mut destination = Vmm::start_under(&words).await;
    let to = destination.prepare_incoming(spec(2)).await;
    let report = source.migrate(to, 2, Duration::from_secs(1), |_| ()).await;
    assert_eq!(report.result(), MigrationResult::Failed, "{report:?}");
    let why = "MSRs: this host's KVM lacks MSR 0x4b564d01 (KVM_SYSTEM_TIME_NEW)";
    assert!(report.reason.contains(why), "{report:?}");
    source.wait_for_state(VmState::Running).await;
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
