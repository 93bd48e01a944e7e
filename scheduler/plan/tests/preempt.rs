//! Who is stopped for a VM of higher priority that fits nowhere.

#[allow(dead_code)] // not all of it is needed here
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{clusters, finish, settle};
use proptest::prelude::*;
use shoal_plan::{
    Bytes, CannotMove, ClusterSnapshot, LaunchRequest, NodeName, NodeState, PlaceError, Policy, Preemption,
    Rules, Turn, VmId, Waiting, make_room, place_launch, round, take_turns, text,
};

fn scenario(body: &str) -> text::Scenario {
    text::parse(&format!("shoal-cluster 1\npolicy overcommit=1\n{body}")).expect("a scenario")
}

fn request(mib: u64, priority: u32) -> LaunchRequest {
    LaunchRequest {
        cpus: 1,
        memory: Bytes::mib(mib),
        priority,
        ..LaunchRequest::default()
    }
}

/// Who gives way to a VM with so much memory, and where.
fn victims(s: &text::Scenario, mib: u64, priority: u32) -> Option<String> {
    make_room(&s.snapshot, &s.policy, "new", &request(mib, priority)).map(|made| words(&made))
}

fn words(made: &Preemption) -> String {
    let victims: Vec<&str> = made.victims.iter().map(VmId::as_str).collect();
    format!("{} on {}", victims.join(" "), made.node)
}

const FULL: &str = "
node node1 cpus=4 memory=1GiB available=124MiB
vm a node=node1 cpus=1 memory=300MiB resident=300MiB priority=2 preemptible=yes ran=100s
vm b node=node1 cpus=1 memory=300MiB resident=300MiB priority=2 preemptible=yes ran=10s
vm c node=node1 cpus=1 memory=300MiB resident=300MiB priority=1
";

#[test]
fn only_a_higher_priority_has_others_stopped_and_only_those_that_are_marked() {
    let mut s = scenario(FULL);
    assert_eq!(victims(&s, 200, 2), None, "not of equal priority");
    assert_eq!(
        victims(&s, 200, 3).as_deref(),
        Some("b on node1"),
        "it has run for less"
    );
    assert_eq!(victims(&s, 500, 3).as_deref(), Some("b a on node1"));
    assert_eq!(victims(&s, 900, 9), None, "c is not marked");
    s.snapshot.vms[2].preemptible = true;
    assert_eq!(victims(&s, 200, 2).as_deref(), Some("c on node1"));
    s.policy.preempt = false;
    assert_eq!(victims(&s, 200, 3), None);
}

#[test]
fn nobody_is_stopped_who_could_not_give_room_at_once() {
    for (change, why) in [
        ("cannot_move=starting", "it starts"),
        ("cannot_move=stopping", "it ends as it is"),
        ("cannot_move=in-doubt", "it may run elsewhere"),
        ("cannot_move=settling", "its memory is elsewhere"),
        ("cannot_move=not-running", "it is not there"),
        ("to=node2", "it leaves"),
        ("gives_way_to=other", "it does so for another"),
    ] {
        let s = scenario(&format!(
            "node node1 cpus=4 memory=1GiB available=24MiB
             node node2 cpus=4 memory=512MiB state=cordoned
             vm a node=node1 cpus=1 memory=1GiB resident=1000MiB priority=0 preemptible=yes {change}"
        ));
        assert_eq!(victims(&s, 512, 9), None, "{why}");
    }
    for change in ["suspended=yes", "cannot_move=locked", "cannot_move=pinned", ""] {
        let s = scenario(&format!(
            "node node1 cpus=4 memory=1GiB available=24MiB
             vm a node=node1 cpus=1 memory=1GiB resident=1000MiB priority=0 preemptible=yes {change}"
        ));
        assert_eq!(victims(&s, 512, 9).as_deref(), Some("a on node1"), "{change}");
    }
}

