//! Packing: the VMs on as few nodes as possible, so that others are empty and can be switched off.
//!
//! First a node whose CPUs are short gets rid of VMs, those that move fastest first. Then the least used node is emptied, if
//! all of its VMs fit on nodes that are not empty, below the targets of memory and CPU; then the next. A VM goes to the most
//! used node that has room for it. A node is emptied whole or not at all, so packing ends when no more can be emptied.
//! VMs that rules tie to others are not moved.

use std::collections::HashMap;

use crate::action::{Action, ActionKind, Plan};
use crate::cluster::{Cluster, bytes};
use crate::cost::{Cost, Terms, cost};
use crate::model::NodeState;
use crate::newcomer::{Beside, Newcomer};
use crate::place::{best_node, has_cpu};

/// What an empty node is worth, in score: somewhat more than the CPU of a full one costs.
const EMPTY_NODE_GAIN: f64 = 20.0;
/// So many nodes are tried in a round.
const TRIES: usize = 32;

/// Plans the moves, into `plan`, and names the nodes that are empty.
pub(crate) fn pack(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    if let Some(terms) = Terms::new(cluster.policy) {
        relieve(cluster, plan);
        empty(cluster, terms, plan);
    }
    plan.empty_nodes = (0..cluster.nodes.len())
        .filter(|&node| {
            let node = &cluster.nodes[node];
            node.view.state == NodeState::Ready && node.vms.iter().all(|&vm| cluster.vms[vm].leaving)
        })
        .filter(|&node| cluster.nodes[node].incoming == 0)
        .map(|node| cluster.nodes[node].view.name.clone())
        .collect();
}

/// Takes VMs off nodes that are short of CPU, at most one at a time.
fn relieve(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    let short = |node: &usize| {
        let node = &cluster.nodes[*node];
        let settled = node.outgoing == 0 && node.incoming == 0;
        node.view.state == NodeState::Ready && settled && node.least_load() > node.cpu_capacity
    };
    let nodes: Vec<usize> = (0..cluster.nodes.len()).filter(short).take(TRIES).collect();
    for number in nodes {
        if !cluster.may_send(number) {
            continue;
        }
        let node = &cluster.nodes[number];
        // One that gives back at least a tenth of what is too much.
        let least = (node.least_load() - node.cpu_capacity) / 10.0;
        let mut vms: Vec<usize> = cluster
            .staying(number)
            .filter(|&vm| cluster.vms[vm].demand >= least && is_free(cluster, vm))
            .collect();
        vms.sort_by(|&a, &b| {
            let seconds = |vm: usize| cluster.vms[vm].move_seconds;
            seconds(a).total_cmp(&seconds(b)).then(a.cmp(&b))
        });
        let place = |vm: usize| {
            let newcomer = Newcomer::balanced(cluster, vm);
            best_node(cluster, &newcomer, None).filter(|&to| has_cpu(cluster, to, newcomer.usage.cpu))
        };
        let found = vms.into_iter().find_map(|vm| Some((vm, place(vm)?)));
        if let Some((vm, to)) = found {
            let why = format!(
                "{} is short of CPU: load {:.2} on {} CPUs",
                node.view.name,
                node.load,
                node.view.usable_cpus(),
            );
            go(cluster, plan, vm, to, &why);
        }
    }
}

/// Empties nodes, the least used first.
fn empty(cluster: &mut Cluster<'_>, terms: Terms, plan: &mut Plan) {
    let mut nodes: Vec<usize> = (0..cluster.nodes.len())
        .filter(|&node| {
            cluster.nodes[node].view.state == NodeState::Ready
                && cluster.nodes[node].incoming == 0
                && cluster.staying(node).next().is_some()
        })
        .collect();
    let used = |node: usize| cluster.nodes[node].use_part(0.0, 0.0);
    nodes.sort_by(|&a, &b| used(a).total_cmp(&used(b)).then(a.cmp(&b)));
    // Those that are emptied take nothing, and those that have taken something are not emptied.
    let mut emptied = vec![false; cluster.nodes.len()];
    let mut tries = 0;
    for node in nodes {
        if cluster.migrations >= cluster.policy.max_migrations || tries >= TRIES {
            return;
        }
        if cluster.nodes[node].incoming > 0 || !cluster.may_send(node) {
            continue;
        }
        tries += 1;
        emptied[node] = true;
        match whole(cluster, terms, node, &emptied) {
            Some(moves) => {
                let why = format!(
                    "{} can be emptied: all of its {} VMs fit elsewhere",
                    cluster.nodes[node].view.name,
                    moves.len(),
                );
                for (vm, to) in moves {
                    // What the limits do not let go now follows in later rounds.
                    let fits = Newcomer::balanced(cluster, vm).check(cluster, to).is_ok();
                    if fits && cluster.may_send(node) {
                        go(cluster, plan, vm, to, &why);
                    }
                }
            }
            None => emptied[node] = false,
        }
    }
}

