//! What holds for every cluster.

mod common;

use std::time::Duration;

use common::{clusters, finish, start};
use proptest::prelude::*;
use shoal_plan::score::score;
use shoal_plan::{
    ActionKind, Bytes, CannotMove, ClusterSnapshot, Estimate, Kernels, KvmKind, LaunchRequest, Mode,
    NodeName, NodeState, NodeView, Note, NoteKind, PlaceError, Policy, RejectReason, Rules, SoftwareKernel,
    VmId, VmView, bring, expel, place_launch, place_launches, place_migration, round, text,
};

fn policies() -> impl Strategy<Value = Policy> {
    (
        1.0..3.0f64,
        0.5..1.0f64,
        0.5..1.0f64,
        1usize..20,
        1usize..4,
        1usize..4,
        (
            1u32..6,
            prop_oneof![2 => Just(Mode::Spread), 1 => Just(Mode::Pack)],
            0.5..6.0f64,
            0.5..3.0f64,
        ),
    )
        .prop_map(
            |(
                overcommit,
                usher_threshold,
                part,
                max_migrations,
                max_out_per_node,
                max_in_per_node,
                (aggressiveness, mode, cpu_overcommit, queue_slots),
            )| Policy {
                cpu_overcommit,
                queue_slots,
                aggressiveness,
                mode,
                overcommit,
                usher_threshold,
                usher_target: usher_threshold * part,
                max_migrations,
                max_out_per_node,
                max_in_per_node,
                ..Policy::default()
            },
        )
}

fn node<'a>(snapshot: &'a ClusterSnapshot, name: &NodeName) -> &'a NodeView {
    snapshot
        .nodes
        .iter()
        .find(|node| node.name == *name)
        .expect("a node of the snapshot")
}

/// Here or on the way to here.
/// CPUs that a VM wants.
fn wanted(vm: &VmView) -> f64 {
    match vm.cpu {
        _ if vm.suspended => 0.0,
        Some(cpu) if vm.resident.is_some() => cpu.mean,
        _ => f64::from(vm.cpus),
    }
}

fn counts_on(vm: &VmView, name: &NodeName) -> bool {
    vm.node == *name || arrives_at(vm, name)
}

fn arrives_at(vm: &VmView, name: &NodeName) -> bool {
    vm.in_flight.as_ref().is_some_and(|flight| flight.to == *name)
}

fn declared(snapshot: &ClusterSnapshot, name: &NodeName) -> f64 {
    snapshot
        .vms
        .iter()
        .filter(|vm| counts_on(vm, name))
        .map(|vm| vm.declared.0 as f64)
        .sum()
}

fn vcpus(snapshot: &ClusterSnapshot, name: &NodeName) -> f64 {
    let there = snapshot.vms.iter().filter(|vm| counts_on(vm, name));
    there.map(|vm| f64::from(vm.cpus)).sum()
}

/// vCPUs that a node takes in all, with a little for rounding.
fn takes(node: &NodeView, factor: f64) -> f64 {
    (f64::from(node.cpus) - node.reserved_cpus).max(0.0) * factor + 1e-6
}

/// What the VMs of a node use of its CPUs, those that were not reported yet all of theirs. There is nothing else in these
/// clusters.
fn in_use(snapshot: &ClusterSnapshot, name: &NodeName) -> f64 {
    let there = snapshot.vms.iter().filter(|vm| counts_on(vm, name));
    there.map(wanted).sum()
}

fn expected(vm: &VmView, policy: &Policy) -> f64 {
    vm.resident
        .map_or((vm.declared.0 as f64 / policy.overcommit).floor(), |resident| {
            resident.0 as f64
        })
}

fn occupied(snapshot: &ClusterSnapshot, policy: &Policy, name: &NodeName) -> f64 {
    snapshot
        .vms
        .iter()
        .filter(|vm| counts_on(vm, name))
        .map(|vm| expected(vm, policy))
        .sum()
}

