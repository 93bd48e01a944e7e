//! What is left when a node runs out of memory and nothing fits anywhere, in this order. What the VMM does not offer yet is
//! named with what it would free, so that an operator can act; suspending is done, and undone where there is room: on its node,
//! or on another, to which the VM is moved as it is.

use std::fmt;

use crate::action::{Action, ActionKind, Hold, Plan};
use crate::cluster::{Cluster, Vm, bytes};
use crate::model::{BytesPerSecond, CannotMove, NodeState};
use crate::newcomer::Newcomer;
use crate::policy::{Automation, Policy};
use crate::usher::roomiest;

/// A step that frees memory without moving a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastResort {
    /// Take back from guests what they do not use.
    SqueezeBalloons,
    /// Write a VM to disk and end it, to go on later.
    Checkpoint,
    /// Pause a VM, so that it grows no more.
    Suspend,
}

impl LastResort {
    /// The mildest first.
    pub const IN_ORDER: [Self; 3] = [Self::SqueezeBalloons, Self::Checkpoint, Self::Suspend];
}

impl fmt::Display for LastResort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::SqueezeBalloons => "squeeze balloons",
            Self::Checkpoint => "checkpoint",
            Self::Suspend => "suspend",
        })
    }
}

impl Policy {
    /// Whether a step can be taken. The VMM has no balloon and writes no checkpoints.
    #[must_use]
    pub fn offers(&self, step: LastResort) -> bool {
        step == LastResort::Suspend
    }

    /// Whether plans suspend VMs, rather than leave it to an operator.
    fn suspends(&self) -> bool {
        self.suspend && self.automation == Automation::Automatic
    }

    /// The part of a node's memory beyond which waiting is no choice any more: the middle between threshold and all of it.
    fn critical(&self) -> f64 {
        f64::midpoint(self.usher_threshold, 1.0)
    }
}

/// Who gives way: the VM of the lowest priority, of several the one that grows most, then the largest.
fn victim(cluster: &Cluster<'_>, node: usize, may: impl Fn(&Vm<'_>) -> bool) -> Option<usize> {
    let allowed = |&vm: &usize| {
        let vm = &cluster.vms[vm];
        let runs = matches!(
            vm.view.cannot_move,
            None | Some(CannotMove::Locked | CannotMove::Pinned | CannotMove::Settling)
        );
        runs && !vm.view.suspended && vm.view.in_flight.is_none() && may(vm)
    };
    cluster.staying(node).filter(allowed).min_by(|&a, &b| {
        let (a, b) = (&cluster.vms[a], &cluster.vms[b]);
        a.view
            .priority
            .cmp(&b.view.priority)
            .then(b.growth.total_cmp(&a.growth))
            .then(b.resident.total_cmp(&a.resident))
    })
}

/// For a node that runs out while nothing fits anywhere: the VM to suspend now, if it cannot wait. That takes no time, so it
/// waits until the node would hold more than is left to wait with by the time that a change takes effect, and be all but full at
/// the horizon.
pub(crate) fn suspend(cluster: &Cluster<'_>, node: usize) -> Option<Hold> {
    suspend_because(cluster, node, "nothing fits elsewhere")
}

/// The same for a node whose moves under way would end when it has run out of memory, or that the limits let send none.
pub(crate) fn suspend_outrun(cluster: &Cluster<'_>, node: usize) -> Option<Hold> {
    let leaving = cluster.leaving_seconds(node);
    let (at, why) = if leaving > 0.0 {
        let then = cluster.most_memory_at(node, leaving.next_down());
        let why = format!(
            "the moves under way end in {leaving:.1} s, when it would hold {}",
            bytes(then)
        );
        (then, why)
    } else {
        let soon = cluster.most_memory_at(node, cluster.seconds_to_act(node));
        (soon, "the limits let no move begin".to_owned())
    };
    let outrun = at > cluster.nodes[node].memory;
    outrun.then(|| suspend_because(cluster, node, &why)).flatten()
}

fn suspend_because(cluster: &Cluster<'_>, node: usize, why: &str) -> Option<Hold> {
    let policy = cluster.policy;
    let seconds = cluster.seconds_to_act(node);
    let (soon, memory) = (cluster.most_memory_at(node, seconds), cluster.nodes[node].memory);
    let limit = memory * policy.critical();
    let at_horizon = cluster.most_memory_at(node, policy.usher_horizon.as_secs_f64());
    // A host needs a little for itself.
    let full = memory * f64::midpoint(policy.critical(), 1.0);
    if !policy.suspends() || soon <= limit || at_horizon <= full {
        return None;
    }
    let vm = &cluster.vms[victim(cluster, node, |vm| vm.growth > 0.0)?];
    let name = &cluster.nodes[node].view.name;
    Some(Hold {
        vm: vm.view.id.clone(),
        node: name.clone(),
        growth: vm.view.growth,
        reason: format!(
            "{name} would hold {} in {seconds:.1} s, over {} ({:.0} % of {}), and {why}; '{}' (priority {}) grows \
             {}/s and gives way first: it keeps its memory, and runs on where there is room for its growth",
            bytes(soon),
            bytes(limit),
            policy.critical() * 100.0,
            cluster.nodes[node].view.memory,
            vm.view.name,
            vm.view.priority,
            bytes(vm.growth),
        ),
    })
}