/// Where each VM that stays on a node would go, the largest first; none if one of them cannot.
fn whole(cluster: &Cluster<'_>, terms: Terms, node: usize, emptied: &[bool]) -> Option<Vec<(usize, usize)>> {
    let mut vms: Vec<usize> = cluster.staying(node).collect();
    if !vms.iter().all(|&vm| is_free(cluster, vm)) {
        return None;
    }
    vms.sort_by(|&a, &b| {
        let resident = |vm: usize| cluster.vms[vm].resident;
        resident(b).total_cmp(&resident(a)).then(a.cmp(&b))
    });
    let costs = vms.iter().map(|&vm| cost(cluster.policy, &cluster.vms[vm]));
    let total = costs.reduce(Cost::then)?;
    if terms.net(EMPTY_NODE_GAIN, total) <= 0.0 {
        return None;
    }
    let mut coming: HashMap<usize, Beside> = HashMap::new();
    let mut moves = Vec::with_capacity(vms.len());
    for vm in vms {
        let may = |to: usize| to != node && !emptied[to];
        let to = most_used(cluster, vm, &coming, may)?;
        let beside = coming.entry(to).or_default();
        let moved = &cluster.vms[vm];
        beside.declared += moved.declared;
        beside.vcpus += f64::from(moved.view.cpus);
        beside.cpu += moved.demand;
        beside.memory += moved.resident;
        beside.at_horizon += moved.memory_there(cluster.policy.usher_horizon.as_secs_f64());
        moves.push((vm, to));
    }
    Some(moves)
}

/// The most used node that is not empty and has room for a VM, with others that would come there too.
fn most_used(
    cluster: &Cluster<'_>,
    vm: usize,
    coming: &HashMap<usize, Beside>,
    may: impl Fn(usize) -> bool,
) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    let mut newcomer = Newcomer::packed(cluster, vm);
    for (to, node) in cluster.nodes.iter().enumerate() {
        if node.view.state != NodeState::Ready || node.vms.is_empty() || !may(to) {
            continue;
        }
        newcomer.beside = coming.get(&to).copied().unwrap_or_default();
        let used = node.use_part(newcomer.beside.cpu, newcomer.beside.memory);
        if best.is_none_or(|(_, most)| used > most)
            && has_cpu(cluster, to, newcomer.usage.cpu + newcomer.beside.cpu)
            && newcomer.check(cluster, to).is_ok()
        {
            best = Some((to, used));
        }
    }
    best.map(|(to, _)| to)
}

/// It may be moved, and no rule ties it to another.
fn is_free(cluster: &Cluster<'_>, vm: usize) -> bool {
    cluster.vms[vm].converges && !cluster.together.ties(vm) && cluster.unsettled(vm).is_none()
}

fn go(cluster: &mut Cluster<'_>, plan: &mut Plan, vm: usize, to: usize, why: &str) {
    let (moved, target) = (&cluster.vms[vm], &cluster.nodes[to]);
    let reason = format!(
        "{why}; {} then has load {:.2} on {} CPUs and holds {} of {}",
        target.view.name,
        target.load + moved.demand,
        target.view.usable_cpus(),
        bytes(target.settled + moved.resident),
        target.view.memory,
    );
    plan.actions
        .push(Action::new(cluster, ActionKind::Pack, vm, to, reason));
    cluster.apply(vm, to);
}
