//! Several schedulers, and the death of the one that leads.

use shoal_proto::vm::VmState;
use shoal_tests::cluster::{assert_at_most_one_runs, vmms_below};
use shoal_tests::machine::{Machine, say};
use shoal_tests::schedulers::Schedulers;
use shoal_tests::wait::{self, seconds};
use shoal_tests::{guest, paths};
use std::time::Instant;

use crate::CALM;

/// A node sends two at a time: when two have gone and two are on their way, two are still to come.
const VMS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const NODES: [&str; 3] = ["node1", "node2", "node3"];

#[test]
fn a_drain_ends_although_the_leader_is_killed_in_the_middle_of_it() {
    let Some(machine) = Machine::with_kvm("death of the scheduler that leads") else {
        return;
    };
    let Some(mut cluster) = Schedulers::start(3, &[]) else {
        return;
    };
    for node in NODES {
        cluster.start_agent(node, &["--memory", "1GiB", "--cpus", "4"]);
    }
    cluster.wait_for_nodes(&NODES);
    let image = paths::image("probe");
    cluster.shoal.ok(&["image", "import", &image.to_string_lossy()]);
    let ids = VMS.map(|name| {
        let mut args = vec![
            "run",
            "probe",
            "--detach",
            "--name",
            name,
            "--prefer-node",
            "node1",
        ];
        args.extend(["--memory", "96MiB", "--"]);
        args.extend(CALM.split(' '));
        let id = cluster.shoal.json(&args)["id"]
            .as_str()
            .expect("an id")
            .to_owned();
        wait::until_true("the probe to fill its memory", seconds(90), || {
            let beats = guest::heartbeats(&cluster.shoal.ok(&["logs", name]));
            beats.last().is_some_and(|beat| beat.filled >= 64 << 20)
        });
        id
    });
    // So that the drain takes some seconds, and a migration is under way at any moment of it.
    cluster
        .shoal
        .ok(&["migrations", "defaults", "set", "--cluster-bandwidth", "24MiB"]);

    let (leader, term) = cluster.wait_for_leader("");
    let drain = cluster.shoal.start(&["drain", "node1"]);
    wait::until_true("the drain to be in its middle", seconds(90), || {
        let vms = VMS.map(|name| cluster.vm(name));
        vms.iter()
            .any(|vm| vm["node"] != "node1" && vm["state"] == "running")
            && vms.iter().any(|vm| vm["state"] == "migrating")
            && vms
                .iter()
                .any(|vm| vm["node"] == "node1" && vm["state"] == "running")
    });
    cluster.kill(&leader);
    let died = Instant::now();
    for id in &ids {
        assert_at_most_one_runs(&vmms_below(cluster.directory(), id));
    }
    let (next, next_term) = cluster.wait_for_leader(&leader);
    say(&format!(
        "{next} leads {:.1} s after {leader} was killed",
        died.elapsed().as_secs_f64()
    ));
    assert!(next_term > term);

    let drained = drain.wait_with_output().expect("an end of the drain");
    say(&format!(
        "the drain ended after {:.1} s",
        died.elapsed().as_secs_f64()
    ));
    let stderr = String::from_utf8_lossy(&drained.stderr);
    assert!(drained.status.success(), "{stderr}");
    let drained: serde_json::Value = serde_json::from_slice(&drained.stdout).expect("a result");
    assert_eq!(drained["remaining"], 0, "{drained}");
    wait::until_true("the node to be drained", seconds(60), || {
        cluster.node("node1")["state"] == "cordoned"
    });

    for (name, id) in VMS.iter().zip(&ids) {
        let vmm = wait::until("one running VMM", seconds(90), || {
            let mut vmms = vmms_below(cluster.directory(), id);
            assert_at_most_one_runs(&vmms);
            let is_settled = vmms.len() == 1 && vmms[0].state() == Some(VmState::Running);
            is_settled.then(|| vmms.remove(0))
        });
        wait::until_true("the records to agree", seconds(60), || {
            let vm = cluster.vm(name);
            vm["state"] == "running" && vm["node"] == vmm.node.as_str() && vm["epoch"] == vmm.epoch
        });
        assert_ne!(vmm.node, "node1");
        // The console that the dead leader had taken is with it; what came since is here.
        let beats = || guest::heartbeats(&cluster.shoal.ok(&["logs", name]));
        wait::until_true("heartbeats at the new leader", seconds(60), || beats().len() >= 3);
        guest::assert_unharmed(&cluster.shoal.ok(&["logs", name]));
    }
    drop(machine);
}