/// The first rule of a VM that would not hold on a node, with the moves under way having ended.
fn broken_rule(after: &ClusterSnapshot, vm: &VmView, to: &NodeView, group_moves: bool) -> Option<String> {
    let nothing = Rules::default();
    let rules = vm.rules.as_deref().unwrap_or(&nothing);
    if let Some(term) = rules.selector.iter().find(|term| !term.matches(&to.labels)) {
        return Some(format!("selector {term}"));
    }
    if let Some(taint) = Rules::untolerated(Some(rules), &to.taints) {
        return Some(format!("taint {taint}"));
    }
    let others = || after.vms.iter().filter(|other| other.id != vm.id);
    for other in others().filter(|other| counts_on(other, &to.name)) {
        if rules.exclusive || other.rules.as_ref().is_some_and(|rules| rules.exclusive) {
            return Some(format!("the node for itself, beside {}", other.id));
        }
        if let Some(term) = rules
            .anti_affinity
            .iter()
            .find(|term| term.matches(&other.labels))
        {
            return Some(format!("anti-affinity {term}"));
        }
        let theirs = other.rules.iter().flat_map(|rules| &rules.anti_affinity);
        if let Some(term) = theirs.into_iter().find(|term| term.matches(&vm.labels)) {
            return Some(format!("anti-affinity there {term}"));
        }
    }
    for term in &rules.affinity {
        let ends = |other: &VmView| match &other.in_flight {
            Some(flight) => flight.to.clone(),
            None => other.node.clone(),
        };
        let wanted = || others().filter(|other| term.matches(&other.labels));
        let first = wanted().next().is_none() && (term.matches(&vm.labels) || group_moves);
        // They were all on its node, or on their way to it, when it left.
        let leads = group_moves && wanted().all(|other| other.node == vm.node || ends(other) == vm.node);
        if !first && !leads && !wanted().any(|other| ends(other) == to.name) {
            return Some(format!("affinity {term}"));
        }
    }
    None
}

/// Whether a VM that runs can go on with the KVM of another node.
fn goes_on_there(snapshot: &ClusterSnapshot, vm: &VmView, to: &NodeView) -> bool {
    let kind = vm.kvm.or(node(snapshot, &vm.node).kvm);
    let same = kind.is_none() || to.kvm.is_none() || kind == to.kvm;
    let usable = to.kvm.is_some() || to.kvm_trouble.is_none();
    let takes_kernel = !vm.ring3 || kind.is_none() || to.kvm_trouble.is_none();
    same && usable && takes_kernel
}

/// Whether an image has a kernel for the KVM of a node, and that has enough CPUs.
fn starts_there(kernels: &Kernels, cpus: u32, to: &NodeView) -> bool {
    match (to.kvm, kernels.software) {
        (None, _) => to.kvm_trouble.is_none(),
        (Some(KvmKind::Hardware), _) => kernels.hardware,
        (Some(KvmKind::Software), None) => false,
        (Some(KvmKind::Software), Some(kernel)) => {
            let takes_kernel = kernel == SoftwareKernel::Plain || to.kvm_trouble.is_none();
            takes_kernel && kernels.software_cpus.is_none_or(|has| cpus <= has)
        }
    }
}

fn kernels() -> impl Strategy<Value = Kernels> {
    let software = prop_oneof![
        Just(None),
        Just(Some(SoftwareKernel::Plain)),
        Just(Some(SoftwareKernel::Ring3)),
    ];
    (any::<bool>(), software, prop::option::of(1u32..4)).prop_map(|(hardware, software, software_cpus)| {
        Kernels {
            image: "linux".into(),
            hardware,
            software,
            software_cpus,
        }
    })
}

