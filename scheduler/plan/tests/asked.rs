//! What is planned or told because someone asks: expel, bring, the queue, explanations.

use std::time::Duration;

use shoal_plan::{
    Bytes, LaunchRequest, NodeName, Turn, VmId, Waiting, bring, expel, explain, take_turns, text,
};

fn scenario(body: &str) -> text::Scenario {
    text::parse(&format!("shoal-cluster 1\n{body}")).expect("a scenario")
}

fn lines(plan: &shoal_plan::Plan) -> Vec<String> {
    let printed = text::print_plan(plan);
    printed.lines().skip(1).map(str::to_owned).collect()
}

const AWAY: &str = "
node node1 cpus=4 memory=4GiB available=2GiB
node node2 cpus=4 memory=4GiB available=3GiB
node node3 cpus=4 memory=4GiB available=4GiB
vm guest node=node1 cpus=1 memory=1GiB resident=512MiB home=node2
vm locked node=node1 cpus=1 memory=512MiB resident=512MiB cannot_move=locked
vm own node=node1 cpus=1 memory=1GiB resident=1GiB home=node1
vm abroad node=node2 cpus=1 memory=1GiB resident=1GiB home=node1
";

#[test]
fn a_node_expels_all_that_may_leave_and_goes_on_to_take_vms() {
    let s = scenario(AWAY);
    let plan = lines(&expel(&s.snapshot, &s.policy, &NodeName::new("node1")));
    assert_eq!(plan.len(), 3, "{plan:?}");
    assert!(
        plan[0].starts_with("expel guest from node1 to node3: node1 expels its VMs;"),
        "{plan:?}"
    );
    assert!(plan[1].starts_with("expel own from node1 to node3: "), "{plan:?}");
    assert!(plan[2].starts_with("drain-stuck locked on node1:"), "{plan:?}");
    assert!(
        expel(&s.snapshot, &s.policy, &NodeName::new("none"))
            .actions
            .is_empty()
    );
}

#[test]
fn a_node_brings_back_what_was_started_there() {
    let s = scenario(AWAY);
    let plan = lines(&bring(&s.snapshot, &s.policy, &NodeName::new("node1")));
    assert_eq!(plan.len(), 1, "{plan:?}");
    assert!(
        plan[0].starts_with("bring abroad from node2 to node1: its home is node1;"),
        "{plan:?}"
    );
    let full = scenario(&AWAY.replace("memory=4GiB available=2GiB", "memory=2200MiB available=152MiB"));
    let plan = lines(&bring(&full.snapshot, &full.policy, &NodeName::new("node1")));
    assert!(
        plan[0].starts_with("drain-stuck abroad on node2: 'abroad' stays on node2: nothing fits"),
        "{plan:?}"
    );
}

fn waiting(name: &str, user: &str, gib: u64, priority: u32, seconds: u64) -> Waiting {
    Waiting {
        id: VmId::new(name),
        name: name.to_owned(),
        request: LaunchRequest {
            cpus: 1,
            memory: Bytes::gib(gib),
            labels: format!("user={user}").parse().expect("a label"),
            priority,
            ..LaunchRequest::default()
        },
        since: Duration::from_secs(seconds),
    }
}

fn turns(s: &text::Scenario, queue: &[Waiting]) -> Vec<String> {
    let turns = take_turns(&s.snapshot, &s.policy, queue);
    let name = |number: usize| queue[number].name.clone();
    turns
        .into_iter()
        .map(|(number, turn)| match turn {
            Turn::Start(placement) => format!("{} on {}", name(number), placement.node),
            Turn::Preempt(preemption) => {
                let victims: Vec<&str> = preemption.victims.iter().map(VmId::as_str).collect();
                format!(
                    "{} in place of {} on {}",
                    name(number),
                    victims.join(" "),
                    preemption.node
                )
            }
            Turn::Awaits { reason } => format!("{} awaits: {reason}", name(number)),
            Turn::Refused(_) => format!("{} waits", name(number)),
            Turn::Later => format!("{} later", name(number)),
            Turn::Behind { name: other } => format!("{} behind {other}", name(number)),
        })
        .collect()
}

#[test]
fn users_take_turns_by_their_weights_and_what_they_run() {
    let mut s = scenario(
        "policy overcommit=1
         node node1 cpus=8 memory=10GiB
         vm old node=node1 cpus=1 memory=1MiB resident=1MiB labels=user=ada",
    );
    let queue = [
        waiting("a1", "ada", 1, 5, 0),
        waiting("a2", "ada", 1, 9, 0),
        waiting("b1", "bob", 1, 5, 0),
        waiting("b2", "bob", 1, 5, 0),
        waiting("b3", "bob", 1, 5, 0),
    ];
    let all = |names: [&str; 5]| names.map(|name| format!("{name} on node1")).to_vec();
    assert_eq!(turns(&s, &queue), all(["b1", "a2", "b2", "a1", "b3"]));
    s.policy.shares = "ada=4".parse().expect("labels");
    assert_eq!(turns(&s, &queue), all(["a2", "a1", "b1", "b2", "b3"]));
}

