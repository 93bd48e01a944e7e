//! Ushering: VMs leave a node before its memory runs out. It overrides balance (Barak and Braverman's memory ushering,
//! here with growth looked ahead, so that the move ends before the threshold is passed).
//!
//! For each node that growth would bring over its threshold within the horizon: take the VM that frees the most of what is
//! needed per second of transfer and that fits elsewhere, growth counted. If waiting longer would make its move end too
//! late, move it; if not, wait. Moves already under way count as done, and as taking up the link first.

use crate::action::{Action, ActionKind, Note, NoteKind, Plan};
use crate::cluster::{Cluster, bytes};
use crate::model::NodeState;
use crate::place::{Newcomer, best_node, rejections};
use crate::reject::summarise;

/// So many notes a round list the nodes that were tried; that takes time in a large cluster.
const DETAILED_NOTES: usize = 16;
/// A node under pressure is to shed at least this part of its memory.
const SHED_UNDER_PRESSURE: f64 = 0.05;

/// Plans the moves that are urgent, into `plan`.
pub(crate) fn usher(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    let threshold = cluster.policy.usher_threshold;
    let mut nodes: Vec<(usize, f64)> = (0..cluster.nodes.len())
        .filter(|&number| cluster.nodes[number].view.state != NodeState::Unreachable)
        .map(|number| {
            (
                number,
                cluster.nodes[number].projected / cluster.nodes[number].memory.max(1.0),
            )
        })
        .filter(|&(number, part)| part > threshold || is_pressed(cluster, number))
        .collect();
    nodes.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    for (node, _) in nodes {
        while relieve(cluster, node, plan) {}
    }
}

/// Under memory pressure, with no move under way that could end it.
fn is_pressed(cluster: &Cluster<'_>, node: usize) -> bool {
    let node = &cluster.nodes[node];
    node.pressure() >= cluster.policy.pressure_threshold && node.outgoing == 0
}

/// A VM that may leave, with where it would go.
struct Candidate {
    vm: usize,
    frees: f64,
    /// Needed memory freed per second of transfer.
    worth: f64,
}

/// Why a node must be relieved now.
struct Alarm {
    predicted: f64,
    seconds: f64,
    limit: f64,
    pressed: bool,
}

/// One step for one node; true if a move was planned.
fn relieve(cluster: &mut Cluster<'_>, node: usize, plan: &mut Plan) -> bool {
    if !cluster.may_send(node) {
        return false; // moves are under way, as many as allowed
    }
    let horizon = cluster.policy.usher_horizon.as_secs_f64();
    let pressed = is_pressed(cluster, node);
    let memory = cluster.nodes[node].memory;
    let mut needed = cluster.memory_at(node, horizon) - memory * cluster.policy.usher_target;
    if pressed {
        needed = needed.max(memory * SHED_UNDER_PRESSURE);
    }
    let candidates = candidates(cluster, node, needed);
    let placed = candidates
        .iter()
        .find_map(|candidate| Some((candidate, destination(cluster, candidate.vm)?)));
    let first = placed.map(|(candidate, _)| candidate).or(candidates.first());
    let move_seconds = first.map_or(cluster.policy.migration_overhead.as_secs_f64(), |c| {
        cluster.vms[c.vm].move_seconds
    });
    let lead = cluster.policy.detect.as_secs_f64() + cluster.leaving_seconds(node) + move_seconds;
    let seconds = lead.min(horizon);
    let alarm = Alarm {
        predicted: cluster.memory_at(node, seconds),
        seconds,
        limit: memory * cluster.policy.usher_threshold,
        pressed,
    };
    if alarm.predicted <= alarm.limit && !pressed {
        return false;
    }
    match placed {
        Some((candidate, to)) => {
            let reason = reason(cluster, node, candidate, to, &alarm);
            plan.actions
                .push(Action::new(cluster, ActionKind::Usher, candidate.vm, to, reason));
            cluster.apply(candidate.vm, to);
            true
        }
        None => {
            let text = stuck(
                cluster,
                node,
                &candidates,
                &alarm,
                plan.notes.len() < DETAILED_NOTES,
            );
            let name = cluster.nodes[node].view.name.clone();
            plan.notes.push(Note {
                kind: NoteKind::UsherStuck,
                node: name,
                vm: None,
                text,
            });
            false
        }
    }
}

