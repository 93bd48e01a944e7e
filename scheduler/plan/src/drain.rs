//! Draining: every VM leaves a draining node, the hardest to place first. So it is when someone asks that all VMs leave a node
//! (expel), or that those started there come back (bring).

use crate::action::{Action, ActionKind, Note, NoteKind, Plan};
use crate::cluster::{Cluster, bytes};
use crate::model::{ClusterSnapshot, NodeName, NodeState};
use crate::newcomer::Newcomer;
use crate::place::{best_node, rejections};
use crate::policy::Policy;
use crate::reject::summarise;

/// So many notes a round list the nodes that were tried; that takes time in a large cluster.
const DETAILED_NOTES: usize = 16;

/// Plans the moves off draining nodes, and says of every other VM there why it stays for now, into `plan`.
pub(crate) fn drain(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    let draining = (0..cluster.nodes.len()).filter(|&n| cluster.nodes[n].view.state == NodeState::Draining);
    let vms: Vec<usize> = draining.flat_map(|node| cluster.staying(node)).collect();
    go(cluster, vms, ActionKind::Drain, None, plan);
}

/// Plans the moves of all VMs off a node, because someone asked; the node goes on to take VMs. Limits hold, so it is asked
/// again until nothing moves or waits.
#[must_use]
pub fn expel(snapshot: &ClusterSnapshot, policy: &Policy, node: &NodeName) -> Plan {
    asked(snapshot, policy, |cluster, plan| {
        if let Some(node) = cluster.node_number(node) {
            let vms = cluster.staying(node).collect();
            go(cluster, vms, ActionKind::Expel, None, plan);
        }
    })
}

/// Plans the moves of all VMs that were started on a node, and are elsewhere now, back to it, because someone asked. Limits
/// hold, so it is asked again until nothing moves or waits.
#[must_use]
pub fn bring(snapshot: &ClusterSnapshot, policy: &Policy, node: &NodeName) -> Plan {
    asked(snapshot, policy, |cluster, plan| {
        if let Some(number) = cluster.node_number(node) {
            let away = |&vm: &usize| {
                let vm = &cluster.vms[vm];
                vm.node != number && !vm.leaving && vm.view.home.as_ref() == Some(node)
            };
            let vms = (0..cluster.vms.len()).filter(away).collect();
            go(cluster, vms, ActionKind::Bring, Some(number), plan);
        }
    })
}

fn asked(
    snapshot: &ClusterSnapshot,
    policy: &Policy,
    decide: impl FnOnce(&mut Cluster<'_>, &mut Plan),
) -> Plan {
    let mut cluster = Cluster::new(snapshot, policy);
    let mut plan = Plan {
        score_before: cluster.score(),
        slowdown_before: cluster.slowdown(),
        ..Plan::default()
    };
    decide(&mut cluster, &mut plan);
    plan.score_after = cluster.score();
    plan.slowdown_after = cluster.slowdown();
    plan
}

/// Moves VMs off their nodes, those with the most memory first, to where they fit or to the one node they are to go to.
fn go(cluster: &mut Cluster<'_>, mut vms: Vec<usize>, kind: ActionKind, to: Option<usize>, plan: &mut Plan) {
    vms.sort_by(|&a, &b| {
        cluster.vms[b]
            .declared
            .total_cmp(&cluster.vms[a].declared)
            .then(a.cmp(&b))
    });
    for vm in vms {
        match decide(cluster, vm, to, plan.notes.len() < DETAILED_NOTES) {
            Decision::Move(to) => {
                let node = cluster.nodes[cluster.vms[vm].node].view;
                let target = &cluster.nodes[to];
                let why = match kind {
                    ActionKind::Bring => format!("its home is {}", target.view.name),
                    ActionKind::Expel => format!("{} expels its VMs", node.name),
                    _ => format!("{} is drained", node.name),
                };
                let reason = format!(
                    "{why}; '{}' holds {}; {} then holds {} of {}",
                    cluster.vms[vm].view.name,
                    bytes(cluster.vms[vm].resident),
                    target.view.name,
                    bytes(target.settled + cluster.vms[vm].resident),
                    target.view.memory,
                );
                plan.actions.push(Action::new(cluster, kind, vm, to, reason));
                cluster.apply(vm, to);
            }
            Decision::Wait(why) => plan.notes.push(note(cluster, NoteKind::DrainWaiting, vm, &why)),
            Decision::Stuck(why) => plan.notes.push(note(cluster, NoteKind::DrainStuck, vm, &why)),
        }
    }
}

enum Decision {
    Move(usize),
    Wait(String),
    Stuck(String),
}

fn decide(cluster: &mut Cluster<'_>, vm: usize, asked: Option<usize>, detailed: bool) -> Decision {
    match cluster.immobile(vm, cluster.policy.retry_after) {
        Some(why) if why.is_temporary() => return Decision::Wait(why.to_string()),
        Some(why) => return Decision::Stuck(why.to_string()),
        None => {}
    }
    if !cluster.may_send(cluster.vms[vm].node) {
        return Decision::Wait("as many migrations are under way as allowed".to_owned());
    }
    let newcomer = Newcomer::evicted(cluster, vm);
    let room = cluster.largest_room();
    if newcomer.at_horizon() <= room
        && let Some(to) = best_node(cluster, &newcomer, asked)
    {
        return Decision::Move(to);
    }
    let reason = if detailed {
        summarise(&rejections(cluster, &newcomer, asked))
    } else {
        format!("the most any node has left is {}", bytes(room))
    };
    let why = format!(
        "nothing fits: it needs {}: {reason}",
        bytes(newcomer.at_horizon())
    );
    if newcomer.waits_for_a_move(cluster, asked) {
        Decision::Wait(why)
    } else {
        Decision::Stuck(why)
    }
}

fn note(cluster: &Cluster<'_>, kind: NoteKind, vm: usize, why: &str) -> Note {
    let vm = &cluster.vms[vm];
    let text = format!("'{}' stays on {}: {why}", vm.view.name, vm.view.node);
    Note {
        kind,
        node: vm.view.node.clone(),
        vm: Some(vm.view.id.clone()),
        text,
    }
}
