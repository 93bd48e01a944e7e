//! Ushering: VMs leave a node before its memory runs out. It overrides balance (Barak and Braverman's memory ushering,
//! here with growth looked ahead, so that the move ends before the threshold is passed).
//!
//! For each node that growth would bring over its threshold within the horizon: take the VM that frees the most of what is
//! needed per second of transfer and that fits elsewhere, growth counted. If waiting longer would make its move, or one of
//! those that must follow it, end too late, move it; if not, wait. Two moves at once would share the link, and the first
//! would end later; so the next starts when those under way are nearly done, or when they take so long that it ends before
//! them all the same.

use crate::action::{Action, ActionKind, Note, NoteKind, Plan};
use crate::cluster::{Cluster, bytes};
use crate::cost;
use crate::last_resort;
use crate::model::{DEFAULT_PRIORITY, NodeState};
use crate::newcomer::Newcomer;
use crate::place::{has_cpu, rejections};
use crate::policy::Mode;
use crate::reject::summarise;
use crate::score;

/// So many notes a round list the nodes that were tried; that takes time in a large cluster.
const DETAILED_NOTES: usize = 16;
/// A node under pressure is to shed at least this part of its memory.
const SHED_UNDER_PRESSURE: f64 = 0.05;
/// So many moves off one node are looked ahead.
const LONGEST_CHAIN: usize = 16;
/// The next move off a node may start when those under way have no longer to go than this.
const NEARLY_DONE_SECONDS: f64 = 0.5;
/// Moves under way that take at least this long are not waited for if another ends sooner.
const LONG_SECONDS: f64 = 10.0;

/// The long run, in horizons: how a destination is chosen.
const LONG_RUN: f64 = 10.0;

/// So many VMs of a node that runs out are tried once the rules give way; it is looked at again the next second.
const LAST_RESORT_TRIES: usize = 8;