/// The VMs that may leave, those worth most first.
fn candidates(cluster: &Cluster<'_>, node: usize, needed: f64) -> Vec<Candidate> {
    let horizon = cluster.policy.usher_horizon.as_secs_f64();
    let mut candidates: Vec<Candidate> = cluster
        .staying(node)
        .filter(|&vm| cluster.immobile(vm, cluster.policy.retry_after).is_none())
        .map(|vm| {
            let frees = cluster.vms[vm].memory_at(horizon);
            Candidate {
                vm,
                frees,
                worth: frees.min(needed) / cluster.vms[vm].move_seconds.max(1e-3),
            }
        })
        .filter(|candidate| candidate.worth > 0.0)
        .collect();
    candidates.sort_by(|a, b| {
        b.worth
            .total_cmp(&a.worth)
            .then(a.frees.total_cmp(&b.frees))
            .then(a.vm.cmp(&b.vm))
    });
    candidates
}

/// Where a VM can go and stay below the threshold.
fn destination(cluster: &mut Cluster<'_>, vm: usize) -> Option<usize> {
    let newcomer = Newcomer::automatic(cluster, vm, cluster.policy.usher_threshold);
    if newcomer.at_horizon() > cluster.largest_room() {
        return None;
    }
    best_node(cluster, &newcomer, None)
}

fn reason(cluster: &Cluster<'_>, node: usize, candidate: &Candidate, to: usize, alarm: &Alarm) -> String {
    let (vm, target) = (&cluster.vms[candidate.vm], &cluster.nodes[to]);
    format!(
        "{}; '{}' holds {} and grows {}: moving it takes about {:.1} s; {} then holds at most {} of its limit {}",
        describe(cluster, node, alarm),
        vm.view.name,
        bytes(vm.resident),
        vm.view.growth,
        vm.move_seconds,
        target.view.name,
        bytes(target.projected + candidate.frees),
        bytes(target.memory * cluster.policy.usher_threshold),
    )
}

fn describe(cluster: &Cluster<'_>, number: usize, alarm: &Alarm) -> String {
    let node = &cluster.nodes[number];
    if alarm.pressed && alarm.predicted <= alarm.limit {
        let limit = cluster.policy.pressure_threshold;
        return format!(
            "{} has memory pressure {:.0} %, limit {limit:.0} %",
            node.view.name,
            node.pressure()
        );
    }
    let growth = (alarm.predicted - node.settled).max(0.0) / alarm.seconds.max(1e-3);
    format!(
        "{} would hold {} in {:.1} s, over its limit {} ({:.0} % of {}): {} now, growing {}/s",
        node.view.name,
        bytes(alarm.predicted),
        alarm.seconds,
        bytes(alarm.limit),
        cluster.policy.usher_threshold * 100.0,
        node.view.memory,
        bytes(node.settled),
        bytes(growth),
    )
}

/// Why nothing leaves a node that must be relieved.
fn stuck(
    cluster: &mut Cluster<'_>,
    node: usize,
    candidates: &[Candidate],
    alarm: &Alarm,
    detailed: bool,
) -> String {
    let alarm = describe(cluster, node, alarm);
    if let Some(smallest) = candidates.iter().min_by(|a, b| a.frees.total_cmp(&b.frees)) {
        let (name, room) = (
            cluster.vms[smallest.vm].view.name.clone(),
            bytes(cluster.largest_room()),
        );
        let newcomer = Newcomer::automatic(cluster, smallest.vm, cluster.policy.usher_threshold);
        let needs = bytes(smallest.frees);
        let tried = if detailed {
            format!(": {}", summarise(&rejections(cluster, &newcomer, None)))
        } else {
            String::new()
        };
        return format!(
            "{alarm}; nothing fits elsewhere: the smallest VM that can move, '{name}', needs {needs}, \
             the most any node has left is {room}{tried}"
        );
    }
    let mut held: Vec<String> = Vec::new();
    for vm in cluster.staying(node).take(5) {
        if let Some(why) = cluster.immobile(vm, cluster.policy.retry_after) {
            held.push(format!("'{}': {why}", cluster.vms[vm].view.name));
        }
    }
    if held.is_empty() {
        return format!("{alarm}; no VM stays there that could be moved");
    }
    format!("{alarm}; none of its VMs can be moved: {}", held.join("; "))
}