#[test]
fn a_node_where_more_than_room_is_missing_is_left_alone() {
    let body = |node: &str| {
        format!(
            "node node1 cpus=4 memory=1GiB available=24MiB {node}
             vm a node=node1 cpus=1 memory=1GiB resident=1000MiB priority=0 preemptible=yes labels=app=db"
        )
    };
    let ask = |node: &str, request: &LaunchRequest| {
        let s = scenario(&body(node));
        make_room(&s.snapshot, &s.policy, "new", request).map(|made| words(&made))
    };
    let plain = request(512, 9);
    assert_eq!(ask("", &plain).as_deref(), Some("a on node1"));
    for node in [
        "state=cordoned",
        "state=draining",
        "state=unreachable",
        "taints=gpu",
        "pressure_memory=50",
    ] {
        assert_eq!(ask(node, &plain), None, "{node}");
    }
    let with = |change: &dyn Fn(&mut LaunchRequest)| {
        let mut request = plain.clone();
        change(&mut request);
        ask("", &request)
    };
    assert_eq!(with(&|request| request.cpus = 8), None);
    assert_eq!(with(&|request| request.node = Some(NodeName::new("node2"))), None);
    let rules = |text: &str| {
        let rules = shoal_plan::Rules {
            affinity: vec![text.parse().expect("a term")],
            ..Default::default()
        };
        Some(std::sync::Arc::new(rules))
    };
    assert_eq!(
        with(&|request| request.rules = rules("app=db")),
        None,
        "it asks to be with the one that would be stopped"
    );
}

#[test]
fn the_node_is_taken_where_the_least_is_lost() {
    let s = |nodes: [&str; 3]| {
        let mut body = String::new();
        for (index, vms) in nodes.iter().enumerate() {
            let node = format!("node{}", index + 1);
            body.push_str(&format!("node {node} cpus=8 memory=1GiB available=0\n"));
            for (number, fields) in vms.split(',').enumerate() {
                body.push_str(&format!(
                    "vm {node}{number} node={node} cpus=1 {fields} preemptible=yes\n"
                ));
            }
        }
        scenario(&body)
    };
    let all = "memory=1GiB resident=1GiB";
    let half = "memory=512MiB resident=512MiB";
    let named = |nodes: [String; 3], mib| victims(&s(nodes.each_ref().map(String::as_str)), mib, 9);
    let nodes = [
        format!("{all} priority=3 ran=1s"),
        format!("{half} priority=2 ran=900s,{half} priority=2 ran=900s"),
        format!("{half} priority=2 ran=5s,{half} priority=7 ran=1s"),
    ];
    assert_eq!(
        named(nodes.clone(), 800).as_deref(),
        Some("node20 node21 on node2"),
        "the lowest priority"
    );
    assert_eq!(
        named(nodes, 300).as_deref(),
        Some("node30 on node3"),
        "that ran for the least time"
    );
    let nodes = [
        format!("{half} priority=2 ran=1s,{half} priority=2 ran=1s"),
        format!("{all} priority=2 ran=500s"),
        format!("{half} priority=1 ran=1s,memory=512MiB resident=500MiB priority=2 ran=1s"),
    ];
    assert_eq!(
        named(nodes, 800).as_deref(),
        Some("node20 on node2"),
        "the fewest"
    );
}

#[test]
fn one_that_is_enough_goes_rather_than_several_and_the_needless_stay() {
    let s = scenario(
        "node node1 cpus=8 memory=2GiB available=548MiB
         vm small1 node=node1 cpus=1 memory=250MiB resident=250MiB priority=1 preemptible=yes ran=1s
         vm small2 node=node1 cpus=1 memory=250MiB resident=250MiB priority=1 preemptible=yes ran=2s
         vm large node=node1 cpus=1 memory=1000MiB resident=1000MiB priority=1 preemptible=yes ran=99s
         vm dear node=node1 cpus=1 memory=500MiB resident=1 priority=8 preemptible=yes",
    );
    assert_eq!(victims(&s, 700, 9).as_deref(), Some("large on node1"));
    assert_eq!(victims(&s, 280, 9).as_deref(), Some("small1 on node1"));
    let mut s = s;
    s.snapshot.vms[2].priority = 2;
    assert_eq!(
        victims(&s, 900, 9).as_deref(),
        Some("large on node1"),
        "small1 and small2 were in front and are not needed"
    );
}

