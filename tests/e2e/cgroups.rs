//! VMs in cgroups with a CPU quota.

use std::fs;

use shoal_tests::cgroups::Groups;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest;
use shoal_tests::machine::Machine;

use crate::CALM;

const QUOTAS: [f64; 2] = [0.5, 0.75];

#[test]
fn vms_run_in_their_nodes_cgroup_and_its_quota_is_known() {
    let Some(machine) = Machine::with_kvm_and_root("VMs in cgroups") else {
        return;
    };
    let groups = Groups::make("shoal-e2e", &QUOTAS).expect("cgroups");
    let shape = Shape {
        cgroups: Some(groups.directory().to_owned()),
        ..Shape::default()
    };
    let cluster = Cluster::start(machine, &shape);
    for (node, quota) in ["node1", "node2"].into_iter().zip(QUOTAS) {
        assert_eq!(cluster.node(node)["cpu_quota"], quota);
    }
    let vm = cluster.run_probe("a", "node1", "128MiB", CALM);
    let group_of = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("its cgroups");
    for node in ["node2", "node1"] {
        assert_eq!(
            cluster.shoal.json(&["migrate", "a", "--to", node])["result"],
            "completed"
        );
        let vmm = cluster.only_vmm(&vm);
        let (groups, own) = (group_of(vmm.identity.pid), format!("/shoal-e2e/{node}\n"));
        assert!(groups.contains(&own), "{groups} should contain {own}");
    }
    let (_, agent) = cluster.daemons().pop().expect("a daemon");
    assert!(!group_of(agent).contains("shoal-e2e"), "the agent stays outside");
    cluster.wait_for_heartbeats("a", 2);
    guest::assert_unharmed(&cluster.logs("a"));
    drop(cluster);
    let directory = groups.directory().to_owned();
    drop(groups);
    assert!(!directory.exists(), "nothing is left of it");
}
