//! What must hold after every event, whatever a policy does.

use std::collections::HashMap;

use shoal_plan::{Hold, LaunchRequest, NodeName, Preemption, Turn, Waiting};

use super::*;
use crate::policy::{Move, Observation, Orders};
use crate::random::Random;
use crate::text::parse;

/// Moves anything anywhere, and things that are not there to nodes that are not.
#[derive(Debug)]
struct Chaos(Random);

impl Balancer for Chaos {
    fn place(&mut self, seen: &Observation<'_>, _: &LaunchRequest) -> Option<NodeName> {
        let nodes = &seen.snapshot.nodes;
        // One in eight has no place for now.
        nodes
            .get(self.0.below(nodes.len() * 8 / 7 + 1))
            .map(|node| node.name.clone())
    }

    fn round(&mut self, seen: &Observation<'_>) -> Orders {
        let (nodes, vms) = (&seen.snapshot.nodes, &seen.snapshot.vms);
        let mut moves = vec![Move::new(
            shoal_plan::VmId::new("nobody"),
            NodeName::new("nowhere"),
        )];
        let mut orders = Orders::default();
        for _ in 0..self.0.below(6) {
            if let (Some(vm), Some(to)) = (
                vms.get(self.0.below(vms.len())),
                nodes.get(self.0.below(nodes.len())),
            ) {
                moves.push(Move::new(vm.id.clone(), to.name.clone()));
                let hold = Hold {
                    vm: vm.id.clone(),
                    node: vm.node.clone(),
                    growth: vm.growth,
                    reason: String::new(),
                };
                match self.0.below(3) {
                    0 => orders.suspend.push(hold),
                    _ => orders.resume.push(hold),
                }
            }
        }
        Orders { moves, ..orders }
    }

    /// Anyone may be stopped for anyone.
    fn turns(&mut self, seen: &Observation<'_>, waiting: &[Waiting]) -> Option<Vec<(usize, Turn)>> {
        let victim = seen
            .snapshot
            .vms
            .get(self.0.below(seen.snapshot.vms.len() * 20))?;
        let room = Preemption {
            node: victim.node.clone(),
            victims: vec![victim.id.clone()],
            reason: String::new(),
        };
        Some(vec![(self.0.below(waiting.len()), Turn::Preempt(room))])
    }
}

fn tight() -> Scenario {
    let text = "shoal-simulation 1\nsimulation duration=400s\npolicy max_out_per_node=3 max_in_per_node=3\n\
                nodes n count=4 cpus=2 memory=2GiB\nmemory restart=5s\n\
                workload leak vms=10 memory=1GiB resident=0.3 leak=4MiB part=0.6\n\
                workload heavy-tail vms=30 memory=256MiB work=20s window=200s\n\
                workload herd vms=6 memory=128MiB period=60s window=20s dirty=500MB";
    // The size has no unit of its own.
    parse(&text.replace("500MB", "500000000"), "tight", &|_| {
        Err("no files".to_owned())
    })
    .expect("a good text")
}

/// What has arrived of a VM that grows is brought up to date by reports.
fn check(engine: &Engine<'_>, live: &Live, reported: bool) {
    let mut places: HashMap<usize, usize> = HashMap::new();
    for (number, node) in engine.nodes.iter().enumerate() {
        for &vm in &node.vms {
            assert_eq!(
                places.insert(vm, number),
                None,
                "VM {vm} is on two nodes at {}",
                engine.now
            );
            assert_eq!(engine.vms[vm].life, Life::On(number));
        }
        let vms = node.vms.iter().map(|&vm| engine.vms[vm].resident);
        let held = node.tenant.memory + vms.sum::<f64>();
        if node.until.to_bits() == engine.now.to_bits() && (reported || node.incoming.is_empty()) {
            let used = held + engine.arrived(number);
            assert!((node.used - used).abs() < 1.0, "{} is not {used}", node.used);
        }
        let given: f64 = node.vms.iter().map(|&vm| engine.vms[vm].given).sum();
        assert!(
            given <= node.spec.capacity() * (1.0 + 1e-9),
            "more work than there are CPUs"
        );
        let policy = &engine.scenario.policy;
        assert!(
            node.outgoing.len() <= policy.max_out_per_node && node.incoming.len() <= policy.max_in_per_node
        );
    }
    for (number, vm) in engine.vms.iter().enumerate() {
        assert_eq!(matches!(vm.life, Life::On(_)), places.contains_key(&number));
        assert_eq!(vm.life == Life::Waiting, engine.waiting.contains(&number));
        assert!((0.0..=vm.spec.declared).contains(&vm.resident) || !matches!(vm.life, Life::On(_)));
        assert!(vm.given_total <= vm.wanted_total * (1.0 + 1e-9) + 1e-6);
        if let Some(migration) = vm.migration {
            let migration = engine.migrations[migration].as_ref().expect("it is under way");
            assert_eq!((migration.vm, Life::On(migration.from)), (number, vm.life));
        }
    }
    let moving = engine.vms.iter().filter(|vm| vm.migration.is_some()).count();
    assert_eq!(moving, engine.under_way.len());
    if reported {
        let seen = live.seen().vms.len();
        assert_eq!(seen, places.len(), "the snapshot shows what runs");
    }
}

