//! CPUs as a limit of admission: the overcommit, slots of the queue, nodes that one VM has for itself, and what fits nowhere ever.

use std::time::Duration;

use shoal_plan::{
    Bytes, LaunchRequest, Mode, NodeName, Turn, VmId, Waiting, explain, make_room, place_launch,
    place_launches, place_migration, round, take_turns, text,
};

fn scenario(body: &str) -> text::Scenario {
    text::parse(&format!("shoal-cluster 1\n{body}")).expect("a scenario")
}

/// Where each of a scenario's launches goes, or why not.
fn placed(body: &str) -> Vec<String> {
    let s = scenario(body);
    let requests: Vec<LaunchRequest> = s.launches.iter().map(|(_, request)| request.clone()).collect();
    place_launches(&s.snapshot, &s.policy, &requests)
        .into_iter()
        .map(|placed| match placed {
            Ok(placement) => placement.node.to_string(),
            Err(error) => error.to_string(),
        })
        .collect()
}

#[test]
fn declared_vcpus_end_at_the_overcommit() {
    let placed = placed(
        "policy cpu_overcommit=2
         node node1 cpus=2 memory=8GiB reserved_cpus=0.5
         vm a node=node1 cpus=1 memory=256MiB resident=64MiB
         launch b cpus=2 memory=256MiB
         launch c cpus=1 memory=256MiB",
    );
    assert_eq!(placed[0], "node1");
    assert_eq!(
        placed[1],
        "nothing fits: node1: 3 vCPUs declared there and 1 more would pass its limit of 3 vCPUs"
    );
}

#[test]
fn the_queue_has_as_many_slots_as_there_are_cpus() {
    let queued = |body: &str| placed(&format!("{body}\nlaunch a cpus=1 memory=64MiB queued=yes"))[0].clone();
    let node = "node node1 cpus=2 memory=8GiB";
    assert_eq!(queued(node), "node1");
    let idle = "vm x node=node1 cpus=1 memory=64MiB resident=32MiB";
    assert_eq!(queued(&format!("{node}\n{idle}")), "node1");
    assert_eq!(
        queued(&format!("{node}\n{idle}\n{}", idle.replace("vm x", "vm y"))),
        "nothing fits: node1: 2 vCPUs declared there, load 0.00, and 1 vCPUs more would pass its 2 slots for the queue",
        "idle or not"
    );
    // What VMs use counts as declared by them; other work counts once it takes more than half a CPU.
    let busy = idle.replace("resident=32MiB", "resident=32MiB cpu=1");
    for (other, fits) in [("0", true), ("0.4", true), ("0.6", false)] {
        let placed = queued(&format!("{node} other={other}\n{busy}"));
        assert_eq!(placed == "node1", fits, "{other}: {placed}");
    }
    let twice = format!(
        "policy queue_slots=2\n{node}\n{idle}\n{}",
        idle.replace("vm x", "vm y")
    );
    assert_eq!(queued(&twice), "node1");
}

#[test]
fn those_that_wait_get_one_slot_each() {
    let s = scenario("node node1 cpus=2 memory=8GiB\nnode node2 cpus=1 memory=8GiB");
    let waiting = |number: usize| Waiting {
        id: VmId::new(&format!("vm{number}")),
        name: format!("vm{number}"),
        request: LaunchRequest {
            cpus: 1,
            memory: Bytes::mib(64),
            queued: true,
            ..LaunchRequest::default()
        },
        since: Duration::ZERO,
    };
    let all: Vec<Waiting> = (0..30).map(waiting).collect();
    let turns = take_turns(&s.snapshot, &s.policy, &all);
    let started: Vec<(usize, &str)> = turns
        .iter()
        .filter_map(|(number, turn)| match turn {
            Turn::Start(placement) => Some((*number, placement.node.as_str())),
            _ => None,
        })
        .collect();
    let mut nodes: Vec<&str> = started.iter().map(|(_, node)| *node).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["node1", "node1", "node2"]);
    assert!(started.iter().all(|(number, _)| *number < 3), "{started:?}");
}