/// What does not fit if each node in turn dies, where every VM needs what it holds and what is expected of a new one.
fn unfit_without_one(snapshot: &ClusterSnapshot, policy: &Policy) -> Option<NodeName> {
    let need = |vm: &VmView| expected(vm, policy).max(vm.declared.0 as f64 / policy.overcommit);
    let ends = |vm: &VmView| {
        vm.in_flight
            .as_ref()
            .map_or(vm.node.clone(), |flight| flight.to.clone())
    };
    let on = |name: &NodeName| -> Vec<f64> {
        snapshot
            .vms
            .iter()
            .filter(|vm| ends(vm) == *name)
            .map(need)
            .collect()
    };
    let dies = |dead: &&NodeView| {
        let ready = snapshot
            .nodes
            .iter()
            .filter(|node| node.state == NodeState::Ready);
        let mut rooms: Vec<f64> = ready
            .filter(|node| node.name != dead.name)
            .map(|node| {
                let usable = node.memory.0 as f64 * policy.usher_threshold - node.reserved_memory.0 as f64;
                usable - on(&node.name).iter().sum::<f64>()
            })
            .collect();
        let mut needs = on(&dead.name);
        needs.sort_by(f64::total_cmp);
        while let Some(need) = needs.pop() {
            rooms.sort_by(f64::total_cmp);
            match rooms.last_mut() {
                Some(room) if *room >= need => *room -= need,
                _ => return true,
            }
        }
        false
    };
    snapshot.nodes.iter().find(dies).map(|node| node.name.clone())
}

