//! A guest that goes back and forth between two nodes of a cluster, as a user asks for it.

use std::thread;
use std::time::Duration;

use shoal_proto::cluster::MigrateVmRequest;
use shoal_proto::vm::MigrationResult;

use super::chain::count_report;
use super::plan::{self, Random, Trouble};
use super::progress;
use super::summary::Summary;
use crate::cluster::{Cluster, Shape};
use crate::guest;
use crate::machine::Machine;
use crate::migration::WatchedMigration;
use crate::process;
use crate::wait::{self, seconds};

const NAME: &str = "soak";
const MEMORY: u64 = 48 << 20;
const PROBE: &str = "beat=200 fill=24MiB wss=8MiB rate=8000 pattern=random";

/// Moves a guest so many times.
pub fn run(machine: Machine, moves: u32, random: &mut Random, summary: &mut Summary) {
    let cluster = Cluster::start(machine, &Shape::default());
    let vm = cluster.run_probe(NAME, "node1", "48MiB", PROBE);
    let mut at = "node1";
    for number in 1..=moves {
        let planned = plan::next(random);
        let what = format!("move {number} through the cluster, {planned:?}");
        let to = if at == "node1" { "node2" } else { "node1" };
        let request = MigrateVmRequest {
            vm: NAME.into(),
            to_node: to.into(),
            policy: Some(planned.policy),
        };
        let migration = WatchedMigration::start(cluster.shoal.endpoint(), request);
        if let Trouble::Cancel(after) = planned.trouble {
            thread::sleep(Duration::from_millis(after));
            // It may not have begun, be over, or be too late.
            drop(cluster.shoal.output(&["migrations", "cancel", NAME]));
        }
        let outcome = migration
            .outcome()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let report = outcome.report.unwrap_or_else(|| panic!("{what}: no report"));
        count_report(&planned.policy, &report, summary);
        summary.count("through a cluster");
        match report.result() {
            MigrationResult::Completed => at = to,
            MigrationResult::Cancelled if matches!(planned.trouble, Trouble::Cancel(_)) => {}
            _ => panic!("{what}: {report:?}"),
        }
        let now = cluster.wait_for_state(NAME, "running", seconds(30));
        assert_eq!(now["node"], at, "{what}: {now}");
        let vmm = cluster.only_vmm(&vm);
        wait::until_true("one guest's memory and no port", seconds(30), || {
            process::memory(vmm.identity.pid).guest == MEMORY
                && process::listening_ports(vmm.identity.pid).is_empty()
        });
        summary.hold("VMM of a node", vmm.identity.pid);
        for (name, pid) in cluster.daemons() {
            summary.hold(&name, pid);
        }
        progress("through a cluster", number, moves, summary);
    }
    cluster.wait_for_heartbeats(NAME, 5);
    guest::assert_unharmed(&cluster.logs(NAME));
    assert_eq!(cluster.events_of_kind("vm-failed").len(), 0);
}
