//! Rebalancing: the moves that lower the score most, less what they cost, until none lowers it enough.
//!
//! Against moving back and forth, and for nothing: the source counts with the load that it has at least, by what is known of the
//! error of the figures, the destination with that which it has at most and 1.3 times what the VM uses (the 130 % of MOSIX); a
//! VM that moved rests, one that has just started is left alone, and a node that receives or sends already does not send
//! another, since an urgent move needs the link.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::action::{Action, ActionKind, Plan};
use crate::cluster::Cluster;
use crate::cost::{Cost, Terms, cost};
use crate::destinations::Destinations;
use crate::effect::{Change, details, headline};
use crate::model::NodeState;
use crate::newcomer::Newcomer;
use crate::score::Use;
use crate::swap::swap;

/// Once a good move is known, so many VMs are tried for a better one.
const TRIES: usize = 2000;

/// A VM and the most that moving it could gain.
#[derive(Debug, Clone, Copy)]
struct Bound {
    gain: f64,
    saving: f64,
    cost: Cost,
    vm: usize,
}

impl Ord for Bound {
    fn cmp(&self, other: &Self) -> Ordering {
        self.gain.total_cmp(&other.gain).then(other.vm.cmp(&self.vm))
    }
}
impl PartialOrd for Bound {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Bound {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Bound {}

#[derive(Debug, Clone, Copy)]
struct Move {
    vm: usize,
    to: usize,
    /// What is left of the benefit.
    gain: f64,
    benefit: f64,
    cost: Cost,
}

/// Plans the moves that are worth it, the best first, into `plan`.
pub(crate) fn rebalance(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    let Some(terms) = Terms::new(cluster.policy) else {
        return;
    };
    if cluster.migrations >= cluster.policy.max_migrations {
        return;
    }
    let mut bounds: BinaryHeap<Bound> = (0..cluster.vms.len())
        .filter_map(|vm| bound(cluster, terms, vm))
        .collect();
    let mut destinations = Destinations::new(cluster);
    while cluster.migrations < cluster.policy.max_migrations {
        let Some(best) = best_move(cluster, terms, &mut bounds, &mut destinations) else {
            return swap(cluster, terms, &destinations, plan);
        };
        let action = action(cluster, best);
        plan.actions.push(action);
        cluster.apply(best.vm, best.to);
    }
}

/// What moving this VM would gain if its destination were free of charge; none if that is too little or it cannot move.
fn bound(cluster: &Cluster<'_>, terms: Terms, number: usize) -> Option<Bound> {
    let (policy, vm) = (cluster.policy, &cluster.vms[number]);
    let node = &cluster.nodes[vm.node];
    let may_leave = matches!(node.view.state, NodeState::Ready | NodeState::Cordoned)
        && node.incoming == 0
        && node.outgoing == 0
        && vm.converges
        && cluster.may_send(vm.node);
    if !may_leave || cluster.unsettled(number).is_some() || cluster.is_needed(number) {
        return None;
    }
    let saving = node.saving(cluster.cost_rate, vm.usage());
    if saving < terms.min_gain {
        return None;
    }
    let cost = cost(policy, vm);
    let gain = terms.net(saving, cost);
    (gain >= terms.min_gain).then_some(Bound {
        gain,
        saving,
        cost,
        vm: number,
    })
}

/// The best move. VMs are tried in the order of their bounds, until no bound can beat the best.
fn best_move<'a>(
    cluster: &Cluster<'a>,
    terms: Terms,
    bounds: &mut BinaryHeap<Bound>,
    destinations: &mut Destinations<'a>,
) -> Option<Move> {
    let mut best: Option<Move> = None;
    let mut tried = Vec::new();
    while let Some(stale) = bounds.pop() {
        // Moves planned since may have lowered it.
        let Some(fresh) = bound(cluster, terms, stale.vm) else {
            continue;
        };
        if best.is_some_and(|best| best.gain >= fresh.gain) {
            tried.push(fresh);
            if best.is_some_and(|best| best.gain >= stale.gain) {
                break;
            }
            continue;
        }
        let found = best_destination(cluster, terms, fresh, destinations);
        if let Some(found) = found
            && best.is_none_or(|best| found.gain > best.gain)
        {
            best = Some(found);
        }
        tried.push(fresh);
        if best.is_some() && tried.len() >= TRIES {
            break;
        }
    }
    bounds.extend(
        tried
            .into_iter()
            .filter(|bound| best.is_some_and(|best| best.vm != bound.vm)),
    );
    best
}

fn best_destination<'a>(
    cluster: &Cluster<'a>,
    terms: Terms,
    bound: Bound,
    destinations: &mut Destinations<'a>,
) -> Option<Move> {
    let policy = cluster.policy;
    let newcomer = Newcomer::balanced(cluster, bound.vm);
    let charged = Use {
        cpu: newcomer.usage.cpu * policy.stability,
        memory: newcomer.usage.memory * policy.stability,
    };
    let mut best: Option<Move> = None;
    for &to in destinations.of(cluster, bound.vm).iter() {
        if cluster.nodes[to].outgoing > 0 {
            continue;
        }
        let benefit = bound.saving - cluster.nodes[to].charge(cluster.cost_rate, charged);
        let gain = terms.net(benefit, bound.cost);
        if gain >= terms.min_gain
            && best.is_none_or(|best| gain > best.gain)
            && newcomer.check(cluster, to).is_ok()
        {
            best = Some(Move {
                vm: bound.vm,
                to,
                gain,
                benefit,
                cost: bound.cost,
            });
        }
    }
    best
}

fn action(cluster: &Cluster<'_>, best: Move) -> Action {
    let vm = &cluster.vms[best.vm];
    let from = Change::new(&cluster.nodes[vm.node], -vm.demand, -vm.resident);
    let to = Change::new(&cluster.nodes[best.to], vm.demand, vm.resident);
    let reason = headline(from, to, best.cost);
    Action::new(cluster, ActionKind::Rebalance, best.vm, best.to, reason).with_details(details(
        [from, to],
        best.benefit,
        best.cost,
    ))
}