#[test]
fn one_that_has_waited_long_keeps_the_nodes_that_it_may_go_to() {
    let mut s = scenario(
        "node node1 cpus=2 memory=8GiB labels=zone=a
         node node2 cpus=2 memory=8GiB labels=zone=b
         vm x node=node1 cpus=1 memory=64MiB resident=32MiB
         launch long cpus=2 memory=64MiB queued=yes node=node1
         launch small cpus=1 memory=64MiB queued=yes selector=zone=a
         launch any cpus=1 memory=64MiB queued=yes",
    );
    let mut all: Vec<Waiting> = s
        .launches
        .iter()
        .map(|(name, request)| Waiting {
            id: VmId::new(name),
            name: name.clone(),
            request: request.clone(),
            since: Duration::ZERO,
        })
        .collect();
    let told = |s: &text::Scenario, all: &[Waiting]| -> Vec<String> {
        let turns = take_turns(&s.snapshot, &s.policy, all).into_iter();
        let words = turns.map(|(_, turn)| match turn {
            Turn::Start(placement) => placement.node.to_string(),
            Turn::Behind { name } => format!("behind {name}"),
            _ => "waits".to_owned(),
        });
        words.collect()
    };
    assert_eq!(told(&s, &all), ["waits", "node1", "node2"]);
    all[0].since = s.policy.queue_patience;
    assert_eq!(told(&s, &all), ["waits", "behind long", "node2"]);
    all[0].request.node = None;
    s.snapshot.vms[0].node = NodeName::new("node2");
    assert_eq!(told(&s, &all), ["node1", "waits", "node2"]);
    let mut y = s.snapshot.vms[0].clone();
    (y.id, y.node) = (VmId::new("y"), NodeName::new("node1"));
    s.snapshot.vms.push(y);
    assert_eq!(told(&s, &all), ["waits", "behind long", "behind long"]);
}

/// A hot node beside one that has declared all that it may.
const HOT: &str = "node node1 cpus=2 memory=8GiB
    node node2 cpus=2 memory=8GiB
    vm a node=node1 cpus=2 memory=64MiB resident=32MiB cpu=2
    vm b node=node1 cpus=2 memory=64MiB resident=32MiB cpu=2
    vm c node=node2 cpus=1 memory=64MiB resident=32MiB
    vm d node=node2 cpus=1 memory=64MiB resident=32MiB";

#[test]
fn balance_keeps_to_the_overcommit_and_users_do_not() {
    let mut s = scenario(HOT);
    assert_eq!(round(&s.snapshot, &s.policy).actions.len(), 1);
    s.policy.cpu_overcommit = 1.5;
    for mode in [Mode::Spread, Mode::Pack] {
        s.policy.mode = mode;
        let plan = round(&s.snapshot, &s.policy);
        assert!(plan.actions.is_empty(), "{plan:?}");
    }
    let why = explain(&s.snapshot, &s.policy, &VmId::new("a")).expect("there");
    let rejected = why.nodes[0].rejected.as_ref().expect("node2 has declared enough");
    assert_eq!(
        rejected.to_string(),
        "2 vCPUs declared there and 2 more would pass its limit of 3 vCPUs"
    );
    let node2 = NodeName::new("node2");
    let moved = place_migration(&s.snapshot, &s.policy, &VmId::new("a"), Some(&node2));
    assert_eq!(moved.expect("a user may").node, node2);
    // So do draining and rules.
    let drained = HOT.replace(
        "node1 cpus=2 memory=8GiB",
        "node1 cpus=2 memory=8GiB state=draining",
    );
    let drained = scenario(&format!("policy cpu_overcommit=1.5\n{drained}"));
    assert!(!round(&drained.snapshot, &drained.policy).actions.is_empty());
}

const APART: &str = "node node1 cpus=4 memory=4GiB
    node node2 cpus=4 memory=4GiB
    vm alone node=node1 cpus=1 memory=64MiB resident=32MiB exclusive=yes
    vm other node=node2 cpus=1 memory=64MiB resident=32MiB";

#[test]
fn a_node_is_one_vms_own_in_both_directions() {
    let mut lines = placed(&format!(
        "{APART}
         launch a cpus=1 memory=64MiB
         launch b cpus=1 memory=64MiB exclusive=yes
         launch c cpus=1 memory=64MiB node=node1"
    ));
    assert_eq!(lines.remove(0), "node2");
    assert_eq!(
        lines.remove(0),
        "nothing fits: node1: 1 VMs are there, and the VM is to have a node for itself; \
         node2: 2 VMs are there, and the VM is to have a node for itself"
    );
    assert!(
        lines[0].starts_with("nothing fits: node1: 'alone' has it for itself"),
        "{lines:?}"
    );
    // One that is only to start has it already.
    let started = placed(
        "node node1 cpus=4 memory=4GiB
         launch a cpus=1 memory=64MiB exclusive=yes
         launch b cpus=1 memory=64MiB",
    );
    assert_eq!(started[0], "node1");
    assert_eq!(
        started[1],
        "nothing fits: node1: a VM that is to start there has it for itself"
    );
    let s = scenario(APART);
    for (vm, to) in [("alone", "node2"), ("other", "node1")] {
        let to = NodeName::new(to);
        assert!(
            place_migration(&s.snapshot, &s.policy, &VmId::new(vm), Some(&to)).is_err(),
            "{vm}"
        );
    }
}

