//! The best exchange of two VMs, for when no single move is good enough: the other node has no room for one more, or lacks
//! what the first has to spare.
//!
//! Both move at the same time, so both nodes need room for both meanwhile; what they hold and grow to afterwards must be
//! below the target. VMs that rules tie to others are not exchanged.

use crate::action::{Action, ActionKind, Plan};
use crate::cluster::Cluster;
use crate::cost::{Cost, Terms, cost};
use crate::destinations::Destinations;
use crate::effect::{Change, details, headline};
use crate::model::NodeState;
use crate::newcomer::Newcomer;
use crate::score::Use;

/// The dearest nodes are tried, with the VMs that weigh most there,
const SOURCES: usize = 8;
const VMS_OF_A_SOURCE: usize = 6;
/// and the cheapest, with those that weigh least.
const DESTINATIONS: usize = 12;
const VMS_OF_A_DESTINATION: usize = 8;

/// Two VMs and what exchanging them gains, the cost taken off.
#[derive(Debug, Clone, Copy)]
struct Swap {
    first: usize,
    second: usize,
    /// What the score falls by.
    benefit: f64,
    /// What is left of that when the cost of both moves is taken off.
    gain: f64,
}

/// Plans the exchanges that are worth it, the best first, into `plan`.
pub(crate) fn swap<'a>(
    cluster: &mut Cluster<'a>,
    terms: Terms,
    destinations: &Destinations<'a>,
    plan: &mut Plan,
) {
    if cluster.failover.is_some() {
        return;
    }
    while cluster.migrations + 2 <= cluster.policy.max_migrations {
        let Some(best) = best_swap(cluster, terms, destinations) else {
            return;
        };
        let (from, to) = (cluster.vms[best.first].node, cluster.vms[best.second].node);
        for (vm, other, node) in [(best.first, best.second, to), (best.second, best.first, from)] {
            let action = action(cluster, best, vm, other, node);
            plan.actions.push(action);
        }
        cluster.apply(best.first, to);
        cluster.apply(best.second, from);
    }
}

fn best_swap<'a>(cluster: &Cluster<'a>, terms: Terms, destinations: &Destinations<'a>) -> Option<Swap> {
    let idle = |node: &usize| {
        let node = &cluster.nodes[*node];
        node.view.state == NodeState::Ready && node.incoming == 0 && node.outgoing == 0
    };
    let rate = cluster.cost_rate;
    let mut sources: Vec<(usize, f64)> = (0..cluster.nodes.len())
        .filter(idle)
        .map(|node| (node, cluster.nodes[node].least_cost(rate)))
        .filter(|(_, cost)| *cost >= terms.min_gain)
        .collect();
    let dearest = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if sources.len() > SOURCES {
        sources.select_nth_unstable_by(SOURCES, dearest);
        sources.truncate(SOURCES);
    }
    sources.sort_by(dearest);
    let others: Vec<(usize, Vec<usize>)> = destinations
        .cheapest()
        .filter(idle)
        .take(DESTINATIONS)
        .map(|node| (node, by_weight(cluster, node, VMS_OF_A_DESTINATION, false)))
        .collect();
    let mut best: Option<Swap> = None;
    for (from, _) in sources {
        for &first in &by_weight(cluster, from, VMS_OF_A_SOURCE, true) {
            for (to, vms) in others.iter().filter(|(to, _)| *to != from) {
                for &second in vms {
                    let benefit = benefit(cluster, first, second);
                    let gain = terms.net(benefit, both(cluster, first, second));
                    let better = gain >= terms.min_gain && best.is_none_or(|best| gain > best.gain);
                    if better && fits(cluster, first, *to, second) && fits(cluster, second, from, first) {
                        best = Some(Swap {
                            first,
                            second,
                            benefit,
                            gain,
                        });
                    }
                }
            }
        }
    }
    best
}

/// The VMs that may leave a node, those that weigh most there, or least, first.
fn by_weight(cluster: &Cluster<'_>, node: usize, most: usize, heavy: bool) -> Vec<usize> {
    let free = |&vm: &usize| {
        cluster.vms[vm].converges && !cluster.together.ties(vm) && cluster.unsettled(vm).is_none()
    };
    let of = &cluster.nodes[node];
    let weigh = |vm: usize| of.saving(cluster.cost_rate, cluster.vms[vm].usage());
    let mut vms: Vec<(usize, f64)> = cluster
        .staying(node)
        .filter(free)
        .map(|vm| (vm, weigh(vm)))
        .collect();
    vms.sort_by(|a, b| {
        let order = a.1.total_cmp(&b.1);
        (if heavy { order.reverse() } else { order }).then(a.0.cmp(&b.0))
    });
    vms.truncate(most);
    vms.into_iter().map(|(vm, _)| vm).collect()
}

/// What an exchange lowers the score by. The node that gets more is charged more than that.
fn benefit(cluster: &Cluster<'_>, first: usize, second: usize) -> f64 {
    let (a, b) = (&cluster.vms[first], &cluster.vms[second]);
    let stability = cluster.policy.stability;
    let rate = cluster.cost_rate;
    let net = |comes: f64, goes: f64| {
        let net = comes - goes;
        if net > 0.0 { net * stability } else { net }
    };
    let change = |comes: Use, goes: Use| Use {
        cpu: net(comes.cpu, goes.cpu),
        memory: net(comes.memory, goes.memory),
    };
    let (from, to) = (&cluster.nodes[a.node], &cluster.nodes[b.node]);
    -from.worse(rate, change(b.usage(), a.usage())) - to.worse(rate, change(a.usage(), b.usage()))
}

/// What both moves cost, at the same time.
fn both(cluster: &Cluster<'_>, first: usize, second: usize) -> Cost {
    let of = |vm: usize| cost(cluster.policy, &cluster.vms[vm]);
    of(first).and(of(second))
}

fn fits(cluster: &Cluster<'_>, vm: usize, to: usize, leaves: usize) -> bool {
    let horizon = cluster.policy.usher_horizon.as_secs_f64();
    let newcomer = Newcomer::exchanged(cluster, vm, cluster.vms[leaves].memory_at(horizon));
    newcomer.check(cluster, to).is_ok()
}

fn action(cluster: &Cluster<'_>, swap: Swap, vm: usize, other: usize, to: usize) -> Action {
    let (first, second) = (&cluster.vms[swap.first], &cluster.vms[swap.second]);
    let (cpu, memory) = (first.demand - second.demand, first.resident - second.resident);
    let changes = [
        Change::new(&cluster.nodes[first.node], -cpu, -memory),
        Change::new(&cluster.nodes[second.node], cpu, memory),
    ];
    let cost = both(cluster, swap.first, swap.second);
    let name = &cluster.vms[other].view.name;
    let reason = format!(
        "trades places with '{name}': {}",
        headline(changes[0], changes[1], cost)
    );
    Action::new(cluster, ActionKind::Swap, vm, to, reason).with_details(details(changes, swap.benefit, cost))
}
