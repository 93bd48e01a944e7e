//! Why a VM is where it is, and why it does or does not move: the same filters, costs and gains as in a round, for one VM
//! and every node.

use std::time::Duration;

use shoal_estimate::Estimate;

use crate::action::Plan;
use crate::cluster::{Cluster, bytes, duration};
use crate::comply::wrong;
use crate::cost::{Terms, cost};
use crate::effect::Change;
use crate::model::{Bytes, BytesPerSecond, ClusterSnapshot, NodeName, VmId};
use crate::newcomer::Newcomer;
use crate::policy::{Mode, Policy};
use crate::reject::RejectReason;
use crate::round::round;
use crate::score::Use;

/// What is known and predicted of one VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub node: NodeName,
    /// CPUs it would use if it got them; none while it has not been seen for long enough: it counts with all it asked for.
    pub cpus: Option<Estimate>,
    /// Memory it holds.
    pub memory: Bytes,
    /// How fast that grows.
    pub growth: BytesPerSecond,
    /// How long moving it would take.
    pub move_time: Duration,
    /// How long it would be paused.
    pub downtime: Duration,
    /// How much longer work takes on its node than if each VM had the CPUs that it wants, now and without it.
    pub slowdown: (f64, f64),
    /// Part of its node's memory that is held, now and without it.
    pub memory_part: (f64, f64),
    /// Every other node, those with the highest gain first, then those that cannot take it.
    pub nodes: Vec<Alternative>,
    /// What becomes of it now, and why.
    pub verdict: String,
}

/// Another node.
#[derive(Debug, Clone, PartialEq)]
pub struct Alternative {
    /// Which.
    pub node: NodeName,
    /// Why it cannot take the VM in a move for balance; none: it can.
    pub rejected: Option<RejectReason>,
    /// How much longer work takes there, now and with it.
    pub slowdown: (f64, f64),
    /// Part of the node's memory that is held, now and with it.
    pub memory_part: (f64, f64),
    /// When what is gained for sure outweighs the move; none: nothing is.
    pub pays_back_after: Option<Duration>,
    /// What would be gained, the cost taken off, in score.
    gain: f64,
}

/// Explains a VM; none if the snapshot does not have it, or not its node.
#[must_use]
pub fn explain(snapshot: &ClusterSnapshot, policy: &Policy, vm: &VmId) -> Option<Explanation> {
    let cluster = Cluster::new(snapshot, policy);
    let number = cluster.number(vm)?;
    let (vm, terms) = (&cluster.vms[number], Terms::new(policy));
    let cost = cost(policy, vm);
    let saving = cluster.nodes[vm.node].saving(cluster.cost_rate, vm.usage());
    let newcomer = Newcomer::balanced(&cluster, number);
    let charged = Use {
        cpu: newcomer.usage.cpu * policy.stability,
        memory: newcomer.usage.memory * policy.stability,
    };
    let mut nodes: Vec<Alternative> = (0..cluster.nodes.len())
        .filter(|&to| to != vm.node)
        .map(|to| {
            let charge = cluster.nodes[to].charge(cluster.cost_rate, charged);
            let benefit = saving - charge;
            let with = Change::new(&cluster.nodes[to], vm.demand, vm.resident);
            Alternative {
                node: cluster.nodes[to].view.name.clone(),
                rejected: newcomer.check(&cluster, to).err(),
                slowdown: with.slowdowns(),
                memory_part: with.parts_of_memory(),
                gain: terms.map_or(benefit, |terms| terms.net(benefit, cost)),
                pays_back_after: (benefit > 0.0).then(|| Terms::pays_back_after(benefit, cost)),
            }
        })
        .collect();
    nodes.sort_by(|a, b| {
        let rejected = |node: &Alternative| node.rejected.is_some();
        rejected(a)
            .cmp(&rejected(b))
            .then(b.gain.total_cmp(&a.gain))
            .then(a.node.cmp(&b.node))
    });
    let plan = round(snapshot, policy);
    let verdict = verdict(&cluster, number, terms, &nodes, &plan);
    let without = Change::new(&cluster.nodes[vm.node], -vm.demand, -vm.resident);
    Some(Explanation {
        name: vm.view.name.to_string(),
        node: vm.view.node.clone(),
        cpus: vm.demand_error.map(|error| Estimate {
            mean: vm.demand,
            error,
        }),
        memory: bytes(vm.resident),
        growth: vm.view.growth,
        move_time: duration(cost.seconds),
        downtime: duration(cost.downtime),
        slowdown: without.slowdowns(),
        memory_part: without.parts_of_memory(),
        nodes,
        verdict,
    })
}

