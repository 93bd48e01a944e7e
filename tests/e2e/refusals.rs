//! What cannot be done is refused, in words, and harms nothing.

use std::fs;
use std::path::Path;

use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use shoal_tests::shoal::Failure;
use shoal_tests::wait::{self, seconds};
use shoal_tests::{guest, vmm};

use crate::CALM;

#[test]
fn what_fits_nowhere_is_refused_with_a_reason_for_every_node() {
    let Some(machine) = Machine::with_kvm("a VM that fits nowhere") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let refusal = cluster
        .shoal
        .fails(&["run", "probe", "--detach", "--memory", "64GiB"]);
    assert_eq!(refusal.code, 3, "{refusal:?}");
    assert_eq!(refusal.json["error"]["kind"], "nothing-fits", "{refusal:?}");
    for (index, node) in ["node1", "node2"].into_iter().enumerate() {
        let rejection = &refusal.json["error"]["rejections"][index];
        assert!(
            rejection["node"] == node && rejection["reason"].as_str().is_some_and(|r| !r.is_empty()),
            "{refusal:?}"
        );
        assert!(
            refusal
                .stderr
                .lines()
                .any(|line| line.trim_start().starts_with(node)),
            "{}",
            refusal.stderr
        );
    }
    assert_eq!(
        cluster.shoal.json(&["ps", "--all"]),
        serde_json::json!([]),
        "what was refused must not stay"
    );
}

#[test]
fn bad_sizes_names_and_targets_are_refused() {
    let Some(machine) = Machine::with_kvm("requests that cannot be met") else {
        return;
    };
    let cluster = Cluster::start(
        machine,
        &Shape {
            nodes: 2,
            node_memory: "512MiB",
            automatic: false,
            ..Shape::default()
        },
    );
    cluster.run_probe("small", "node1", "256MiB", "fill=192MiB wss=4MiB rate=100");
    cluster.run_probe("large", "node2", "384MiB", "fill=320MiB");
    // What does not fit is told by what is reported, and filling takes its time.
    let available = |node: usize| cluster.shoal.json(&["nodes"])[node]["memory_available_bytes"].as_u64();
    wait::until_true("the nodes to report what was filled", seconds(60), || {
        available(0).is_some_and(|bytes| bytes <= 320 << 20)
            && available(1).is_some_and(|bytes| bytes <= 192 << 20)
    });
    let refuse = |args: &[&str], words: &[&str]| {
        let refusal = cluster.shoal.fails(args);
        assert!(refusal.code == 1 || refusal.code == 3, "{args:?}: {refusal:?}");
        says(&refusal, words);
    };

    refuse(&["run", "probe", "--detach", "--memory", "0"], &["memory"]);
    refuse(&["run", "probe", "--detach", "--memory", "100TiB"], &["memory"]);
    refuse(&["run", "probe", "--detach", "--cpus", "1000"], &["cpus"]);
    refuse(
        &["run", "linux", "--detach", "--cpus", "2"],
        &["cpus", "at most 1", "max_cpus"],
    );
    refuse(&["run", "probe", "--detach", "--name", "Not A Name"], &["name"]);
    refuse(&["run", "probe", "--detach", "--name", "small"], &["small"]);
    refuse(&["run", "probe", "--detach", "--node", "node9"], &["node9"]);
    refuse(&["run", "no-such-image", "--detach"], &["no-such-image"]);
    refuse(&["migrate", "small", "--to", "node9"], &["node9"]);
    refuse(&["migrate", "large", "--to", "node1"], &["node1"]);
    refuse(&["migrate", "nobody", "--to", "node1"], &["nobody"]);
    refuse(&["rm", "small"], &["small"]);
    refuse(&["resolve", "small", "--keep", "node1"], &["small"]);
    refuse(&["drain", "node9"], &["node9"]);
    refuse(&["logs", "nobody"], &["nobody"]);

    for name in ["small", "large"] {
        cluster.wait_for_heartbeats(name, 1);
        assert_eq!(cluster.vm(name)["state"], "running");
        guest::assert_unharmed(&cluster.logs(name));
    }
}

#[test]
fn bad_images_are_refused_and_harm_nothing() {
    let Some(machine) = Machine::with_kvm("images that cannot boot") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    cluster.run_probe("witness", "node1", "128MiB", CALM);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let kernel = fs::read(vmm::probe_kernel()).expect("the probe's kernel");
    let refuse = |manifest: &str, kernel: &[u8], words: &[&str]| {
        write_image(dir.path(), manifest, kernel);
        let refusal = cluster
            .shoal
            .fails(&["image", "import", &dir.path().to_string_lossy()]);
        assert_eq!(refusal.code, 1, "{manifest}: {refusal:?}");
        says(&refusal, words);
    };

    refuse(
        "name = \"cut\"\nkernel = \"k\"",
        &kernel[..kernel.len() / 3],
        &["kernel"],
    );
    refuse("name = \"header\"\nkernel = \"k\"", &kernel[..60], &["kernel"]);
    refuse(
        "name = \"garbage\"\nkernel = \"k\"",
        &garbage(1 << 20),
        &["kernel"],
    );
    refuse("name = \"empty\"\nkernel = \"k\"", b"", &["'k'"]);
    refuse(
        "name = \"gone\"\nkernel = \"no-such-file\"",
        &kernel,
        &["no-such-file"],
    );
    refuse(
        "name = \"gone\"\nkernel = \"k\"\ninitrd = \"no-such-initrd\"",
        &kernel,
        &["no-such-initrd"],
    );
    refuse("name = \"odd\"\nkernel = \"k\"\ncolour = 3", &kernel, &["colour"]);
    refuse(
        "name = \"none\"\nkernel = \"k\"\nmemory = \"0\"",
        &kernel,
        &["memory"],
    );
    refuse(
        "name = \"huge\"\nkernel = \"k\"\nmemory = \"100TiB\"",
        &kernel,
        &["memory"],
    );
    refuse("name = \"Bad Name\"\nkernel = \"k\"", &kernel, &["name"]);
    refuse("name = \"broken", &kernel, &["image.toml"]);

    let images = cluster.shoal.json(&["image", "ls"]);
    let names: Vec<&str> = images
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|i| i["name"].as_str())
        .collect();
    assert_eq!(
        names,
        ["linux", "linux-checks", "probe"],
        "nothing of what was refused may stay"
    );
    cluster.wait_for_heartbeats("witness", 2);
    guest::assert_unharmed(&cluster.logs("witness"));
    cluster.wait_for_state("witness", "running", seconds(1));
}

fn write_image(directory: &Path, manifest: &str, kernel: &[u8]) {
    fs::write(directory.join("image.toml"), manifest).expect("written");
    fs::write(directory.join("k"), kernel).expect("written");
}

/// Bytes without a pattern that a loader might know.
fn garbage(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn says(refusal: &Failure, words: &[&str]) {
    for word in words {
        assert!(
            refusal.stderr.contains(word),
            "'{word}' should be in: {}",
            refusal.stderr
        );
    }
    assert!(
        refusal.json["error"]["message"].is_string(),
        "a script must find the error too: {refusal:?}"
    );
}
