//! Preemption: who is stopped so that a VM of higher priority that fits nowhere has room. What is stopped begins anew later.
//!
//! Only VMs that are marked give way, and only to a strictly higher priority. A node comes into question if nothing but room is
//! missing there. On it the lowest priority goes first, of that the one that has run for the shortest time, then the smallest,
//! until the new VM fits; or one of no higher priority alone, where that is enough. Those that turn out not to be needed
//! stay. Of several nodes the one is taken where the highest priority that goes is the lowest; then the fewest VMs, then the
//! least time that they have run, which is what is lost.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::cluster::{Cluster, Vm, bytes, is_exclusive};
use crate::failover::need;
use crate::model::{CannotMove, ClusterSnapshot, NodeName, NodeState, VmId};
use crate::newcomer::{Beside, Newcomer};
use crate::place::{LaunchRequest, asked, best_node};
use crate::policy::Policy;
use crate::reject::RejectReason;

/// So many are stopped for one. They are stored in one batch.
const MOST_VICTIMS: usize = 32;
/// So many choices are looked at for N+1, which takes long in a large cluster.
const N_PLUS_ONE_TRIES: usize = 16;
/// When the last of those that gave way has ended, the room is kept for so long, and nobody else is stopped for the VM: a node's
/// next reports may still count what has just ended.
const SETTLES: Duration = Duration::from_secs(10);

/// Room that VMs were, or are being, stopped for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The VM that waits for it.
    pub vm: VmId,
    /// Where it is.
    pub node: NodeName,
    /// What it needs.
    pub request: LaunchRequest,
    /// Since the last of those that were stopped for it has ended, or since it was decided on if none has.
    pub quiet: Duration,
}

/// VMs to stop, so that another has room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preemption {
    /// Where.
    pub node: NodeName,
    /// Who is stopped, in the order in which they were chosen.
    pub victims: Vec<VmId>,
    /// Why, in words and numbers.
    pub reason: String,
}

/// What is to be stopped for a VM with this name so that it has room, if it fits nowhere otherwise.
#[must_use]
pub fn make_room(
    snapshot: &ClusterSnapshot,
    policy: &Policy,
    name: &str,
    request: &LaunchRequest,
) -> Option<Preemption> {
    let cluster = Cluster::with_rules(snapshot, policy, request.rules.as_deref().into_iter());
    let asked = asked(&cluster, request).ok()?;
    let mut newcomer = Newcomer::launch(&cluster, request);
    if !policy.preempt || best_node(&cluster, &newcomer, asked).is_some() {
        return None;
    }
    let choice = Victims::new(&cluster).choose(&cluster, &mut newcomer, request.priority, asked)?;
    Some(choice.describe(&cluster, &newcomer, name, request.priority))
}

/// Room that is awaited.
pub(crate) struct Room {
    pub node: usize,
    /// Those that are still there and are being stopped for it.
    pub ending: Vec<usize>,
}

/// The room of a VM that waits, as long as it is kept: those that give way have not all ended, or the last has only just. A node
/// that does not answer is not waited for.
pub(crate) fn awaited(cluster: &Cluster<'_>, held: &Held) -> Option<Room> {
    let node = cluster.node_number(&held.node)?;
    if cluster.nodes[node].view.state == NodeState::Unreachable {
        return None;
    }
    let gives_way = |&vm: &usize| cluster.vms[vm].view.gives_way_to.as_ref() == Some(&held.vm);
    let ending: Vec<usize> = cluster.nodes[node]
        .vms
        .iter()
        .copied()
        .filter(gives_way)
        .collect();
    (!ending.is_empty() || held.quiet < SETTLES).then_some(Room { node, ending })
}

/// Why a VM waits for its room.
pub(crate) fn describe_awaited(cluster: &Cluster<'_>, room: &Room) -> String {
    let node = &cluster.nodes[room.node].view.name;
    if room.ending.is_empty() {
        return format!("room was made on {node}, which has not reported all of it yet");
    }
    format!(
        "room is being made on {node}: {}",
        listed(cluster, &room.ending, |vm| format!(
            "'{}' (priority {}) stops",
            vm.view.name, vm.view.priority
        ))
    )
}