/// With growth to the horizon, the moves under way having ended.
fn projected(snapshot: &ClusterSnapshot, policy: &Policy, name: &NodeName) -> f64 {
    let stays = |vm: &&VmView| arrives_at(vm, name) || vm.node == *name && vm.in_flight.is_none();
    let grown = |vm: &VmView| {
        let now = expected(vm, policy);
        (now + vm.growth.0 as f64 * policy.usher_horizon.as_secs_f64()).min(now.max(vm.declared.0 as f64))
    };
    snapshot.vms.iter().filter(stays).map(grown).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_plan_obeys_filters_and_limits(snapshot in clusters(), policy in policies()) {
        let plan = round(&snapshot, &policy);
        // What ushering puts on a node as a last resort is no reproach to what was planned to go there before.
        let mut after = snapshot.clone();
        for action in &plan.actions {
            start(&mut after, &shoal_plan::Plan { actions: vec![action.clone()], ..Default::default() });
            let vm = snapshot.vms.iter().find(|vm| vm.id == action.vm).expect("a VM of the snapshot");
            let to = node(&snapshot, &action.to);
            prop_assert_eq!(&vm.node, &action.from);
            prop_assert_ne!(&action.from, &action.to);
            prop_assert!(vm.in_flight.is_none() && vm.cannot_move.is_none());
            prop_assert_eq!(to.state, NodeState::Ready);
            prop_assert!(to.pressure_memory < policy.pressure_threshold);
            prop_assert!(vm.cpus <= to.cpus);
            prop_assert!(goes_on_there(&snapshot, vm, to), "{}", &action.reason);
            prop_assert_ne!(node(&snapshot, &action.from).state, NodeState::Unreachable);
            let balance = matches!(action.kind, ActionKind::Rebalance | ActionKind::Swap | ActionKind::Pack);
            let rest = if balance { policy.cool_down } else { policy.retry_after };
            prop_assert!(vm.since_last_move.is_none_or(|age| age >= rest));
            prop_assert!(!balance || vm.ran.is_none_or(|ran| ran >= policy.settle));
            prop_assert!(!action.reason.is_empty());

            let memory = to.memory.0 as f64;
            // Ushering goes beyond the limits where a node would run out and nothing fits, but never to all of a node.
            let runs_out = declared(&after, &action.from) > node(&snapshot, &action.from).memory.0 as f64;
            let last_resort = action.kind == ActionKind::Usher && runs_out;
            let part = if last_resort {
                f64::midpoint(policy.usher_threshold, 1.0)
            } else {
                let lends = to.memory.0.saturating_sub(to.reserved_memory.0) as f64;
                prop_assert!(declared(&after, &to.name) <= lends * policy.overcommit);
                policy.usher_threshold
            };
            let reserved = to.reserved_memory.0 as f64;
            let used = occupied(&after, &policy, &to.name) + reserved;
            prop_assert!(used <= memory * part);
            let ahead = projected(&after, &policy, &to.name) + reserved;
            prop_assert!(ahead <= memory * part, "{} of {memory}", ahead);

            prop_assert!(!balance || vcpus(&after, &to.name) <= takes(to, policy.cpu_overcommit));

            let group_moves = matches!(action.kind, ActionKind::Usher | ActionKind::Drain);
            prop_assert_eq!(broken_rule(&after, vm, to, group_moves), None, "{}", &action.reason);

            let out = after.vms.iter().filter(|vm| vm.node == action.from && vm.in_flight.is_some()).count();
            let into = after.vms.iter().filter(|vm| arrives_at(vm, &action.to)).count();
            prop_assert!(out <= policy.max_out_per_node && into <= policy.max_in_per_node);
        }
        let under_way = after.vms.iter().filter(|vm| vm.in_flight.is_some()).count();
        prop_assert!(plan.actions.is_empty() || under_way <= policy.max_migrations);
    }

    #[test]
    fn every_rebalance_move_lowers_the_score(snapshot in clusters(), policy in policies()) {
        let plan = round(&snapshot, &policy);
        let mut now = snapshot.clone();
        let mut exchanged = None;
        prop_assert!((score(&now, &policy) - plan.score_before).abs() <= 1e-6 * plan.score_before.abs());
        for action in &plan.actions {
            let before = score(&now, &policy);
            start(&mut now, &shoal_plan::Plan { actions: vec![action.clone()], ..Default::default() });
            let after = score(&now, &policy);
            match (action.kind, exchanged) {
                (ActionKind::Rebalance, _) => prop_assert!(after < before, "{before} to {after}: {}", action.reason),
                (ActionKind::Swap, None) => {
                    exchanged = Some((before, action.from.clone(), action.to.clone()));
                    continue;
                }
                (ActionKind::Swap, Some((before, from, to))) => {
                    prop_assert_eq!((&from, &to), (&action.to, &action.from));
                    prop_assert!(after < before, "{before} to {after}: {}", action.reason);
                }
                (_, exchanged) => prop_assert_eq!(exchanged, None),
            }
            exchanged = None;
        }
        prop_assert_eq!(exchanged, None);
        prop_assert!((score(&now, &policy) - plan.score_after).abs() <= 1e-6 * plan.score_after.abs().max(1.0));
    }

    #[test]
    fn planning_and_moving_comes_to_an_end(mut snapshot in clusters(), policy in policies()) {
        let policy = Policy { cool_down: Duration::ZERO, retry_after: Duration::ZERO, ..policy };
        finish(&mut snapshot);
        for _ in 0..2000 {
            let plan = round(&snapshot, &policy);
            if plan.actions.is_empty() {
                return Ok(());
            }
            start(&mut snapshot, &plan);
            finish(&mut snapshot);
            for vm in &mut snapshot.vms {
                if plan.resume.iter().any(|hold| hold.vm == vm.id) {
                    (vm.suspended, vm.suspended_growth) = (false, None);
                }
            }
        }
        prop_assert!(false, "still moving after 2000 rounds");
    }

    #[test]
    fn packing_opens_no_node_and_ends_on_no_more_than_before(mut snapshot in clusters(), policy in policies()) {
        let policy = Policy { cool_down: Duration::ZERO, mode: Mode::Pack, ..policy };
        finish(&mut snapshot);
        let used = |snapshot: &ClusterSnapshot| {
            let nodes: std::collections::BTreeSet<_> = snapshot.vms.iter().map(|vm| vm.node.clone()).collect();
            nodes
        };
        for _ in 0..2000 {
            let mut open = used(&snapshot);
            let plan = round(&snapshot, &policy);
            let packing = |action: &shoal_plan::Action| action.kind == ActionKind::Pack;
            if !plan.actions.iter().all(packing) || plan.actions.is_empty() {
                return Ok(());
            }
            let short = |name: &NodeName| {
                let load: f64 = snapshot.vms.iter().filter(|vm| vm.node == *name).map(wanted).sum();
                let node = node(&snapshot, name);
                load > (node.usable_cpus() - node.reserved_cpus).max(0.1) * node.speed
            };
            for action in &plan.actions {
                prop_assert!(open.contains(&action.to) || short(&action.from), "{}", action.reason);
                open.insert(action.to.clone());
            }
            start(&mut snapshot, &plan);
            finish(&mut snapshot);
            for name in &plan.empty_nodes {
                prop_assert!(!used(&snapshot).contains(name), "{name}");
            }
        }
        prop_assert!(false, "still packing after 2000 rounds");
    }

    #[test]
    fn order_does_not_matter(mut snapshot in clusters(), policy in policies()) {
        let plan = round(&snapshot, &policy);
        prop_assert_eq!(&plan, &round(&snapshot, &policy));
        snapshot.nodes.reverse();
        snapshot.vms.reverse();
        prop_assert_eq!(&plan, &round(&snapshot, &policy));
    }

    #[test]
    fn a_launch_goes_where_it_fits_or_says_why_not(
        snapshot in clusters(), policy in policies(), cpus in 1u32..20, mib in 1u64..10_000, pin in 0usize..12,
        kernels in kernels(), queued in any::<bool>(),
    ) {
        let pinned = snapshot.nodes.get(pin).map(|node| node.name.clone());
        let request = LaunchRequest {
            cpus, memory: Bytes::mib(mib), node: pinned.clone(), kernels: Some(kernels.clone().into()), queued,
            ..LaunchRequest::default()
        };
        let factor = if queued { policy.queue_slots } else { policy.cpu_overcommit };
        match place_launch(&snapshot, &policy, &request) {
            Ok(placement) => {
                let to = node(&snapshot, &placement.node);
                prop_assert_eq!(to.state, NodeState::Ready);
                prop_assert!(pinned.is_none_or(|pinned| pinned == placement.node));
                prop_assert!(cpus <= to.cpus);
                prop_assert!(starts_there(&kernels, cpus, to));
                let memory = to.memory.0 as f64;
                let lends = to.memory.0.saturating_sub(to.reserved_memory.0) as f64;
                let needed = request.memory.0 as f64;
                prop_assert!(declared(&snapshot, &to.name) + needed <= lends * policy.overcommit);
                let used = occupied(&snapshot, &policy, &to.name) + to.reserved_memory.0 as f64
                    + (needed / policy.overcommit).floor();
                prop_assert!(used <= memory * policy.usher_threshold);
                prop_assert!(vcpus(&snapshot, &to.name) + f64::from(cpus) <= takes(to, factor));
                let busy = in_use(&snapshot, &to.name);
                prop_assert!(!queued || busy - 0.5 + f64::from(cpus) <= takes(to, factor), "{busy} in use");
            }
            Err(error) => {
                let asked = |node: &&NodeView| request.node.as_ref().is_none_or(|asked| *asked == node.name);
                let mut nodes = snapshot.nodes.iter().filter(asked);
                let final_error = nodes.all(|node| {
                    let usable = node.kvm.is_some() || node.kvm_trouble.is_none();
                    let memory = node.memory.0 as f64;
                    let expected = (request.memory.0 as f64 / policy.overcommit).floor();
                    usable && !starts_there(&kernels, cpus, node)
                        || cpus > node.cpus
                        || f64::from(cpus) > f64::from(node.cpus) * factor + 1e-6
                        || request.memory.0 as f64 > memory * policy.overcommit
                        || expected > memory * policy.usher_threshold
                });
                prop_assert_eq!(error.is_final(), final_error, "{}", error);
                let PlaceError::NothingFits { rejections, .. } = error else { panic!("{error}") };
                prop_assert_eq!(rejections.len(), snapshot.nodes.len());
            }
        }
    }

    #[test]
    fn a_move_that_is_asked_for_keeps_to_the_kind_of_kvm(
        snapshot in clusters(), policy in policies(), vm in 0usize..40, to in 0usize..8,
    ) {
        let Some(vm) = snapshot.vms.get(vm) else { return Ok(()) };
        let to = snapshot.nodes.get(to).map(|node| node.name.clone());
        if let Ok(placement) = place_migration(&snapshot, &policy, &vm.id, to.as_ref()) {
            prop_assert!(goes_on_there(&snapshot, vm, node(&snapshot, &placement.node)));
        }
        for name in snapshot.nodes.iter().map(|node| &node.name) {
            let plans = [expel(&snapshot, &policy, name), bring(&snapshot, &policy, name)];
            for action in plans.iter().flat_map(|plan| &plan.actions) {
                let vm = snapshot.vms.iter().find(|vm| vm.id == action.vm).expect("a VM of the snapshot");
                prop_assert!(goes_on_there(&snapshot, vm, node(&snapshot, &action.to)), "{}", &action.reason);
            }
        }
    }

    #[test]
    fn several_launches_obey_the_rules_of_all(
        mut snapshot in clusters(), policy in policies(), n_plus_one in any::<bool>(),
    ) {
        // Half of the VMs are there, the other half are to start with the same labels and rules.
        let policy = Policy { n_plus_one, ..policy };
        snapshot.nodes.iter_mut().for_each(|node| node.pressure_memory = 0.0);
        let to_start = snapshot.vms.split_off(snapshot.vms.len() / 2);
        let requests: Vec<LaunchRequest> = to_start
            .iter()
            .map(|vm| LaunchRequest {
                cpus: 1,
                queued: vm.preemptible,
                memory: vm.declared,
                labels: vm.labels.clone(),
                rules: vm.rules.clone(),
                ..LaunchRequest::default()
            })
            .collect();
        finish(&mut snapshot);
        let placements = place_launches(&snapshot, &policy, &requests);
        prop_assert_eq!(&placements, &place_launches(&snapshot, &policy, &requests));
        for (vm, placement) in to_start.into_iter().zip(placements) {
            let started = |name: &NodeName| VmView {
                node: name.clone(),
                cpus: 1,
                resident: None,
                in_flight: None,
                ..vm.clone()
            };
            match placement {
                Ok(placement) => {
                    let to = node(&snapshot, &placement.node).clone();
                    prop_assert_eq!(broken_rule(&snapshot, &started(&to.name), &to, false), None);
                    let factor = if vm.preemptible { policy.queue_slots } else { policy.cpu_overcommit };
                    snapshot.vms.push(started(&to.name));
                    prop_assert!(vcpus(&snapshot, &to.name) <= takes(&to, factor));
                    if n_plus_one {
                        prop_assert_eq!(unfit_without_one(&snapshot, &policy), None);
                    }
                }
                Err(PlaceError::NothingFits { rejections, .. }) => {
                    prop_assert_eq!(rejections.len(), snapshot.nodes.len());
                    for rejection in rejections {
                        if matches!(rejection.reason, RejectReason::NPlusOne { .. }) {
                            let mut with = snapshot.clone();
                            with.vms.push(started(&rejection.node));
                            prop_assert!(unfit_without_one(&with, &policy).is_some());
                        }
                    }
                }
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    }

    #[test]
    fn text_comes_back_as_it_was(snapshot in clusters(), policy in policies()) {
        let written = text::print(&snapshot, &policy);
        let read = text::parse(&written).expect("what was written");
        prop_assert_eq!(&read.snapshot, &snapshot);
        prop_assert_eq!(&read.policy, &policy);
        prop_assert_eq!(round(&read.snapshot, &read.policy), round(&snapshot, &policy));
    }

    #[test]
    fn hostile_text_is_an_error_and_never_a_panic(
        snapshot in clusters(), noise in "\\PC{0,30}", at in 0usize..4000, cut in 0usize..40,
    ) {
        let mut written: Vec<char> = text::print(&snapshot, &Policy::default()).chars().collect();
        let at = at.min(written.len());
        let end = (at + cut).min(written.len());
        written.splice(at..end, noise.chars());
        let hostile: String = written.into_iter().collect();
        if let Ok(read) = text::parse(&hostile) {
            let _ = round(&read.snapshot, &read.policy);
        }
        let _ = text::parse(&format!("shoal-cluster 1\n{noise}\nnode {noise}\nvm a {noise}\npolicy {noise}"));
    }

    /// Of what stays on a node the lowest priority that grows is suspended, and nothing where that is switched off.
    #[test]
    fn vms_are_suspended_where_memory_ends_and_resumed_where_there_is_room(
        snapshot in clusters(),
        policy in policies(),
    ) {
        let plan = round(&snapshot, &policy);
        let mut after = snapshot.clone();
        start(&mut after, &plan);
        let vm = |id: &VmId| snapshot.vms.iter().find(|vm| vm.id == *id).expect("a VM of the snapshot");
        let leaves = |vm: &VmView| {
            vm.in_flight.is_some() || plan.actions.iter().any(|action| action.vm == vm.id)
        };
        let runs = |vm: &VmView| {
            let stays = vm.cannot_move.is_none_or(|why| why.is_wished() || why == CannotMove::Settling);
            stays && !vm.suspended
        };
        for hold in &plan.suspend {
            let victim = vm(&hold.vm);
            prop_assert!(runs(victim) && !leaves(victim) && victim.growth.0 > 0 && victim.node == hold.node);
            let others = snapshot.vms.iter().filter(|other| {
                other.node == hold.node && runs(other) && !leaves(other) && other.growth.0 > 0
            });
            for other in others {
                prop_assert!(other.priority >= victim.priority, "{}: {}", other.id, hold.reason);
            }
            let stuck = |note: &Note| note.kind == NoteKind::UsherStuck && note.node == hold.node;
            let sends = snapshot.vms.iter().any(|vm| vm.node == hold.node && leaves(vm));
            let under_way = after.vms.iter().filter(|vm| vm.in_flight.is_some()).count();
            let busy = snapshot.nodes.iter().any(|node| {
                after.vms.iter().filter(|vm| arrives_at(vm, &node.name)).count() >= policy.max_in_per_node
            });
            let limited = under_way >= policy.max_migrations || busy;
            prop_assert!(plan.notes.iter().any(stuck) || sends || limited, "{}", hold.reason);
        }
        for hold in &plan.resume {
            let waits = vm(&hold.vm);
            prop_assert!(waits.suspended && waits.suspended_growth.is_some() && !leaves(waits));
            let node = node(&snapshot, &hold.node);
            let room = node.memory.0 as f64 * policy.usher_target;
            prop_assert!(occupied(&snapshot, &policy, &node.name) <= room.max(1.0), "{}", hold.reason);
        }
        for holds in [&plan.suspend, &plan.resume] {
            let mut nodes: Vec<&NodeName> = holds.iter().map(|hold| &hold.node).collect();
            nodes.sort();
            let before = nodes.len();
            nodes.dedup();
            prop_assert_eq!(nodes.len(), before, "one of a node at a time");
        }
        let off = round(&snapshot, &Policy { suspend: false, ..policy });
        prop_assert!(off.suspend.is_empty());
        prop_assert_eq!(off.actions, plan.actions);
    }

    #[test]
    fn nonsense_numbers_never_panic(
        mut snapshot in clusters(),
        float in prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(0.0), Just(f64::MAX)],
        integer in prop_oneof![Just(0u64), Just(u64::MAX), Just(1)],
    ) {
        for node in snapshot.nodes.iter_mut().step_by(2) {
            (node.speed, node.other) = (float, Estimate { mean: float, error: float });
            (node.pressure_memory, node.memory, node.cpus) = (float, Bytes(integer), 0);
            (node.reserved_memory, node.reserved_cpus) = (Bytes(integer), float);
        }
        for vm in snapshot.vms.iter_mut().step_by(2) {
            vm.cpu = Some(Estimate { mean: float, error: float });
            (vm.declared, vm.resident) = (Bytes(integer), Some(Bytes(integer)));
            (vm.growth.0, vm.cpus) = (integer, 0);
            vm.in_flight = Some(shoal_plan::InFlight { to: vm.node.clone(), received: Bytes(integer) });
        }
        let _ = round(&snapshot, &Policy { n_plus_one: true, ..Policy::default() });
        let plan = round(&snapshot, &Policy::default());
        let _ = text::print_plan(&plan);
        let _ = text::print(&snapshot, &Policy::default());
        let request = LaunchRequest { cpus: u32::MAX, memory: Bytes(integer), ..LaunchRequest::default() };
        let _ = place_launch(&snapshot, &Policy::default(), &request);
        let _ = place_migration(&snapshot, &Policy::default(), &VmId::new("vm00"), None);
    }
}
