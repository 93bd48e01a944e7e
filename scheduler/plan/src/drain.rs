//! Draining: every VM leaves a draining node, the hardest to place first.

use crate::action::{Action, ActionKind, Note, NoteKind, Plan};
use crate::cluster::{Cluster, bytes};
use crate::model::NodeState;
use crate::place::{Newcomer, best_node, rejections};
use crate::reject::summarise;

/// So many notes a round list the nodes that were tried; that takes time in a large cluster.
const DETAILED_NOTES: usize = 16;

/// Plans the moves off draining nodes, and says of every other VM there why it stays for now, into `plan`.
pub(crate) fn drain(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    let draining = (0..cluster.nodes.len()).filter(|&n| cluster.nodes[n].view.state == NodeState::Draining);
    let mut vms: Vec<usize> = draining.flat_map(|node| cluster.staying(node)).collect();
    vms.sort_by(|&a, &b| {
        cluster.vms[b]
            .declared
            .total_cmp(&cluster.vms[a].declared)
            .then(a.cmp(&b))
    });
    for vm in vms {
        match decide(cluster, vm, plan.notes.len() < DETAILED_NOTES) {
            Decision::Move(to) => {
                let node = &cluster.nodes[cluster.vms[vm].node];
                let target = &cluster.nodes[to];
                let reason = format!(
                    "{} is drained; '{}' holds {}; {} then holds {} of {}",
                    node.view.name,
                    cluster.vms[vm].view.name,
                    bytes(cluster.vms[vm].resident),
                    target.view.name,
                    bytes(target.settled + cluster.vms[vm].resident),
                    target.view.memory,
                );
                plan.actions
                    .push(Action::new(cluster, ActionKind::Drain, vm, to, reason));
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

fn decide(cluster: &mut Cluster<'_>, vm: usize, detailed: bool) -> Decision {
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
        && let Some(to) = best_node(cluster, &newcomer, None)
    {
        return Decision::Move(to);
    }
    let reason = if detailed {
        summarise(&rejections(cluster, &newcomer, None))
    } else {
        format!("the most any node has left is {}", bytes(room))
    };
    let why = format!(
        "nothing fits: it needs {}: {reason}",
        bytes(newcomer.at_horizon())
    );
    if newcomer.waits_for_a_move(cluster) {
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