#[test]
fn n_plus_one_is_kept_and_nobody_is_stopped_in_vain() {
    let body = |other: &str| {
        format!(
            "policy n_plus_one=on
             node node1 cpus=8 memory=1GiB available=24MiB
             node node2 cpus=8 memory=1GiB available=1GiB taints=gpu
             vm low node=node1 cpus=1 memory=1GiB resident=900MiB priority=1 preemptible=yes
             {other}"
        )
    };
    assert_eq!(
        victims(&scenario(&body("")), 800, 9).as_deref(),
        Some("low on node1")
    );
    // Without node1 the two would not fit on node2.
    let other = "vm other node=node2 cpus=1 memory=512MiB resident=200MiB";
    assert_eq!(victims(&scenario(&body(other)), 800, 9), None);
}

fn waiting(name: &str, mib: u64, priority: u32) -> Waiting {
    Waiting {
        id: VmId::new(name),
        name: name.to_owned(),
        request: request(mib, priority),
        since: Duration::ZERO,
    }
}

fn turns(s: &text::Scenario, queue: &[Waiting]) -> Vec<String> {
    let named = |(number, turn): (usize, Turn)| {
        let name = &queue[number].name;
        match turn {
            Turn::Start(placement) => format!("{name} on {}: {}", placement.node, placement.reason),
            Turn::Preempt(made) => format!("{name} for {}", words(&made)),
            Turn::Awaits { reason } => format!("{name} awaits: {reason}"),
            Turn::Refused(_) => format!("{name} waits"),
            Turn::Later => format!("{name} later"),
            Turn::Behind { name: other } => format!("{name} behind {other}"),
        }
    };
    take_turns(&s.snapshot, &s.policy, queue)
        .into_iter()
        .map(named)
        .collect()
}

#[test]
fn the_room_belongs_to_whom_it_was_made_for() {
    let s = scenario(FULL);
    let queue = [
        waiting("next", 100, 3),
        waiting("other", 100, 0),
        waiting("high", 200, 4),
    ];
    assert_eq!(
        turns(&s, &queue),
        ["high for b on node1", "next waits", "other waits"],
        "one node makes room for one at a time"
    );
    // b ends; a third VM has no share in what it leaves.
    let held = "held high on=node1 quiet=3s cpus=1 memory=200MiB priority=4\n";
    let ending = FULL.replace("ran=10s", "ran=10s cannot_move=stopping gives_way_to=high");
    let s = scenario(&format!("{ending}{held}"));
    assert_eq!(
        turns(&s, &queue),
        [
            "high awaits: room is being made on node1: 'b' (priority 2) stops",
            "next waits",
            "other waits"
        ]
    );
    assert!(place_launch(&s.snapshot, &s.policy, &request(100, 5)).is_err());
    assert_eq!(victims(&s, 100, 9), None, "a node makes room for one at a time");

    // b has ended.
    let ended: String = ending
        .lines()
        .filter(|line| !line.starts_with("vm b"))
        .map(|line| format!("{line}\n"))
        .collect();
    let ended = ended.replace("available=124MiB", "available=424MiB");
    let s = scenario(&format!("{ended}{held}"));
    assert_eq!(
        turns(&s, &queue),
        [
            "high on node1: room was made for it: load 0.00 to 1.00 on 4 CPUs, memory 600 MiB to 800 MiB of 1 GiB",
            "next on node1: lowest cost of the nodes that fit: load 1.00 to 2.00 on 4 CPUs, memory 800 MiB to 900 MiB of 1 GiB",
            "other waits"
        ]
    );
    let error = place_launch(&s.snapshot, &s.policy, &request(200, 5)).expect_err("200 of 321 MiB are kept");
    assert!(matches!(error, PlaceError::NothingFits { .. }));
    assert!(place_launch(&s.snapshot, &s.policy, &request(100, 5)).is_ok());

    // What is not taken in time is for all.
    let s = scenario(&format!("{ended}{}", held.replace("3s", "10s")));
    assert!(place_launch(&s.snapshot, &s.policy, &request(200, 5)).is_ok());
}