#[test]
fn a_later_one_may_pass_until_patience_ends() {
    let s = scenario(
        "policy overcommit=1 queue_patience=60s
         node node1 cpus=8 memory=4GiB",
    );
    let queue = |seconds| {
        [
            waiting("large", "a", 8, 5, seconds),
            waiting("small", "a", 1, 5, 0),
        ]
    };
    assert_eq!(turns(&s, &queue(59)), ["large waits", "small on node1"]);
    assert_eq!(turns(&s, &queue(60)), ["large waits", "small behind large"]);
}

#[test]
fn a_long_queue_is_looked_at_in_part() {
    let s = scenario("policy overcommit=1\nnode node1 cpus=8 memory=4GiB");
    let queue: Vec<Waiting> = (0..201)
        .map(|n| waiting(&format!("vm{n}"), "a", 8, 5, 0))
        .collect();
    let turns = turns(&s, &queue);
    assert_eq!(
        (turns[199].as_str(), turns[200].as_str()),
        ("vm199 waits", "vm200 later")
    );
}

#[test]
fn an_explanation_has_the_numbers_and_the_verdict() {
    let s = scenario(
        "node node1 cpus=4 memory=8GiB available=6GiB
         node node2 cpus=4 memory=8GiB available=8GiB other=0.1
         node node3 cpus=1 memory=8GiB
         vm a node=node1 cpus=2 memory=1GiB resident=1GiB cpu=0.6
         vm b node=node1 cpus=1 memory=1GiB resident=1GiB cpu=0.6 cannot_move=locked",
    );
    let why = explain(&s.snapshot, &s.policy, &VmId::new("a")).expect("known");
    assert_eq!((why.node.as_str(), why.memory), ("node1", Bytes::gib(1)));
    assert_eq!(why.nodes[0].node.as_str(), "node2");
    assert!(why.nodes[0].rejected.is_none());
    assert_eq!((why.slowdown, why.nodes[0].slowdown), ((1.0, 1.0), (1.0, 1.0)));
    assert_eq!(
        (why.memory_part, why.nodes[0].memory_part),
        ((0.25, 0.125), (0.0, 0.125))
    );
    let rejected = why.nodes[1].rejected.as_ref().expect("too few CPUs").to_string();
    assert_eq!(rejected, "it has 1 CPUs, the VM asks for 2");
    assert_eq!(why.verdict, "stays: node1 has CPUs and memory enough");
    let verdict = |s: &text::Scenario, vm: &str| {
        explain(&s.snapshot, &s.policy, &VmId::new(vm))
            .expect("known")
            .verdict
    };
    assert_eq!(verdict(&s, "b"), "stays: it is locked to its node");
    assert!(explain(&s.snapshot, &s.policy, &VmId::new("c")).is_none());
    let mut calm = s.clone();
    calm.policy.aggressiveness = 1;
    assert_eq!(
        verdict(&calm, "a"),
        "stays: aggressiveness 1 moves nothing for balance"
    );
    let busy = scenario(
        "node node1 cpus=2 memory=8GiB available=6GiB other=2
         node node2 cpus=2 memory=8GiB
         vm a node=node1 cpus=1 memory=1GiB resident=1GiB cpu=1
         vm b node=node1 cpus=1 memory=1GiB resident=1GiB cpu=1 dirty=120MiB",
    );
    assert_eq!(
        verdict(&busy, "a"),
        "moves to node2 (rebalance): slowdown on node1 2.0 to 1.5, on node2 1.0; takes 9.1 s, pause 5 ms"
    );
    let mut unsure = busy.clone();
    unsure.snapshot.nodes[0].other.error = 1.5;
    assert!(verdict(&unsure, "a").contains("than the move costs and the figures may be off"));
    assert!(verdict(&busy, "b").starts_with("stays: it dirties 120 MiB/s, too much for a link"));
    // What is explained is what is done, for every VM.
    for vm in &busy.snapshot.vms {
        let plan = shoal_plan::round(&busy.snapshot, &busy.policy);
        let moves = plan.actions.iter().any(|action| action.vm == vm.id);
        assert_eq!(verdict(&busy, vm.id.as_str()).starts_with("moves"), moves);
    }
}
