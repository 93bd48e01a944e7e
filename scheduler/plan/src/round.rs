//! One round: ushering, then draining, then rules, then rebalancing or packing, sharing the limits on migrations at once.
//! What ushering had suspended runs on where its node has room again, or goes to where there is room.

use crate::action::Plan;
use crate::cluster::Cluster;
use crate::comply::comply;
use crate::drain::drain;
use crate::last_resort;
use crate::model::ClusterSnapshot;
use crate::pack::pack;
use crate::policy::{Mode, Policy};
use crate::rebalance::rebalance;
use crate::usher::usher;

/// What to do now. The same snapshot and policy give the same plan. The policy must pass [`Policy::check`].
#[must_use]
pub fn round(snapshot: &ClusterSnapshot, policy: &Policy) -> Plan {
    plan(snapshot, policy, true)
}

/// As [`round`] without rebalancing or packing: for clusters whose owner wants moves only where they must be.
#[must_use]
pub fn urgent(snapshot: &ClusterSnapshot, policy: &Policy) -> Plan {
    plan(snapshot, policy, false)
}

fn plan(snapshot: &ClusterSnapshot, policy: &Policy, balance: bool) -> Plan {
    let mut cluster = Cluster::new(snapshot, policy);
    let mut plan = Plan {
        score_before: cluster.score(),
        slowdown_before: cluster.slowdown(),
        ..Plan::default()
    };
    usher(&mut cluster, &mut plan);
    drain(&mut cluster, &mut plan);
    comply(&mut cluster, &mut plan);
    last_resort::run_on(&mut cluster, &mut plan);
    match policy.mode {
        Mode::Spread if balance => rebalance(&mut cluster, &mut plan),
        Mode::Pack if balance => pack(&mut cluster, &mut plan),
        _ => {}
    }
    // One that is moved for another reason, such as a drain, need not stand still; one that runs on does so after its move.
    let actions = &plan.actions;
    for holds in [&mut plan.suspend, &mut plan.resume] {
        holds.retain(|hold| actions.iter().all(|action| action.vm != hold.vm));
    }
    plan.score_after = cluster.score();
    plan.slowdown_after = cluster.slowdown();
    plan
}