#[test]
fn one_that_waits_for_its_room_starts_elsewhere_if_that_comes_first() {
    let ending = FULL.replace("ran=10s", "ran=10s cannot_move=stopping gives_way_to=high");
    let held = "held high on=node1 quiet=3s cpus=1 memory=200MiB\n";
    let s = scenario(&format!("{ending}{held}node node2 cpus=2 memory=1GiB\n"));
    let turns = turns(&s, &[waiting("high", 200, 4)]);
    assert!(turns[0].starts_with("high on node2:"), "{turns:?}");
    // Nothing is waited for on a node that is silent.
    let silent = ending.replace("available=124MiB", "available=124MiB state=unreachable");
    let s = scenario(&format!("{silent}{held}"));
    assert_eq!(self::turns(&s, &[waiting("high", 200, 4)]), ["high waits"]);
}

#[test]
fn nobody_who_waits_long_keeps_a_higher_priority_from_making_its_own_room() {
    let mut s = scenario(FULL);
    let mut queue = [
        waiting("long", 1000, 3),
        waiting("high", 200, 4),
        waiting("equal", 200, 3),
    ];
    queue[0].since = Duration::from_secs(300);
    let user = |name: &str| format!("user={name}").parse().expect("a label");
    for (vm, name) in queue.iter_mut().zip(["a", "b", "c"]) {
        vm.request.labels = user(name);
    }
    assert_eq!(
        turns(&s, &queue),
        ["long waits", "high for b on node1", "equal behind long"]
    );
    // Free room is for the one that has waited.
    s.snapshot.vms.remove(2);
    settle(&mut s.snapshot);
    assert_eq!(
        turns(&s, &queue),
        ["long waits", "high behind long", "equal behind long"]
    );
}