/// Plans the moves that are urgent, into `plan`.
pub(crate) fn usher(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    let threshold = cluster.policy.usher_threshold;
    let mut nodes: Vec<(usize, f64)> = (0..cluster.nodes.len())
        .filter(|&number| cluster.nodes[number].view.state != NodeState::Unreachable)
        .map(|number| {
            let part = cluster.peak(number) / cluster.nodes[number].memory.max(1.0);
            (number, part)
        })
        .filter(|&(number, part)| part > threshold || is_pressed(cluster, number))
        .collect();
    nodes.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    for (node, _) in nodes {
        let suspended = plan.suspend.len();
        while relieve(cluster, node, plan) {}
        if plan.suspend.len() == suspended {
            plan.suspend.extend(last_resort::suspend_outrun(cluster, node));
        }
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
    /// It was moved not long ago, and goes only where no other can.
    just_moved: bool,
    /// Needed memory freed per second of transfer, weighed by priority.
    worth: f64,
}

/// Why a node must be relieved now.
struct Alarm {
    predicted: f64,
    seconds: f64,
    limit: f64,
    pressed: bool,
    /// With so many VMs gone already.
    after: usize,
}

/// One step for one node; true if a move was planned.
fn relieve(cluster: &mut Cluster<'_>, node: usize, plan: &mut Plan) -> bool {
    if !cluster.may_send(node) {
        return false; // as many moves as allowed are under way
    }
    let pressed = is_pressed(cluster, node);
    let memory = cluster.nodes[node].memory;
    let mut needed = cluster.peak(node) - memory * cluster.policy.usher_target;
    if pressed {
        needed = needed.max(memory * SHED_UNDER_PRESSURE);
    }
    let candidates = candidates(cluster, node, needed);
    let placed = candidates
        .iter()
        .find_map(|candidate| Some((candidate, destination(cluster, candidate.vm)?)));
    let first = placed
        .map(|(candidate, _)| candidate.vm)
        .or(candidates.first().map(|candidate| candidate.vm));
    let leaving_seconds = cluster.leaving_seconds(node);
    let move_seconds = first.map_or(0.0, |vm| cluster.vms[vm].move_seconds);
    if leaving_seconds > NEARLY_DONE_SECONDS && leaving_seconds < LONG_SECONDS.max(2.0 * move_seconds) {
        return false; // what is under way ends sooner alone
    }
    let Some(alarm) = alarm(
        cluster,
        node,
        first,
        &candidates,
        leaving_seconds.min(move_seconds),
    ) else {
        return false;
    };
    if placed.is_none()
        && candidates
            .iter()
            .any(|candidate| waits_for_a_move(cluster, candidate.vm))
    {
        return false;
    }
    let placed = placed.or_else(|| {
        let mut candidates = candidates.iter().take(LAST_RESORT_TRIES);
        candidates.find_map(|candidate| Some((candidate, beyond_the_rules(cluster, node, candidate.vm)?)))
    });
    match placed {
        Some((candidate, to)) => {
            let action = Action::new(
                cluster,
                ActionKind::Usher,
                candidate.vm,
                to,
                in_short(cluster, node, candidate, &alarm),
            );
            plan.actions
                .push(action.with_details(reason(cluster, node, candidate, to, &alarm)));
            cluster.apply(candidate.vm, to);
            true
        }
        None if alarm.predicted <= alarm.limit && cluster.staying(node).next().is_none() => false,
        None => {
            let text = stuck(
                cluster,
                node,
                &candidates,
                &alarm,
                plan.notes.len() < DETAILED_NOTES,
            );
            plan.suspend.extend(last_resort::suspend(cluster, node));
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

/// Follows the moves that would be made one after the other, `first` first, and answers the first that would end with the
/// node over its threshold before it: then there is no time to lose. A node under pressure has none either. The link is
/// taken for `busy_seconds` by what is under way. Moves may take as much longer, memory grow as much faster and reports be as
/// much older as they have lately: the margins multiply, so that the more VMs must leave, the earlier the first does.
fn alarm(
    cluster: &Cluster<'_>,
    node: usize,
    first: Option<usize>,
    candidates: &[Candidate],
    busy_seconds: f64,
) -> Option<Alarm> {
    let policy = cluster.policy;
    let horizon = policy.usher_horizon.as_secs_f64();
    let limit = cluster.nodes[node].memory * policy.usher_threshold;
    let pressed = is_pressed(cluster, node);
    let order = first.into_iter().chain(
        candidates
            .iter()
            .map(|candidate| candidate.vm)
            .filter(|&vm| Some(vm) != first),
    );
    let margins = cluster.margins;
    let mut seconds = cluster.seconds_to_act(node) + busy_seconds * margins.move_time;
    let mut gone: Vec<usize> = Vec::new();
    let predicted_at = |seconds: f64, gone: &[usize]| {
        let grown = seconds * margins.growth;
        let freed: f64 = gone.iter().map(|&vm| cluster.vms[vm].memory_at(grown)).sum();
        cluster.most_memory_at(node, seconds) - freed
    };
    for vm in order.take(LONGEST_CHAIN) {
        seconds += cluster.move_seconds_at(vm, seconds) * margins.move_time;
        let at = seconds.min(horizon);
        let predicted = predicted_at(at, &gone);
        if predicted > limit {
            return Some(Alarm {
                predicted,
                seconds: at,
                limit,
                pressed,
                after: gone.len(),
            });
        }
        if seconds >= horizon || predicted_at(horizon, &gone) <= limit {
            break;
        }
        gone.push(vm);
        // The next begins when a report says that this one is nearly done.
        seconds += margins.delay.as_secs_f64();
    }
    let seconds = seconds.min(horizon);
    let predicted = predicted_at(seconds, &[]);
    let nothing_can_leave = candidates.is_empty() && predicted > limit;
    (pressed || nothing_can_leave).then_some(Alarm {
        predicted,
        seconds,
        limit,
        pressed,
        after: 0,
    })
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
                just_moved: cluster.immobile(vm, cluster.policy.cool_down).is_some(),
                worth: frees.min(needed) * precedence(cluster, vm) / cluster.vms[vm].move_seconds.max(1e-3),
            }
        })
        .filter(|candidate| candidate.worth > 0.0)
        .collect();
    candidates.sort_by(|a, b| {
        a.just_moved
            .cmp(&b.just_moved)
            .then(b.worth.total_cmp(&a.worth))
            .then(a.frees.total_cmp(&b.frees))
            .then(a.vm.cmp(&b.vm))
    });
    candidates
}

/// How much sooner a VM leaves for its priority: 1 at the default, 2 at the lowest, a fifth at the highest.
fn precedence(cluster: &Cluster<'_>, vm: usize) -> f64 {
    f64::from(10 - cluster.vms[vm].view.priority.min(9)) / f64::from(10 - DEFAULT_PRIORITY)
}

/// Whether a VM could go to a node that takes as many as allowed right now.
fn waits_for_a_move(cluster: &Cluster<'_>, vm: usize) -> bool {
    Newcomer::evicted(cluster, vm).waits_for_a_move(cluster, None)
}

/// Where a VM can go and stay below the threshold.
fn destination(cluster: &mut Cluster<'_>, vm: usize) -> Option<usize> {
    let newcomer = Newcomer::evicted(cluster, vm);
    if newcomer.at_horizon() > cluster.largest_room() {
        return None;
    }
    roomiest(cluster, &newcomer, vm)
}

/// Of the nodes that take it, the one that will be least filled in the long run: its own VMs may grow, too, and a node that
/// is soon full itself would only pass the VM on. When the policy is to pack, one that is not empty and stays below its
/// threshold in the long run goes first.
pub(crate) fn roomiest(cluster: &Cluster<'_>, newcomer: &Newcomer<'_>, vm: usize) -> Option<usize> {
    let seconds = LONG_RUN * cluster.policy.usher_horizon.as_secs_f64();
    let vm = &cluster.vms[vm];
    let rate = cluster.cost_rate;
    (0..cluster.nodes.len())
        .filter(|&number| newcomer.check(cluster, number).is_ok())
        .map(|number| {
            let node = &cluster.nodes[number];
            let part = node.part_later(vm, newcomer.at_horizon(), seconds);
            let second_choice = cluster.policy.mode == Mode::Pack
                && (node.is_empty()
                    || !has_cpu(cluster, number, newcomer.usage.cpu)
                    || part > cluster.policy.usher_threshold);
            (
                number,
                second_choice,
                score::cost(rate, part) + node.charge(rate, newcomer.usage),
            )
        })
        .min_by(|a, b| a.1.cmp(&b.1).then(a.2.total_cmp(&b.2)))
        .map(|(number, ..)| number)
}

/// Where a VM can go if nothing fits by the rules and its node would run out of memory for good. Declared memory is a rule for
/// admission; it is no reason to have a VM killed beside a node with room. If all nodes are near the threshold, what is above
/// it is shared: a node may be filled to the middle between threshold and all of its memory. A node whose VMs cannot outgrow it
/// does not run out.
fn beyond_the_rules(cluster: &mut Cluster<'_>, node: usize, vm: usize) -> Option<usize> {
    let (memory, threshold) = (cluster.nodes[node].memory, cluster.policy.usher_threshold);
    if cluster.nodes[node].committed <= memory {
        return None;
    }
    let newcomer = Newcomer::last_resort(cluster, vm, threshold);
    let below = if newcomer.at_horizon() > cluster.largest_room() {
        None
    } else {
        roomiest(cluster, &newcomer, vm)
    };
    if below.is_some() || cluster.peak(node) <= memory {
        return below;
    }
    let newcomer = Newcomer::last_resort(cluster, vm, f64::midpoint(threshold, 1.0));
    roomiest(cluster, &newcomer, vm)
}

/// The same in a line: how long the node has.
fn in_short(cluster: &Cluster<'_>, node: usize, candidate: &Candidate, alarm: &Alarm) -> String {
    let cost = cost::cost(cluster.policy, &cluster.vms[candidate.vm]);
    let move_takes = format!("takes {:.1} s, pause {:.0} ms", cost.seconds, cost.downtime * 1e3);
    let of = &cluster.nodes[node];
    if alarm.pressed && alarm.predicted <= alarm.limit {
        return format!(
            "{} is short of memory (pressure {:.0} %); {move_takes}",
            of.view.name,
            of.pressure()
        );
    }
    let held = cluster.memory_at(node, 0.0);
    let growth: f64 = cluster.staying(node).map(|vm| cluster.vms[vm].growth).sum();
    let full = match (of.memory - held) / growth {
        seconds if seconds.is_finite() && seconds > 0.0 => format!("is full in {seconds:.1} s"),
        _ => "is nearly full".to_owned(),
    };
    let grows = if growth > 0.0 {
        format!(", growing {}/s", bytes(growth))
    } else {
        String::new()
    };
    format!(
        "{} {full} ({} of {}{grows}); {move_takes}",
        of.view.name,
        bytes(held),
        of.view.memory,
    )
}

fn reason(cluster: &Cluster<'_>, node: usize, candidate: &Candidate, to: usize, alarm: &Alarm) -> String {
    let (vm, target) = (&cluster.vms[candidate.vm], &cluster.nodes[to]);
    let beyond = if target.projected + candidate.frees > target.memory * cluster.policy.usher_threshold {
        ", since nothing fits and a VM would be killed"
    } else if target.committed + vm.declared > target.lends * cluster.policy.overcommit {
        ", its declared memory beyond the limit, since nothing else fits"
    } else {
        ""
    };
    format!(
        "{}; '{}' holds {} and grows {}: moving it takes about {:.1} s; {} then holds at most {} of its limit {}{beyond}",
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
    let limit = format!(
        "its limit {} ({:.0} % of {})",
        bytes(alarm.limit),
        cluster.policy.usher_threshold * 100.0,
        node.view.memory
    );
    let held = cluster.memory_at(number, 0.0);
    if held > alarm.limit {
        return format!("{} holds {}, over {limit}", node.view.name, bytes(held));
    }
    let gone = match alarm.after {
        0 => String::new(),
        1 => " even with one VM gone by then".to_owned(),
        count => format!(" even with {count} VMs gone by then"),
    };
    let growth: f64 = cluster.staying(number).map(|vm| cluster.vms[vm].growth).sum();
    format!(
        "{} would hold {} in {:.1} s{gone}, over {limit}: it holds {} and its VMs grow {}/s",
        node.view.name,
        bytes(alarm.predicted),
        alarm.seconds,
        bytes(held),
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
        let newcomer = Newcomer::evicted(cluster, smallest.vm);
        let needs = bytes(smallest.frees);
        let tried = if detailed {
            format!(": {}", summarise(&rejections(cluster, &newcomer, None)))
        } else {
            String::new()
        };
        return format!(
            "{alarm}; nothing fits elsewhere: the smallest VM that can move, '{name}', needs {needs}, \
             the most any node has left is {room}{tried}; {}",
            last_resort::describe(cluster, node)
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
    format!(
        "{alarm}; none of its VMs can be moved: {}; {}",
        held.join("; "),
        last_resort::describe(cluster, node)
    )
}
