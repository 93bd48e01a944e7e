//! Why a VM is where it is, and why it does or does not move: the same filters, costs and gains as in a round, for one VM
//! and every node.

use std::time::Duration;

use crate::action::Plan;
use crate::cluster::{Cluster, bytes, duration};
use crate::comply::wrong;
use crate::cost::{Terms, cost};
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
    /// CPUs it uses, or would if it got them.
    pub cpus: f64,
    /// Memory it holds.
    pub memory: Bytes,
    /// How fast that grows.
    pub growth: BytesPerSecond,
    /// How long moving it would take.
    pub move_time: Duration,
    /// How long it would be paused.
    pub downtime: Duration,
    /// What that costs, in score times seconds.
    pub cost: f64,
    /// What its node would save without it, in score.
    pub saving: f64,
    /// The least gain worth a move for balance; none: nothing is moved for balance.
    pub min_gain: Option<f64>,
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
    /// What the node would be charged, in score.
    pub charge: f64,
    /// What would be gained, the cost taken off.
    pub gain: f64,
    /// When that has paid back; none if there is no gain.
    pub pays_back_after: Option<Duration>,
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
            Alternative {
                node: cluster.nodes[to].view.name.clone(),
                rejected: newcomer.check(&cluster, to).err(),
                charge,
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
    Some(Explanation {
        name: vm.view.name.to_string(),
        node: vm.view.node.clone(),
        cpus: vm.demand,
        memory: bytes(vm.resident),
        growth: vm.view.growth,
        move_time: duration(cost.seconds),
        downtime: duration(cost.downtime),
        cost: cost.total,
        saving,
        min_gain: terms.map(|terms| terms.min_gain),
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
    if let Some(why) = cluster.immobile(number, policy.cool_down.max(policy.retry_after)) {
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
        return format!(
            "the best move, to {}, would gain {:.2}, its cost taken off; less than {:.2} is not worth a move",
            best.node, best.gain, terms.min_gain
        );
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
        "moving it to {} would gain {:.2}; other moves gain more and come first",
        best.node, best.gain
    )
}