/// VMs that were suspended by such a plan run on where there is room for their growth, the highest priority first: on their
/// nodes if these stay below their target, else on another that does, to which they are moved first. One of a node at a time.
pub(crate) fn run_on(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    let mut waiting: Vec<(usize, BytesPerSecond)> = (0..cluster.vms.len())
        .filter_map(|number| {
            let vm = &cluster.vms[number];
            let may = vm.view.cannot_move.is_none_or(CannotMove::is_wished) && !vm.leaving;
            let growth = vm.view.suspended_growth.filter(|_| vm.view.suspended && may)?;
            Some((number, growth))
        })
        .collect();
    waiting.sort_by_key(|&(vm, _)| (std::cmp::Reverse(cluster.vms[vm].view.priority), vm));
    // What happens there is not yet in the figures.
    let mut done = Vec::new();
    for (vm, growth) in waiting {
        if let Some(peak) = room_at_home(cluster, vm) {
            let node = cluster.vms[vm].node;
            if !done.contains(&node) {
                done.push(node);
                plan.resume.push(resumed(cluster, vm, growth, peak));
            }
        } else if let Some(to) = room_elsewhere(cluster, vm).filter(|to| !done.contains(to)) {
            done.push(to);
            let reason = moved(cluster, vm, growth, to);
            plan.actions
                .push(Action::new(cluster, ActionKind::Usher, vm, to, reason));
            cluster.apply(vm, to);
        }
    }
}

/// The most that the node of a suspended VM would hold if it ran on there; none if that is too much.
fn room_at_home(cluster: &Cluster<'_>, vm: usize) -> Option<f64> {
    let policy = cluster.policy;
    let vm = &cluster.vms[vm];
    let node = &cluster.nodes[vm.node];
    let grows_by = vm.memory_there(policy.usher_horizon.as_secs_f64()) - vm.resident;
    let peak = cluster.peak(vm.node) + grows_by;
    let answers = node.view.state != NodeState::Unreachable;
    (answers && peak <= node.memory * policy.usher_target).then_some(peak)
}

/// Another node where a suspended VM could run on.
fn room_elsewhere(cluster: &mut Cluster<'_>, vm: usize) -> Option<usize> {
    let stays = cluster.immobile(vm, cluster.policy.retry_after).is_some()
        || !cluster.may_send(cluster.vms[vm].node)
        || cluster.is_needed(vm);
    let newcomer = Newcomer::to_run_on(cluster, vm);
    if stays || newcomer.at_horizon() > cluster.largest_room() {
        return None;
    }
    roomiest(cluster, &newcomer, vm)
}

fn resumed(cluster: &Cluster<'_>, vm: usize, growth: BytesPerSecond, peak: f64) -> Hold {
    let policy = cluster.policy;
    let vm = &cluster.vms[vm];
    let node = &cluster.nodes[vm.node];
    Hold {
        vm: vm.view.id.clone(),
        node: node.view.name.clone(),
        growth,
        reason: format!(
            "{} would hold at most {} in {:.0} s if '{}' grows {growth} again, within {} ({:.0} % of {})",
            node.view.name,
            bytes(peak),
            policy.usher_horizon.as_secs_f64(),
            vm.view.name,
            bytes(node.memory * policy.usher_target),
            policy.usher_target * 100.0,
            node.view.memory,
        ),
    }
}

fn moved(cluster: &Cluster<'_>, vm: usize, growth: BytesPerSecond, to: usize) -> String {
    let policy = cluster.policy;
    let (vm, target) = (&cluster.vms[vm], &cluster.nodes[to]);
    let horizon = policy.usher_horizon.as_secs_f64();
    format!(
        "'{}' is suspended, and {} has no room for its growth of {growth}; it is moved as it is, and can run on there: {} would hold \
         at most {} in {horizon:.0} s, within {} ({:.0} % of {})",
        vm.view.name,
        vm.view.node,
        target.view.name,
        bytes(target.projected + vm.memory_there(horizon)),
        bytes(target.memory * policy.usher_target),
        policy.usher_target * 100.0,
        target.view.memory,
    )
}

/// The steps for a node, what each would free, and which are not offered.
pub(crate) fn describe(cluster: &Cluster<'_>, node: usize) -> String {
    let any = victim(cluster, node, |_| true);
    let growing = victim(cluster, node, |vm| vm.growth > 0.0);
    let steps = LastResort::IN_ORDER.map(|step| {
        let offered = if cluster.policy.offers(step) {
            ""
        } else {
            ": not offered by the VMM"
        };
        let victim = if step == LastResort::Suspend { growing } else { any };
        match (step, victim.map(|vm| &cluster.vms[vm])) {
            (LastResort::Suspend, None) => format!("{step}: none of its VMs grows"),
            (LastResort::SqueezeBalloons, _) | (_, None) => format!("{step}{offered}"),
            (LastResort::Checkpoint, Some(vm)) => format!(
                "{step} '{}' (priority {}), which would free {}{offered}",
                vm.view.name,
                vm.view.priority,
                bytes(vm.resident)
            ),
            (LastResort::Suspend, Some(vm)) => format!(
                "{step} '{0}', which would free nothing and stop growth of {1}/s{offered}: {2}",
                vm.view.name,
                bytes(vm.growth),
                if cluster.policy.suspends() {
                    let limit = cluster.nodes[node].memory * cluster.policy.critical();
                    format!("done when the node would hold {}", bytes(limit))
                } else {
                    format!("`shoal suspend {}`", vm.view.name)
                }
            ),
        }
    });
    format!("last resorts: {}", steps.join("; "))
}