/// VMs that may be stopped, by node: a cluster without such VMs costs nothing, and a node without them neither.
#[derive(Debug)]
pub(crate) struct Victims {
    /// Of each node in the order in which they give way.
    by_node: BTreeMap<usize, Vec<usize>>,
}

impl Victims {
    pub fn new(cluster: &Cluster<'_>) -> Self {
        let mut by_node: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (number, vm) in cluster.vms.iter().enumerate() {
            if may_be_stopped(vm) {
                by_node.entry(vm.node).or_default().push(number);
            }
        }
        for vms in by_node.values_mut() {
            vms.sort_by(|&a, &b| {
                let (of_a, of_b) = (&cluster.vms[a], &cluster.vms[b]);
                let first = |vm: &Vm<'_>| (vm.view.priority, vm.view.ran.unwrap_or_default());
                first(of_a)
                    .cmp(&first(of_b))
                    .then(of_a.resident.total_cmp(&of_b.resident))
                    .then(a.cmp(&b))
            });
        }
        Self { by_node }
    }

    /// Nobody may be stopped.
    pub fn is_empty(&self) -> bool {
        self.by_node.is_empty()
    }

    /// Takes those out that are to be stopped.
    pub fn take(&mut self, choice: &Choice) {
        self.by_node.remove(&choice.node);
    }

    /// The best choice for a VM that fits nowhere, or on the node asked for not.
    pub fn choose(
        &self,
        cluster: &Cluster<'_>,
        newcomer: &mut Newcomer<'_>,
        priority: u32,
        asked: Option<usize>,
    ) -> Option<Choice> {
        let nodes = self
            .by_node
            .iter()
            .filter(|(node, _)| asked.is_none_or(|asked| asked == **node));
        let mut choices: Vec<Choice> = Vec::new();
        for (&node, vms) in nodes {
            choices.extend(on_node(cluster, newcomer, priority, node, vms));
        }
        newcomer.beside = Beside::default();
        choices.sort_by(Choice::compare);
        let Some(failover) = &cluster.failover else {
            return choices.into_iter().next();
        };
        choices.into_iter().take(N_PLUS_ONE_TRIES).find(|choice| {
            let need = |&vm: &usize| {
                let vm = &cluster.vms[vm];
                need(cluster.policy, vm.declared, vm.resident)
            };
            let ended: Vec<f64> = choice.victims.iter().map(need).collect();
            let change = newcomer.change(cluster.policy, choice.node);
            failover.shortfall_without(choice.node, &ended, change).is_none()
        })
    }
}

/// It is marked, runs or is suspended, and stays where it is.
fn may_be_stopped(vm: &Vm<'_>) -> bool {
    let runs = vm.view.cannot_move.is_none_or(CannotMove::is_wished);
    vm.view.preemptible && runs && !vm.leaving && vm.view.gives_way_to.is_none()
}

/// Who would be stopped on one node.
#[derive(Debug)]
pub(crate) struct Choice {
    pub node: usize,
    pub victims: Vec<usize>,
    highest: u32,
    ran: Duration,
    resident: f64,
    /// Why the VM does not fit there now.
    missing: RejectReason,
}

impl Choice {
    fn compare(&self, other: &Self) -> std::cmp::Ordering {
        let first = |choice: &Self| (choice.highest, choice.victims.len(), choice.ran);
        first(self)
            .cmp(&first(other))
            .then(self.resident.total_cmp(&other.resident))
            .then(self.node.cmp(&other.node))
    }

