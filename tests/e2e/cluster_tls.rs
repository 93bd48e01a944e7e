//! Certificates for migrations in a cluster: there unless turned off, and refused where they do not match.

use serde_json::Value;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};

use crate::CALM;

#[test]
fn vms_move_over_tls_and_only_between_nodes_whose_certificates_match() {
    let Some(machine) = Machine::with_kvm("certificates of a cluster") else {
        return;
    };
    let shape = Shape {
        nodes: 3,
        node_memory: "512MiB",
        ..Shape::default()
    };
    let mut cluster = Cluster::start(machine, &shape);
    let vm = cluster.run_probe("a", "node1", "96MiB", CALM);
    let certificate = cluster.state_dir().join("certs/node2/cert.pem");
    let shown = cluster
        .shoal
        .json(&["certs", "show", &certificate.to_string_lossy()]);
    assert_eq!(
        (&shown[0]["names"], &shown[0]["valid_now"], &shown[0]["authority"]),
        (&serde_json::json!(["node2"]), &true.into(), &false.into()),
        "{shown}"
    );
    let report = cluster.shoal.json(&["migrate", "a", "--to", "node2"]);
    assert_eq!(
        (&report["result"], &report["tls"]),
        (&"completed".into(), &true.into()),
        "{report}"
    );

    // node1 comes back with a certificate of another authority: the VMMs do not trust each other.
    let other = tempfile::tempdir().expect("a directory");
    let authority = other.path().to_string_lossy().into_owned();
    cluster.shoal.ok(&["certs", "init", &authority]);
    let made = cluster.shoal.json(&["certs", "issue", &authority, "node1"]);
    assert_eq!(made["certificate"]["names"][0], "node1", "{made}");
    let before = cluster.node("node1");
    cluster.kill_daemon("node1");
    let strange = other.path().join("node1").to_string_lossy().into_owned();
    cluster.start_daemon_with("node1", &[("--migration-tls", &strange)]);
    cluster.wait_for_return(&before);
    let stranger = cluster
        .shoal
        .output(&["-o", "json", "migrate", "a", "--to", "node1"]);
    let stranger: Value = serde_json::from_slice(&stranger.stdout).expect("a report");
    let why = stranger["reason"].as_str().expect("text");
    assert!(
        stranger["result"] == "failed" && why.contains("not signed by the authority"),
        "{stranger}"
    );
    assert_eq!(cluster.only_vmm(&vm).node, "node2");

    // It comes back with none: that is known before anything begins, and no plan sends anything there.
    let before = cluster.node("node1");
    cluster.kill_daemon("node1");
    cluster.start_daemon_without("node1", "--migration-tls");
    cluster.wait_for_return(&before);
    let lacks = "it has no certificate for migrations, and node2 sends VMs over TLS only";
    let refusal = cluster.shoal.fails(&["migrate", "a", "--to", "node1"]);
    assert!(refusal.code == 3 && refusal.stderr.contains(lacks), "{refusal:?}");
    assert_eq!(
        refusal.json["error"]["rejections"][0]["node"], "node1",
        "{refusal:?}"
    );
    let attempts = cluster
        .shoal
        .json(&["migrations"])
        .as_array()
        .expect("a list")
        .len();
    assert_eq!(attempts, 2, "the refused one never began");
    let report = cluster.shoal.json(&["migrate", "a"]);
    assert_eq!(report["to"], "node3", "the only one that can take it: {report}");
    cluster.shoal.ok(&["drain", "node2"]);
    let stuck = cluster.shoal.fails(&["drain", "node3"]);
    assert!(
        stuck.code == 1 && stuck.stderr.contains("has no certificate for migrations"),
        "{stuck:?}"
    );
    cluster.shoal.ok(&["uncordon", "node2"]);
    wait::until_true("the drain to go on", seconds(30), || {
        cluster.vm("a")["node"] == "node2"
    });
    // The other way round: what runs without can only go where none is needed.
    cluster.run_probe("bare", "node1", "96MiB", CALM);
    let refusal = cluster.shoal.fails(&["migrate", "bare", "--to", "node2"]);
    let takes = "it takes VMs over TLS only, and node1 has no certificate for migrations";
    assert!(refusal.code == 3 && refusal.stderr.contains(takes), "{refusal:?}");

    let before = cluster.node("node2");
    cluster.kill_daemon("node2");
    cluster.start_daemon_without("node2", "--migration-tls");
    cluster.wait_for_return(&before);
    let report = cluster.shoal.json(&["migrate", "bare", "--to", "node2"]);
    assert_eq!(
        (&report["result"], &report["tls"]),
        (&"completed".into(), &false.into()),
        "{report}"
    );
    for name in ["a", "bare"] {
        cluster.wait_for_heartbeats(name, 1);
        guest::assert_unharmed(&cluster.logs(name));
    }
}
