//! Two kinds of KVM in one cluster: what self-tests say, and what follows from it. The probe runs on both kinds, so that what
//! node1 and node2 are is said by a program in place of their VMM, which is the VMM but for that.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use shoal_tests::{guest, paths, vmm};

/// Its kernels are told apart by the exit status of the guest, and by their blobs.
const BOTH: &str = "name = \"both\"\nkernel = \"plain\"\nmemory = \"64MiB\"\n\
     [software_kvm]\nkernel = \"ring3\"\ncmdline = \"status=7\"\nmax_cpus = 1\n";
const SOFTWARE_ONLY: &str = "name = \"software-only\"\nmemory = \"64MiB\"\n\
     [software_kvm]\nkernel = \"ring3\"\nmax_cpus = 1\n";
const STAYS: &str = "fill=16MiB wss=1MiB rate=100 seconds=600";

/// node1 has no hardware virtualization, node2 has it.
struct Kinds {
    cluster: Cluster,
    directory: tempfile::TempDir,
}

impl Kinds {
    fn start(machine: Machine) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut cluster = Cluster::start(machine, &Shape::default());
        for (node, kind) in [("node1", "software"), ("node2", "hardware")] {
            let before = cluster.node(node);
            let said = before["kvm"].as_str();
            assert!(
                matches!(said, Some("hardware" | "software")),
                "by the real self-test: {before}"
            );
            assert_eq!(before["kvm_trouble"], "", "{before}");
            let program = stand_in(directory.path(), kind);
            cluster.kill_daemon(node);
            cluster.start_daemon_with(node, &[("--vmm-binary", &program.to_string_lossy())]);
            cluster.wait_for_return(&before);
            assert_eq!(cluster.node(node)["kvm"], kind);
        }
        for manifest in [BOTH, SOFTWARE_ONLY] {
            import(&cluster, directory.path(), manifest);
        }
        Self { cluster, directory }
    }

    /// The blobs that a node has fetched.
    fn blobs(&self, node: &str) -> Vec<Vec<u8>> {
        let entries = fs::read_dir(self.cluster.state_dir().join(node).join("blobs")).expect("its cache");
        let read = |entry: fs::DirEntry| fs::read(entry.path()).expect("a blob");
        entries.map(|entry| read(entry.expect("an entry"))).collect()
    }
}

/// The VMM, but for its self-test.
fn stand_in(directory: &Path, kind: &str) -> PathBuf {
    let path = directory.join(format!("vmm-{kind}"));
    let real = paths::program("shoal-vmm");
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = --self-test ]; then\n  \
         echo '{{\"kvm\":\"{kind}\",\"ring3_kernel\":true,\"reason\":\"\"}}'\n  exit 0\nfi\nexec '{}' \"$@\"\n",
        real.display()
    );
    fs::write(&path, script).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
    path
}

fn import(cluster: &Cluster, directory: &Path, manifest: &str) {
    let probe = fs::read(vmm::probe_kernel()).expect("the probe's kernel");
    fs::write(directory.join("image.toml"), manifest).expect("written");
    fs::write(directory.join("plain"), &probe).expect("written");
    // What follows the last segment is not loaded.
    fs::write(directory.join("ring3"), [probe.as_slice(), b"ring3"].concat()).expect("written");
    cluster
        .shoal
        .ok(&["image", "import", &directory.to_string_lossy()]);
}