fn without(snapshot: &ClusterSnapshot, victims: &[VmId]) -> ClusterSnapshot {
    let mut after = snapshot.clone();
    after.vms.retain(|vm| !victims.contains(&vm.id));
    settle(&mut after);
    after
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn whoever_is_stopped_may_be_and_had_to_be(
        mut snapshot in clusters(),
        mib in 16u64..1500,
        priority in 0u32..10,
        n_plus_one in any::<bool>(),
        overcommit_percent in 100u64..300,
        slack in prop::option::weighted(0.8, 0u64..512),
        (queued, exclusive) in (any::<bool>(), prop::bool::weighted(0.2)),
    ) {
        finish(&mut snapshot);
        // Mostly clusters that are nearly full.
        for node in snapshot.nodes.iter_mut().filter(|_| slack.is_some()) {
            let here = snapshot.vms.iter().filter(|vm| vm.node == node.name);
            let declared: u64 = here.clone().map(|vm| vm.declared.0).sum();
            let resident: u64 = here.map(|vm| vm.resident.unwrap_or(vm.declared).0).sum();
            let full = (declared * 100 / overcommit_percent).max(resident * 10 / 9);
            node.memory = Bytes(full + Bytes::mib(slack.unwrap_or(0)).0);
            node.reserved_memory = Bytes(0);
        }
        settle(&mut snapshot);
        let overcommit = overcommit_percent as f64 / 100.0;
        let policy = Policy { n_plus_one, overcommit, ..Policy::default() };
        let rules = exclusive.then(|| Arc::new(Rules { exclusive, ..Rules::default() }));
        let request = LaunchRequest { queued, rules, ..request(mib, priority) };
        let made = make_room(&snapshot, &policy, "new", &request);
        let mut turned = snapshot.clone();
        turned.vms.reverse();
        turned.nodes.reverse();
        prop_assert_eq!(&make_room(&turned, &policy, "new", &request), &made);
        let fits = place_launch(&snapshot, &policy, &request);
        let Some(made) = made else {
            // Without any of those that may be stopped it fits on no node that lacks room only.
            let may = |vm: &&shoal_plan::VmView| {
                vm.preemptible && vm.priority < priority
                    && vm.cannot_move.is_none_or(CannotMove::is_wished)
            };
            for node in snapshot.nodes.iter().filter(|_| fits.is_err() && !n_plus_one) {
                let here = snapshot.vms.iter().filter(|vm| vm.node == node.name);
                let gone: Vec<VmId> = here.filter(may).map(|vm| vm.id.clone()).collect();
                let asked = LaunchRequest { node: Some(node.name.clone()), ..request.clone() };
                prop_assert!(gone.len() > 32 || place_launch(&without(&snapshot, &gone), &policy, &asked).is_err()
                    || may_refuse(&snapshot, &gone), "{}", node.name);
            }
            return Ok(());
        };
        prop_assert!(fits.is_err(), "it fits as it is");
        prop_assert!(!made.victims.is_empty() && !made.reason.is_empty());
        let on = snapshot.nodes.iter().find(|node| node.name == made.node).expect("a node");
        prop_assert_eq!(on.state, NodeState::Ready);
        for victim in &made.victims {
            let vm = snapshot.vms.iter().find(|vm| vm.id == *victim).expect("a VM");
            prop_assert!(vm.preemptible && vm.priority < priority && vm.node == made.node);
            prop_assert!(vm.in_flight.is_none());
            prop_assert!(vm.cannot_move.is_none_or(CannotMove::is_wished));
        }
        let asked = LaunchRequest { node: Some(made.node.clone()), ..request };
        prop_assert!(place_launch(&without(&snapshot, &made.victims), &policy, &asked).is_ok());
        for spared in &made.victims {
            let others: Vec<VmId> = made.victims.iter().filter(|vm| *vm != spared).cloned().collect();
            let fits = place_launch(&without(&snapshot, &others), &policy, &asked);
            prop_assert!(fits.is_err(), "{spared} is stopped in vain");
        }
    }

    #[test]
    fn held_room_comes_back_from_text_and_takes_nothing_twice(
        snapshot in clusters(), on in 0usize..9, mib in 1u64..4096, quiet in 0u64..20, priority in 0u32..10,
        queued in any::<bool>(),
    ) {
        let node = &snapshot.nodes[on % snapshot.nodes.len()];
        let held = shoal_plan::Held {
            vm: VmId::new("waits"),
            node: node.name.clone(),
            request: LaunchRequest { queued, ..request(mib, priority) },
            quiet: Duration::from_secs(quiet),
        };
        let mut snapshot = ClusterSnapshot { held: vec![held], ..snapshot.clone() };
        for vm in snapshot.vms.iter_mut().step_by(3) {
            vm.gives_way_to = Some(VmId::new("waits"));
        }
        let policy = Policy::default();
        let read = text::parse(&text::print(&snapshot, &policy)).expect("what was written");
        prop_assert_eq!(&read.snapshot, &snapshot);
        let plan = round(&snapshot, &policy);
        prop_assert_eq!(&plan, &round(&read.snapshot, &policy));
        // Whatever others are given, there is room left for it once those that give way have ended.
        let gone: Vec<VmId> = snapshot
            .vms
            .iter()
            .filter(|vm| vm.gives_way_to.is_some())
            .map(|vm| vm.id.clone())
            .collect();
        let asked = LaunchRequest { node: Some(snapshot.held[0].node.clone()), ..snapshot.held[0].request.clone() };
        let ends = |snapshot: &ClusterSnapshot| {
            let mut after = without(snapshot, &gone);
            after.held.clear();
            place_launch(&after, &policy, &asked).is_ok()
        };
        if ends(&snapshot) && quiet < 10 {
            let other = LaunchRequest { queued, ..request(200, 9) };
            if let Ok(placed) = place_launch(&snapshot, &policy, &other) {
                let mut with = snapshot.clone();
                with.vms.push(shoal_plan::VmView::new("other", placed.node.as_str(), 1, other.memory));
                settle(&mut with);
                prop_assert!(ends(&with), "{} took it", placed.reason);
            }
        }
    }
}

/// Rules tie some of these VMs to others: whether the new one fits then is another question.
fn may_refuse(snapshot: &ClusterSnapshot, gone: &[VmId]) -> bool {
    snapshot
        .vms
        .iter()
        .any(|vm| gone.contains(&vm.id) && vm.rules.is_some())
}