#[test]
fn a_vm_that_is_not_alone_goes_where_it_is() {
    let s = scenario(&format!(
        "{}\nnode node3 cpus=4 memory=4GiB",
        APART.replace("node=node2", "node=node1")
    ));
    let plan = round(&s.snapshot, &s.policy);
    let moves: Vec<String> = plan
        .actions
        .iter()
        .map(|a| format!("{} {} {}", a.kind, a.vm, a.to))
        .collect();
    assert_eq!(moves, ["rules alone node2"]);
    assert!(plan.actions[0].reason.contains("1 VMs are there"), "{plan:?}");
}

#[test]
fn room_is_made_of_slots_and_of_whole_nodes() {
    let body = |rules: &str| {
        format!(
            "node node1 cpus=2 memory=4GiB
             vm a node=node1 cpus=1 memory=64MiB resident=32MiB cpu=1 priority=1 preemptible=yes ran=5s {rules}
             vm b node=node1 cpus=1 memory=64MiB resident=32MiB cpu=1 priority=1 preemptible=yes ran=9s"
        )
    };
    let made = |body: &str, request: &LaunchRequest| {
        let s = scenario(body);
        let made = make_room(&s.snapshot, &s.policy, "new", request);
        made.map(|made| {
            made.victims
                .iter()
                .map(VmId::to_string)
                .collect::<Vec<_>>()
                .join(" ")
        })
    };
    let request = |text: &str| {
        scenario(&format!("launch new cpus=1 memory=64MiB {text}")).launches[0]
            .1
            .clone()
    };
    let shared = body("");
    assert_eq!(
        made(&shared, &request("queued=yes priority=2")).as_deref(),
        Some("a")
    );
    assert_eq!(made(&shared, &request("queued=yes priority=1")), None);
    assert_eq!(
        made(&shared, &request("exclusive=yes priority=2")).as_deref(),
        Some("a b")
    );
    let owned: String = body("exclusive=yes")
        .lines()
        .take(2)
        .map(|line| format!("{line}\n"))
        .collect();
    assert_eq!(made(&owned, &request("priority=2")).as_deref(), Some("a"));
    // What is made is kept: the slot of `a` is taken as long as `held` waits for it.
    let ending = shared.replace("ran=5s", "ran=5s cannot_move=stopping gives_way_to=held");
    let held = format!("{ending}\nheld held on=node1 cpus=1 memory=64MiB queued=yes priority=2");
    let s = scenario(&held);
    assert!(place_launch(&s.snapshot, &s.policy, &request("queued=yes")).is_err());
    assert_eq!(made(&held, &request("queued=yes priority=9")), None);
}

#[test]
fn the_preferred_node_is_taken_if_it_fits_there() {
    let body = "node node1 cpus=4 memory=4GiB
        node node2 cpus=4 memory=1GiB
        launch small cpus=1 memory=512MiB prefer=node2
        launch large cpus=1 memory=2GiB prefer=node2
        launch gone cpus=1 memory=64MiB prefer=node9";
    assert_eq!(placed(body), ["node2", "node1", "node1"]);
    let s = scenario(body);
    let large = place_launch(&s.snapshot, &s.policy, &s.launches[1].1).expect("node1 has room");
    assert!(
        large
            .reason
            .starts_with("node2 was preferred, and there 0 bytes declared there and 2 GiB more would pass"),
        "{}",
        large.reason
    );
}

#[test]
fn what_no_node_can_ever_take_is_known_at_once() {
    let nodes = "node node1 cpus=2 memory=1GiB state=unreachable
        node node2 cpus=4 memory=2GiB reserved_memory=512MiB reserved_cpus=1 taints=gpu
        vm x node=node2 cpus=4 memory=2GiB resident=1GiB";
    for (launch, ever) in [
        ("cpus=4 memory=64MiB", true),
        ("cpus=5 memory=64MiB", false),
        ("cpus=4 memory=64MiB queued=yes", true),
        ("cpus=3 memory=64MiB node=node1", false),
        ("cpus=1 memory=2600MiB", true),
        ("cpus=1 memory=3GiB", false),
        ("cpus=1 memory=64MiB exclusive=yes selector=zone=a", true),
    ] {
        let s = scenario(&format!("{nodes}\nlaunch new {launch}"));
        let error = place_launch(&s.snapshot, &s.policy, &s.launches[0].1).expect_err("nothing is free");
        assert_eq!(error.is_final(), !ever, "{launch}: {error}");
        let told = error
            .to_string()
            .starts_with("nothing fits, even if every node were empty and took ");
        assert_eq!(told, !ever, "{launch}: {error}");
    }
    let half = scenario(&format!(
        "policy queue_slots=0.5\n{nodes}\nlaunch new cpus=3 memory=64MiB queued=yes"
    ));
    let error = place_launch(&half.snapshot, &half.policy, &half.launches[0].1).expect_err("two slots");
    assert!(
        error.to_string().starts_with(
            "nothing fits, even if every node were empty and took 2 vCPUs and 2764 MiB: node1: it is unreachable"
        ),
        "{error}"
    );
}