    /// As data, with its reason.
    pub fn describe(
        &self,
        cluster: &Cluster<'_>,
        newcomer: &Newcomer<'_>,
        name: &str,
        priority: u32,
    ) -> Preemption {
        let node = cluster.nodes[self.node].view;
        let victims = listed(cluster, &self.victims, |vm| {
            let ran = vm
                .view
                .ran
                .map_or(String::new(), |ran| format!(", has run for {} s", ran.as_secs()));
            format!(
                "'{}' (priority {}{ran}, holds {})",
                vm.view.name,
                vm.view.priority,
                bytes(vm.resident)
            )
        });
        Preemption {
            node: node.name.clone(),
            victims: self
                .victims
                .iter()
                .map(|&vm| cluster.vms[vm].view.id.clone())
                .collect(),
            reason: format!(
                "'{name}' (priority {priority}, {} declared) fits nowhere; on {}, {}; so {victims} {} way there, to begin anew \
                 when there is room",
                bytes(newcomer.declared),
                node.name,
                self.missing,
                if self.victims.len() == 1 { "gives" } else { "give" },
            ),
        }
    }
}

/// Those of a node that have to go, if that is enough. `vms` in the order in which they give way.
fn on_node(
    cluster: &Cluster<'_>,
    newcomer: &mut Newcomer<'_>,
    priority: u32,
    node: usize,
    vms: &[usize],
) -> Option<Choice> {
    let lowest = vms.first().map(|&vm| cluster.vms[vm].view.priority)?;
    if lowest >= priority || cluster.nodes[node].makes_room {
        return None;
    }
    newcomer.beside = Beside::default();
    let missing = match newcomer.check_node(cluster, node) {
        Err(missing) if missing.is_of_room() => missing,
        _ => return None,
    };
    let may = |&vm: &usize| {
        cluster.vms[vm].view.priority < priority && !cluster.together.is_wanted(vm, &newcomer.marks)
    };
    let may: Vec<usize> = vms.iter().copied().filter(may).collect();
    let mut fits_without = |gone: &[usize]| {
        let sum = |of: fn(&Vm<'_>) -> f64| -> f64 { gone.iter().map(|&vm| of(&cluster.vms[vm])).sum() };
        newcomer.beside = Beside {
            declared: -sum(|vm| vm.declared),
            vcpus: -sum(|vm| f64::from(vm.view.cpus)),
            cpu: -sum(|vm| vm.demand),
            memory: -sum(|vm| vm.resident),
            gone: gone.len(),
            exclusive_gone: gone
                .iter()
                .filter(|&&vm| is_exclusive(cluster.vms[vm].view.rules.as_deref()))
                .count(),
            ..Beside::default()
        };
        newcomer.check_node(cluster, node).is_ok()
    };
    let enough = (1..=may.len().min(MOST_VICTIMS)).find(|&count| fits_without(&may[..count]))?;
    let mut victims = may[..enough].to_vec();
    let highest = |victims: &[usize]| {
        let priorities = victims.iter().map(|&vm| cluster.vms[vm].view.priority);
        priorities.max().unwrap_or(0)
    };
    let most = highest(&victims);
    let alone = may
        .iter()
        .filter(|&&vm| cluster.vms[vm].view.priority <= most)
        .find(|&&vm| fits_without(&[vm]));
    if let Some(&alone) = alone {
        victims = vec![alone];
    }
    // Whoever would lose most is spared first.
    for index in (0..victims.len()).rev() {
        let spared = victims.remove(index);
        if !fits_without(&victims) {
            victims.insert(index, spared);
        }
    }
    Some(Choice {
        node,
        highest: highest(&victims),
        ran: victims
            .iter()
            .filter_map(|&vm| cluster.vms[vm].view.ran)
            .fold(Duration::ZERO, Duration::saturating_add),
        resident: victims.iter().map(|&vm| cluster.vms[vm].resident).sum(),
        victims,
        missing,
    })
}

/// Some by their words, the others by their number.
fn listed(cluster: &Cluster<'_>, vms: &[usize], words: impl Fn(&Vm<'_>) -> String) -> String {
    const FEW: usize = 4;
    let mut each: Vec<String> = vms.iter().take(FEW).map(|&vm| words(&cluster.vms[vm])).collect();
    if vms.len() > FEW {
        each.push(format!("{} more", vms.len() - FEW));
    }
    match each.as_slice() {
        [before @ .., last] if !before.is_empty() => format!("{} and {last}", before.join(", ")),
        _ => each.concat(),
    }
}