#[test]
fn a_node_boots_the_kernel_for_its_kind_and_fetches_no_other() {
    let Some(machine) = Machine::with_kvm("a kernel for each kind of KVM") else {
        return;
    };
    let kinds = Kinds::start(machine);
    let shoal = &kinds.cluster.shoal;
    let run = |node: &str, more: &[&str]| {
        let args = [more, &["run", "both", "--node", node, "--", "seconds=1"]].concat();
        let mut command = shoal.command(&args);
        let output = command.env("XDG_STATE_HOME", kinds.directory.path()).output();
        let output = output.expect("shoal starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    let wall = "boots its ring-3 kernel there";
    let (status, said) = run("node2", &[]);
    assert!(status == Some(0) && !said.contains(wall), "{status:?} {said}");
    let (status, said) = run("node1", &["-o", "json"]);
    assert!(status == Some(7) && !said.contains(wall), "{status:?} {said}");
    let (status, said) = run("node1", &[]);
    assert!(status == Some(7) && said.contains(wall), "{status:?} {said}");
    let (status, said) = run("node1", &[]);
    assert!(status == Some(7) && !said.contains(wall), "said once: {said}");

    let of = |node| {
        kinds
            .blobs(node)
            .iter()
            .map(|blob| blob.ends_with(b"ring3"))
            .collect::<Vec<_>>()
    };
    assert_eq!((of("node1"), of("node2")), (vec![true], vec![false]));
}

#[test]
fn a_vm_is_not_moved_to_the_other_kind_of_kvm() {
    let Some(machine) = Machine::with_kvm("moves between kinds of KVM") else {
        return;
    };
    let kinds = Kinds::start(machine);
    let (cluster, shoal) = (&kinds.cluster, &kinds.cluster.shoal);
    let words = [
        (
            "soft",
            "node1",
            "node2",
            "its KVM has hardware virtualization, and the VM was started without",
        ),
        (
            "hard",
            "node2",
            "node1",
            "its KVM has no hardware virtualization, and the VM was started with it",
        ),
    ];
    for (name, on, to, why) in words {
        let args = [
            "run",
            "both",
            "--detach",
            "--name",
            name,
            "--prefer-node",
            on,
            "--",
        ];
        shoal.ok(&[&args[..], &STAYS.split(' ').collect::<Vec<_>>()].concat());
        cluster.wait_for_heartbeats(name, 1);
        let refusal = shoal.fails(&["migrate", name, "--to", to]);
        assert!(refusal.stderr.contains(why), "{refusal:?}");
        let explained = shoal.json(&["explain", name]);
        let rejected = explained["nodes"][0]["rejected"].as_str().expect("a reason");
        assert!(rejected.contains(why), "{explained}");
        let refusal = shoal.fails(&["drain", on]);
        assert!(
            refusal.json["remaining"] == 1 && refusal.stderr.contains(why),
            "{refusal:?}"
        );
        shoal.ok(&["uncordon", on]);
    }
    assert_eq!(
        shoal.json(&["migrations"]),
        serde_json::json!([]),
        "nothing was started"
    );
    for (name, on, ..) in words {
        cluster.wait_for_heartbeats(name, 2);
        guest::assert_unharmed(&cluster.logs(name));
        let inspected = shoal.json(&["inspect", name]);
        let soft = on == "node1";
        let expected = if soft {
            ("software", "ring3")
        } else {
            ("hardware", "plain")
        };
        assert_eq!(
            (&inspected["kvm"], &inspected["kernel"]),
            (&expected.0.into(), &expected.1.into())
        );
        assert_eq!(inspected["guest_kernel_isolation"], !soft, "{inspected}");
        assert_eq!(
            shoal
                .ok(&["inspect", name])
                .contains("no isolation inside the guest"),
            soft
        );
    }
}

#[test]
fn what_no_kernel_of_an_image_can_do_is_refused_at_once() {
    let Some(machine) = Machine::with_kvm("images for one kind of KVM") else {
        return;
    };
    let kinds = Kinds::start(machine);
    let shoal = &kinds.cluster.shoal;
    for (args, words) in [
        (
            vec!["run", "software-only", "--node", "node2"],
            vec![
                "node2: its KVM has hardware virtualization, and image software-only has no kernel for that",
            ],
        ),
        (
            vec!["run", "both", "--cpus", "2", "--node", "node1"],
            vec!["node1: image both runs with 1 CPU where KVM has no hardware virtualization"],
        ),
        (
            vec!["run", "software-only", "--cpus", "2", "--queue"],
            vec![
                "node1: image software-only runs with 1 CPU",
                "node2: its KVM has hardware",
            ],
        ),
    ] {
        let refusal = shoal.fails(&args);
        assert_eq!(refusal.code, 3, "{refusal:?}");
        let said = refusal.json["error"]["message"].as_str().expect("text");
        for words in words {
            assert!(said.contains(words), "{refusal:?}");
        }
    }
    assert_eq!(shoal.json(&["queue"]), serde_json::json!([]));
    let wide = shoal.json(&["run", "both", "--cpus", "2", "--detach", "--", "seconds=600"]);
    assert_eq!(wide["node"], "node2");
    assert!(shoal.ok(&["nodes", "-o", "wide"]).contains("software"));
}
