//! What holds for every cluster.

mod common;

use std::time::Duration;

use common::{clusters, finish, start};
use proptest::prelude::*;
use shoal_plan::score::score;
use shoal_plan::{
    ActionKind, Bytes, ClusterSnapshot, LaunchRequest, NodeName, NodeState, NodeView, PlaceError, Policy,
    VmId, VmView, place_launch, place_migration, round, text,
};

fn policies() -> impl Strategy<Value = Policy> {
    (
        1.0..3.0f64,
        0.5..1.0f64,
        0.5..1.0f64,
        1usize..20,
        1usize..4,
        1usize..4,
    )
        .prop_map(
            |(overcommit, usher_threshold, part, max_migrations, max_out_per_node, max_in_per_node)| Policy {
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
        let mut after = snapshot.clone();
        start(&mut after, &plan);
        for action in &plan.actions {
            let vm = snapshot.vms.iter().find(|vm| vm.id == action.vm).expect("a VM of the snapshot");
            let to = node(&snapshot, &action.to);
            prop_assert_eq!(&vm.node, &action.from);
            prop_assert_ne!(&action.from, &action.to);
            prop_assert!(vm.in_flight.is_none() && vm.cannot_move.is_none());
            prop_assert_eq!(to.state, NodeState::Ready);
            prop_assert!(to.pressure_memory < policy.pressure_threshold);
            prop_assert!(vm.cpus <= to.cpus);
            prop_assert_ne!(node(&snapshot, &action.from).state, NodeState::Unreachable);
            let rest = if action.kind == ActionKind::Rebalance { policy.cool_down } else { policy.retry_after };
            prop_assert!(vm.since_last_move.is_none_or(|age| age >= rest));
            prop_assert!(!action.reason.is_empty());

            let memory = to.memory.0 as f64;
            // Ushering goes beyond the limits where a node would run out and nothing fits, but never to all of a node.
            let runs_out = declared(&snapshot, &action.from) > node(&snapshot, &action.from).memory.0 as f64;
            let last_resort = action.kind == ActionKind::Usher && runs_out;
            let part = if last_resort {
                f64::midpoint(policy.usher_threshold, 1.0)
            } else {
                prop_assert!(declared(&after, &to.name) <= memory * policy.overcommit);
                policy.usher_threshold
            };
            prop_assert!(occupied(&after, &policy, &to.name) <= memory * part);
            let ahead = projected(&after, &policy, &to.name);
            prop_assert!(ahead <= memory * part, "{} of {memory}", ahead);

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
        prop_assert!((score(&now, &policy) - plan.score_before).abs() <= 1e-6 * plan.score_before.abs());
        for action in &plan.actions {
            let before = score(&now, &policy);
            start(&mut now, &shoal_plan::Plan { actions: vec![action.clone()], ..Default::default() });
            let after = score(&now, &policy);
            if action.kind == ActionKind::Rebalance {
                prop_assert!(after < before, "{before} to {after}: {}", action.reason);
            }
        }
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
        }
        prop_assert!(false, "still moving after 2000 rounds");
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
    ) {
        let pinned = snapshot.nodes.get(pin).map(|node| node.name.clone());
        let request = LaunchRequest { cpus, memory: Bytes::mib(mib), node: pinned.clone(), cpu_class: None };
        match place_launch(&snapshot, &policy, &request) {
            Ok(placement) => {
                let to = node(&snapshot, &placement.node);
                prop_assert_eq!(to.state, NodeState::Ready);
                prop_assert!(pinned.is_none_or(|pinned| pinned == placement.node));
                prop_assert!(cpus <= to.cpus);
                let memory = to.memory.0 as f64;
                let needed = request.memory.0 as f64;
                prop_assert!(declared(&snapshot, &to.name) + needed <= memory * policy.overcommit);
                let used = occupied(&snapshot, &policy, &to.name) + (needed / policy.overcommit).floor();
                prop_assert!(used <= memory * policy.usher_threshold);
            }
            Err(PlaceError::NothingFits { rejections }) => {
                prop_assert_eq!(rejections.len(), snapshot.nodes.len());
            }
            Err(error) => prop_assert!(false, "{error}"),
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

    #[test]
    fn nonsense_numbers_never_panic(
        mut snapshot in clusters(),
        float in prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(0.0), Just(f64::MAX)],
        integer in prop_oneof![Just(0u64), Just(u64::MAX), Just(1)],
    ) {
        for node in snapshot.nodes.iter_mut().step_by(2) {
            (node.speed, node.load_local, node.load_exported) = (float, float, float);
            (node.pressure_memory, node.memory, node.cpus) = (float, Bytes(integer), 0);
        }
        for vm in snapshot.vms.iter_mut().step_by(2) {
            vm.cpu_use = float;
            (vm.declared, vm.resident) = (Bytes(integer), Some(Bytes(integer)));
            (vm.growth.0, vm.cpus) = (integer, 0);
            vm.in_flight = Some(shoal_plan::InFlight { to: vm.node.clone(), received: Bytes(integer) });
        }
        let plan = round(&snapshot, &Policy::default());
        let _ = text::print_plan(&plan);
        let _ = text::print(&snapshot, &Policy::default());
        let request = LaunchRequest { cpus: u32::MAX, memory: Bytes(integer), node: None, cpu_class: None };
        let _ = place_launch(&snapshot, &Policy::default(), &request);
        let _ = place_migration(&snapshot, &Policy::default(), &VmId::new("vm00"), None);
    }
}
