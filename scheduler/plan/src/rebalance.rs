//! Rebalancing: the moves that lower the score most, less what they cost, until none lowers it enough.
//!
//! Against moving back and forth: the source counts with the load it sees itself, the destination with the load it exports
//! and 1.3 times what the VM uses (the 130 % of MOSIX), a VM that moved rests, and a node that
//! receives or sends already does not send another: load figures are in flux there, and an urgent move needs the link.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::action::{Action, ActionKind, Plan};
use crate::cluster::{Cluster, bytes};
use crate::destinations::Destinations;
use crate::model::NodeState;
use crate::place::Newcomer;
use crate::score::Use;

/// Once a good move is known, so many VMs are tried for a better one.
const TRIES: usize = 2000;

/// A VM and the most that moving it could gain.
#[derive(Debug, Clone, Copy)]
struct Bound {
    gain: f64,
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
    gain: f64,
}

/// Plans the moves that are worth it, the best first, into `plan`.
pub(crate) fn rebalance(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    if cluster.migrations >= cluster.policy.max_migrations {
        return;
    }
    let mut bounds: BinaryHeap<Bound> = (0..cluster.vms.len())
        .filter_map(|vm| bound(cluster, vm))
        .collect();
    if bounds.is_empty() {
        return;
    }
    let mut destinations = Destinations::new(cluster);
    while cluster.migrations < cluster.policy.max_migrations {
        let Some(best) = best_move(cluster, &mut bounds, &mut destinations) else {
            return;
        };
        let reason = reason(cluster, best);
        plan.actions.push(Action::new(
            cluster,
            ActionKind::Rebalance,
            best.vm,
            best.to,
            reason,
        ));
        cluster.apply(best.vm, best.to);
    }
}

/// What moving this VM would gain if its destination were free of charge; none if that is too little or it cannot move.
fn bound(cluster: &Cluster<'_>, number: usize) -> Option<Bound> {
    let (policy, vm) = (cluster.policy, &cluster.vms[number]);
    let node = &cluster.nodes[vm.node];
    let may_leave = matches!(node.view.state, NodeState::Ready | NodeState::Cordoned)
        && node.incoming == 0
        && node.outgoing == 0
        && vm.converges
        && cluster.may_send(vm.node);
    if !may_leave
        || cluster
            .immobile(number, policy.cool_down.max(policy.retry_after))
            .is_some()
        || cluster.is_needed(number)
    {
        return None;
    }
    let gain = node.saving(policy.cost_base, vm.usage()) - policy.cost_per_second * vm.move_seconds;
    (gain >= policy.min_gain).then_some(Bound { gain, vm: number })
}

/// The best move. VMs are tried in the order of their bounds, until no bound can beat the best.
fn best_move<'a>(
    cluster: &Cluster<'a>,
    bounds: &mut BinaryHeap<Bound>,
    destinations: &mut Destinations<'a>,
) -> Option<Move> {
    let mut best: Option<Move> = None;
    let mut tried = Vec::new();
    while let Some(stale) = bounds.pop() {
        // Moves planned since may have lowered it.
        let Some(fresh) = bound(cluster, stale.vm) else {
            continue;
        };
        if best.is_some_and(|best| best.gain >= fresh.gain) {
            tried.push(fresh);
            if best.is_some_and(|best| best.gain >= stale.gain) {
                break;
            }
            continue;
        }
        let found = best_destination(cluster, fresh, destinations);
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
        if cluster.nodes[to].outgoing > 0 || newcomer.check(cluster, to).is_err() {
            continue;
        }
        let gain = bound.gain - cluster.nodes[to].charge(policy.cost_base, charged);
        if gain >= policy.min_gain && best.is_none_or(|best| gain > best.gain) {
            best = Some(Move {
                vm: bound.vm,
                to,
                gain,
            });
        }
    }
    best
}

fn reason(cluster: &Cluster<'_>, best: Move) -> String {
    let vm = &cluster.vms[best.vm];
    let (from, to) = (&cluster.nodes[vm.node], &cluster.nodes[best.to]);
    format!(
        "better balance by {:.2}, its cost of {:.1} s taken off: {} goes from load {:.2} to {:.2} on {} CPUs and from {} to \
         {} of {}, {} from {:.2} to {:.2} on {} CPUs and from {} to {} of {}",
        best.gain,
        vm.move_seconds,
        from.view.name,
        from.load_local,
        (from.load_local - vm.demand).max(0.0),
        from.view.cpus,
        bytes(from.settled),
        bytes(from.settled - vm.resident),
        from.view.memory,
        to.view.name,
        to.load_exported,
        to.load_exported + vm.demand,
        to.view.cpus,
        bytes(to.settled),
        bytes(to.settled + vm.resident),
        to.view.memory,
    )
}
