//! Each rule, on clusters small enough to work out by hand.

use shoal_plan::{Bytes, ClusterSnapshot, NodeView, Policy, VmView};

use super::*;
use crate::random::Random;

/// What a policy is shown.
#[derive(Debug, Clone, Default)]
struct Seen {
    snapshot: ClusterSnapshot,
    samples: Samples,
}

impl Seen {
    fn with(nodes: &[(&str, f64)], vms: &[(&str, &str, f64, u64)]) -> Self {
        let mut seen = Self::default();
        for (name, load) in nodes {
            seen.snapshot.nodes.push(NodeView::new(name, 4, Bytes::gib(16)));
            seen.samples.nodes.push(queue(*load));
        }
        for (id, node, cpu, mib) in vms {
            seen.add(id, node, *cpu, *mib);
        }
        seen
    }

    fn add(&mut self, id: &str, node: &str, cpu: f64, mib: u64) {
        let mut view = VmView::new(id, node, 1, Bytes::gib(2));
        view.resident = Some(Bytes::mib(mib));
        self.snapshot.vms.push(view);
        self.samples.vms.push(cpu);
    }
}

fn queue(load: f64) -> RunQueue {
    RunQueue {
        local: load,
        exported: load,
    }
}

fn ask(balancer: &mut dyn Balancer, seen: &Seen) -> Vec<(String, String)> {
    let policy = Policy::default();
    let seen = Observation {
        now: 60.0,
        snapshot: &seen.snapshot,
        samples: &seen.samples,
        policy: &policy,
    };
    let moves = balancer.round(&seen).moves.into_iter();
    moves.map(|m| (m.vm.to_string(), m.to.to_string())).collect()
}

fn moved(vm: &str, to: &str) -> Vec<(String, String)> {
    vec![(vm.to_owned(), to.to_owned())]
}

fn uneven() -> Seen {
    let vms = [
        ("v1", "a", 0.9, 512),
        ("v2", "a", 0.8, 512),
        ("v3", "a", 0.7, 512),
        ("v4", "a", 0.6, 512),
    ];
    Seen::with(&[("a", 3.0), ("b", 0.0)], &vms)
}

#[test]
fn openmosix_moves_the_second_most_loaded() {
    // With two nodes it may take a few rounds until one has told the other.
    let mut balancer = openmosix::OpenMosix::new(1);
    let moves = (0..20)
        .map(|_| ask(&mut balancer, &uneven()))
        .find(|moves| !moves.is_empty());
    assert_eq!(moves.expect("it moves"), moved("v2", "b"));
    // 130 % of it there is not below what is here.
    let mut even = uneven();
    even.samples.nodes[1] = queue(2.0);
    let mut balancer = openmosix::OpenMosix::new(1);
    assert!((0..20).all(|_| ask(&mut balancer, &even).is_empty()));
}

#[test]
fn the_gap_closes_up_to_the_middle() {
    // Scores: a is (3/4 + 2/16)/2, b 0. The first that leaves b below the middle goes.
    assert_eq!(ask(&mut threshold::Gap::default(), &uneven()), moved("v1", "b"));
    let mut rested = uneven();
    for vm in &mut rested.snapshot.vms {
        vm.since_last_move = Some(std::time::Duration::from_secs(3600));
    }
    assert!(
        ask(&mut threshold::Gap::default(), &rested).is_empty(),
        "6 h have not passed"
    );
}

#[test]
fn the_imbalance_must_last_three_rounds() {
    let mut balancer = threshold::Imbalance::default();
    assert!(ask(&mut balancer, &uneven()).is_empty());
    assert!(ask(&mut balancer, &uneven()).is_empty());
    assert_eq!(ask(&mut balancer, &uneven()), moved("v1", "b"));
}

#[test]
fn hbal_stops_when_nothing_gains() {
    let moves = ask(&mut hbal::Hbal, &uneven());
    assert_eq!(moves.len(), 2, "{moves:?}");
    let vms = [("v1", "a", 0.5, 512), ("v2", "b", 0.5, 512)];
    let balanced = Seen::with(&[("a", 0.5), ("b", 0.5)], &vms);
    assert!(ask(&mut hbal::Hbal, &balanced).is_empty());
}

#[test]
fn drs_moves_only_where_vms_are_not_served() {
    assert!(
        ask(&mut drs::Drs, &uneven()).is_empty(),
        "three of four CPUs serve everyone"
    );
    let mut full = uneven();
    full.add("v5", "a", 1.0, 512);
    full.samples.nodes[0] = queue(4.0);
    let moves = ask(&mut drs::Drs, &full);
    assert_eq!(moves.len(), 1, "{moves:?}");
    assert_eq!(moves[0].1, "b");
}

#[test]
fn nobody_moves_what_cannot_move() {
    let mut seen = uneven();
    for vm in &mut seen.snapshot.vms {
        vm.cannot_move = Some(shoal_plan::CannotMove::Locked);
    }
    let text = "shoal-simulation 1\nnodes n count=2 cpus=4 memory=16GiB\nworkload steady vms=1";
    let mut scenario = crate::text::parse(text, "x", &|_| Err(String::new())).expect("good");
    for mode in [Mode::Spread, Mode::Pack] {
        scenario.mode = mode;
        for kind in PolicyKind::ALL {
            let mut balancer = kind.build(&scenario, 1);
            for _ in 0..5 {
                assert!(ask(balancer.as_mut(), &seen).is_empty(), "{}", kind.name());
            }
        }
    }
}

#[test]
fn every_policy_survives_any_snapshot() {
    let text = "shoal-simulation 1\nnodes n count=6 cpus=4 memory=16GiB\nworkload steady vms=1";
    let mut scenario = crate::text::parse(text, "x", &|_| Err(String::new())).expect("good");
    let mut random = Random::new(5);
    for round in 0..200 {
        let names = ["n0", "n1", "n2", "n3", "n4", "n5"];
        let mut shown = Seen::with(&names.map(|name| (name, random.between(0.0, 12.0))), &[]);
        for view in &mut shown.snapshot.nodes {
            view.memory_available = Bytes::mib(random.bits() % 16_384);
        }
        for number in 0..random.below(40) {
            let node = names[random.below(6)];
            shown.add(&format!("v{number}"), node, random.unit(), random.bits() % 2048);
            if random.below(5) == 0
                && let Some(view) = shown.snapshot.vms.last_mut()
            {
                view.resident = None;
            }
        }
        scenario.mode = if round % 2 == 0 { Mode::Spread } else { Mode::Pack };
        for kind in PolicyKind::ALL {
            let mut balancer = kind.build(&scenario, round);
            for _ in 0..3 {
                let mut seen = std::collections::HashSet::new();
                for (vm, to) in ask(balancer.as_mut(), &shown) {
                    let view = shown
                        .snapshot
                        .vms
                        .iter()
                        .find(|view| view.id.as_str() == vm)
                        .expect("it is there");
                    assert_ne!(
                        view.node.as_str(),
                        to,
                        "{} moves {vm} to where it is",
                        kind.name()
                    );
                    assert!(seen.insert(vm), "{} moves a VM twice", kind.name());
                }
            }
        }
    }
}
