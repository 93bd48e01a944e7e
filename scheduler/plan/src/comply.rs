//! Rules: a VM whose node is not, or no longer, as it asks goes to one that is. Rules change, and so do the labels of
//! nodes; ushering and draining may part what belongs together. A move must not break the rules of one that stays, so
//! every one leaves fewer broken, and they come to an end.

use crate::action::{Action, ActionKind, Note, NoteKind, Plan};
use crate::cluster::{Cluster, bytes};
use crate::model::NodeState;
use crate::newcomer::Newcomer;
use crate::place::{best_node, rejections};
use crate::reject::{RejectReason, summarise};

/// So many notes a round list the nodes that were tried; that takes time in a large cluster.
const DETAILED_NOTES: usize = 16;

/// Plans the moves of VMs whose rules do not hold where they are, the smallest first, into `plan`.
pub(crate) fn comply(cluster: &mut Cluster<'_>, plan: &mut Plan) {
    let mut vms: Vec<usize> = (0..cluster.vms.len())
        .filter(|&vm| cluster.vms[vm].view.rules.is_some() && wrong(cluster, vm).is_some())
        .collect();
    vms.sort_by(|&a, &b| {
        let resident = |vm: usize| cluster.vms[vm].resident;
        resident(a).total_cmp(&resident(b)).then(a.cmp(&b))
    });
    for vm in vms {
        // One that was planned to leave may have put it right.
        let Some(why) = wrong(cluster, vm) else { continue };
        match decide(cluster, vm, plan.notes.len() < DETAILED_NOTES) {
            Decision::Move(to) => {
                let target = &cluster.nodes[to];
                let reason = format!(
                    "'{}' is on {} against its rules: {why}; {} then holds {} of {}",
                    cluster.vms[vm].view.name,
                    cluster.vms[vm].view.node,
                    target.view.name,
                    bytes(target.settled + cluster.vms[vm].resident),
                    target.view.memory,
                );
                plan.actions
                    .push(Action::new(cluster, ActionKind::Rules, vm, to, reason));
                cluster.apply(vm, to);
            }
            Decision::Later => {}
            Decision::Stuck(because) => {
                let view = cluster.vms[vm].view;
                plan.notes.push(Note {
                    kind: NoteKind::RulesStuck,
                    node: view.node.clone(),
                    vm: Some(view.id.clone()),
                    text: format!(
                        "'{}' stays on {} against its rules: {why}; {because}",
                        view.name, view.node
                    ),
                });
            }
        }
    }
}

/// What is wrong with a VM where it is; nothing if it moves, or the node is drained or does not answer.
pub(crate) fn wrong(cluster: &Cluster<'_>, number: usize) -> Option<RejectReason> {
    let vm = &cluster.vms[number];
    let node = cluster.nodes[vm.node].view;
    if vm.leaving || !matches!(node.state, NodeState::Ready | NodeState::Cordoned) {
        return None;
    }
    let rules = vm.view.rules.as_deref()?;
    if let Some(term) = rules.selector.iter().find(|term| !term.matches(&node.labels)) {
        return Some(RejectReason::Selector { term: term.clone() });
    }
    let stays = |&&other: &&usize| {
        let of = &cluster.vms[other];
        other != number && (!of.leaving || of.to == Some(vm.node))
    };
    if rules.exclusive {
        let vms = cluster.nodes[vm.node].vms.iter().filter(stays).count();
        if vms > 0 {
            return Some(RejectReason::NotAlone { vms });
        }
    }
    cluster.together.wrong(number, vm.node).map(RejectReason::from)
}

enum Decision {
    Move(usize),
    Later,
    Stuck(String),
}

fn decide(cluster: &mut Cluster<'_>, vm: usize, detailed: bool) -> Decision {
    if let Some(why) = cluster.immobile(vm, cluster.policy.retry_after) {
        return if why.is_temporary() {
            Decision::Later
        } else {
            Decision::Stuck(why.to_string())
        };
    }
    if !cluster.may_send(cluster.vms[vm].node) {
        return Decision::Later;
    }
    if cluster.is_needed(vm) {
        return Decision::Stuck("another VM there is to be with it".to_owned());
    }
    let newcomer = Newcomer::corrected(cluster, vm);
    if let Some(to) = best_node(cluster, &newcomer, None) {
        return Decision::Move(to);
    }
    if newcomer.waits_for_a_move(cluster, None) {
        return Decision::Later;
    }
    Decision::Stuck(if detailed {
        format!(
            "nothing fits: {}",
            summarise(&rejections(cluster, &newcomer, None))
        )
    } else {
        "nothing fits".to_owned()
    })
}