#[test]
fn no_vm_is_lost_or_on_two_nodes_and_memory_is_accounted_for() {
    let scenario = tight();
    let mut counters = Counters::default();
    for seed in 0..20 {
        let specs = vm_specs(&scenario, seed);
        let mut engine = Engine::new(&scenario, &specs, seed);
        let mut live = Live::new(&engine, Box::new(Chaos(Random::new(seed))));
        while let Some(Reverse(entry)) = engine.queue.pop() {
            if entry.time > scenario.duration {
                break;
            }
            assert!(entry.time >= engine.now, "time goes on");
            engine.go_on(entry, &mut live);
            check(&engine, &live, entry.event == Event::Report);
        }
        assert_eq!(engine.vms.len(), specs.len());
        assert!(
            engine.vms.iter().all(|vm| vm.life != Life::Future),
            "all have arrived"
        );
        counters.oom += engine.counters.oom;
        counters.migrations += engine.counters.migrations;
        counters.failed += engine.counters.failed;
        counters.suspended += engine.counters.suspended;
        counters.preempted += engine.counters.preempted;
    }
    // The test has teeth only if all of this happened.
    assert!(
        counters.oom > 10.0
            && counters.migrations > 100.0
            && counters.failed > 10.0
            && counters.suspended > 100.0
            && counters.preempted > 10.0,
        "{counters:?}"
    );
}

#[test]
fn a_job_alone_takes_its_work_and_one_that_shares_twice_that() {
    let text = "shoal-simulation 1\nnoise off\nsimulation duration=1000s\nnodes n count=1 cpus=1 memory=8GiB\n\
                workload heavy-tail vms=1 memory=64MiB work=100s window=0s";
    let scenario = parse(text, "one", &|_| Err(String::new())).expect("good");
    let outcome = run(&scenario, PolicyKind::None, 3);
    assert!(
        (outcome.slowdown_mean - 1.0).abs() < 1e-9,
        "{}",
        outcome.slowdown_mean
    );
    assert_eq!((outcome.ended, outcome.left), (1.0, 0.0));
    // Two steady VMs that want a whole CPU each get half.
    let text = "shoal-simulation 1\nnoise off\nsimulation duration=100s\nnode n cpus=1 memory=8GiB\n\
                vm a node=n cpus=1 memory=1GiB resident=64MiB cpu=1\nvm b node=n cpus=1 memory=1GiB resident=64MiB cpu=1";
    let scenario = parse(text, "two", &|_| Err(String::new())).expect("good");
    let outcome = run(&scenario, PolicyKind::None, 0);
    assert!(
        (outcome.slowdown_mean - 2.0).abs() < 1e-9,
        "{}",
        outcome.slowdown_mean
    );
}

#[test]
fn links_are_shared() {
    // Two VMs of 1 GB leave one node at once, each for its own: both take twice as long as one would.
    let text = "shoal-simulation 1\nnoise off\nsimulation duration=60s\nmigration link=125000000 setup=0s switch=0s\n\
                node a cpus=8 memory=8GiB\nnode b cpus=8 memory=8GiB\nnode c cpus=8 memory=8GiB\n\
                vm x node=a cpus=1 memory=1000000000 resident=1000000000\nvm y node=a cpus=1 memory=1000000000 resident=1000000000";
    #[derive(Debug)]
    struct Both;
    impl Balancer for Both {
        fn place(&mut self, _: &Observation<'_>, _: &LaunchRequest) -> Option<NodeName> {
            None
        }
        fn round(&mut self, seen: &Observation<'_>) -> Orders {
            let to = |vm: &str, node: &str| Move::new(shoal_plan::VmId::new(vm), NodeName::new(node));
            if seen.now < 1.5 {
                vec![to("x", "b"), to("y", "c")].into()
            } else {
                Orders::default()
            }
        }
    }
    let scenario = parse(text, "links", &|_| Err(String::new())).expect("good");
    let specs = vm_specs(&scenario, 0);
    let mut engine = Engine::new(&scenario, &specs, 0);
    let mut live = Live::new(&engine, Box::new(Both));
    engine.run(&mut live);
    assert_eq!((engine.counters.migrations, engine.counters.bytes), (2.0, 2e9));
    for vm in &engine.vms {
        let (from, at) = vm.last_move.expect("it moved");
        // Started with the first report, at 1 s.
        assert!(from == 0 && (at - 17.0).abs() < 1e-6, "{at}");
    }
}