fn verdict(
    cluster: &Cluster<'_>,
    number: usize,
    terms: Option<Terms>,
    nodes: &[Alternative],
    plan: &Plan,
) -> String {
    let (policy, vm) = (cluster.policy, &cluster.vms[number]);
    if let Some(action) = plan.actions.iter().find(|action| action.vm == vm.view.id) {
        return format!("moves to {} ({}): {}", action.to, action.kind, action.reason);
    }
    if let Some(note) = plan
        .notes
        .iter()
        .find(|note| note.vm.as_ref() == Some(&vm.view.id))
    {
        return format!("stays: {}", note.text);
    }
    if let Some(why) = cluster.unsettled(number) {
        return format!("stays: {why}");
    }
    let broken =
        wrong(cluster, number).map_or_else(String::new, |why| format!(" (against its rules: {why})"));
    let Some(terms) = terms else {
        return format!("stays{broken}: aggressiveness 1 moves nothing for balance");
    };
    if policy.mode == Mode::Pack {
        return format!("stays{broken}: its node is not among those that are emptied now");
    }
    format!("stays{broken}: {}", why_not(cluster, number, terms, nodes))
}

/// Why a VM that may be moved is not moved for balance.
fn why_not(cluster: &Cluster<'_>, number: usize, terms: Terms, nodes: &[Alternative]) -> String {
    let (policy, vm) = (cluster.policy, &cluster.vms[number]);
    let node = &cluster.nodes[vm.node];
    if !vm.converges {
        return format!(
            "it dirties {}/s, too much for a link of {}/s",
            bytes(vm.dirty),
            bytes(vm.link)
        );
    }
    if cluster.is_needed(number) {
        return "another VM there is to be with it".to_owned();
    }
    let Some(best) = nodes.first().filter(|best| best.rejected.is_none()) else {
        return "no other node can take it".to_owned();
    };
    if best.gain < terms.min_gain {
        return not_worth_it(cluster, number, best);
    }
    if node.outgoing > 0 || node.incoming > 0 {
        return format!(
            "{} sends {} VMs and receives {}; its load is not known before that has ended",
            node.view.name, node.outgoing, node.incoming
        );
    }
    if cluster.migrations >= policy.max_migrations {
        return format!(
            "{} migrations are under way, which is the limit",
            cluster.migrations
        );
    }
    format!(
        "moving it to {} would be worth it; other moves gain more and come first",
        best.node
    )
}

/// Why the best move is none.
fn not_worth_it(cluster: &Cluster<'_>, number: usize, best: &Alternative) -> String {
    let vm = &cluster.vms[number];
    let here = &cluster.nodes[vm.node];
    let what = if here.slowdown() <= 1.0 && here.settled <= here.memory * cluster.policy.usher_target {
        format!("{} has CPUs and memory enough", here.view.name)
    } else {
        let there = best.slowdown.1;
        format!(
            "{}, the best other node, would not be better by more than the move costs and the figures may be off: slowdown here \
             {:.1}, there {there:.1} with it",
            best.node,
            here.slowdown(),
        )
    };
    if vm.demand_error.is_none() {
        return format!("{what}; how much CPU it wants is not known yet");
    }
    what
}
