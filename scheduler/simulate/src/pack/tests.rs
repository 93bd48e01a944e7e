use shoal_plan::{Bytes, ClusterSnapshot, NodeView, VmView};

use super::*;
use crate::observe::{RunQueue, Samples};

#[derive(Debug, Default)]
struct Seen {
    snapshot: ClusterSnapshot,
    samples: Samples,
    policy: Policy,
}

impl Seen {
    fn observe(&self) -> Observation<'_> {
        Observation {
            now: 0.0,
            snapshot: &self.snapshot,
            samples: &self.samples,
            policy: &self.policy,
        }
    }
}

/// VMs that have used the same for an hour, and nodes of four CPUs.
fn cluster(nodes: usize, vms: &[(usize, f64)]) -> (Seen, HashMap<VmId, Forecast>) {
    let mut seen = Seen::default();
    let mut forecasts = HashMap::new();
    for number in 0..nodes {
        let view = NodeView::new(&format!("n{number}"), 4, Bytes::gib(16));
        seen.snapshot.nodes.push(view);
        seen.samples.nodes.push(RunQueue::default());
    }
    for (number, (node, cpu)) in vms.iter().enumerate() {
        let mut view = VmView::new(&format!("v{number}"), &format!("n{node}"), 2, Bytes::gib(2));
        view.resident = Some(Bytes::gib(1));
        seen.samples.vms.push(*cpu);
        seen.samples.nodes[*node].local += cpu;
        let mut forecast = Forecast::default();
        for _ in 0..SAMPLES {
            forecast.update(*cpu);
        }
        forecasts.insert(view.id.clone(), forecast);
        seen.snapshot.vms.push(view);
    }
    (seen, forecasts)
}

fn apply(seen: &mut Seen, moves: &[(VmId, NodeName)]) {
    for (id, to) in moves {
        let at = seen
            .snapshot
            .vms
            .iter()
            .position(|vm| vm.id == *id)
            .expect("it is there");
        let from = std::mem::replace(&mut seen.snapshot.vms[at].node, to.clone());
        for (node, queue) in seen.snapshot.nodes.iter().zip(&mut seen.samples.nodes) {
            if node.name == from {
                queue.local -= seen.samples.vms[at];
            } else if node.name == *to {
                queue.local += seen.samples.vms[at];
            }
        }
    }
}

fn on(seen: &Seen) -> usize {
    let names: std::collections::HashSet<&NodeName> = seen.snapshot.vms.iter().map(|vm| &vm.node).collect();
    names.len()
}

#[test]
fn nodes_are_emptied_all_or_nothing_and_then_it_rests() {
    let (mut seen, forecasts) = cluster(6, &[(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.5), (4, 0.5), (5, 1.0)]);
    let watts = [1.0; 6];
    for round_number in 0..10 {
        let moves = round(&seen.observe(), &forecasts, &watts);
        if moves.is_empty() {
            // 6 CPUs of work at 85 % of 4 each.
            assert_eq!(on(&seen), 2, "after {round_number} rounds");
            return;
        }
        let before = on(&seen);
        apply(&mut seen, &moves);
        assert!(on(&seen) < before, "a round that moves empties a node");
    }
    panic!("it moves on and on");
}

#[test]
fn a_node_that_wants_too_much_sheds_what_is_enough() {
    let (seen, forecasts) = cluster(2, &[(0, 2.0), (0, 2.0), (0, 0.9), (1, 1.0)]);
    let moves = round(&seen.observe(), &forecasts, &[1.0; 2]);
    assert_eq!(moves, [(VmId::new("v2"), NodeName::new("n1"))]);
    // A peak that is not expected to last moves nothing.
    let (seen, mut forecasts) = cluster(2, &[(0, 2.0), (0, 2.0), (0, 0.9), (1, 1.0)]);
    for forecast in forecasts.values_mut() {
        for _ in 0..SAMPLES {
            forecast.update(0.4);
        }
    }
    assert!(round(&seen.observe(), &forecasts, &[1.0; 2]).is_empty());
}

#[test]
fn the_fullest_that_fits_takes_a_new_vm_and_the_best_is_switched_on() {
    let (seen, forecasts) = cluster(3, &[(0, 1.0), (1, 2.0)]);
    let request = LaunchRequest {
        cpus: 1,
        memory: Bytes::gib(2),
        ..LaunchRequest::default()
    };
    let place = |seen: &Seen, watts: &[f64]| {
        super::place(&seen.observe(), &forecasts, watts, &request).map(|node| node.to_string())
    };
    assert_eq!(place(&seen, &[1.0; 3]).as_deref(), Some("n1"));
    let (empty, _) = cluster(3, &[]);
    assert_eq!(place(&empty, &[3.0, 1.0, 2.0]).as_deref(), Some("n1"));
    let large = LaunchRequest {
        cpus: 5,
        ..request.clone()
    };
    assert_eq!(super::place(&seen.observe(), &forecasts, &[1.0; 3], &large), None);
}

#[test]
fn a_forecast_begins_with_a_guess_and_forgets() {
    let guess = (0.6, 0.5);
    let mut forecast = Forecast::default();
    forecast.update(f64::NAN);
    assert_eq!(forecast.expected(guess), guess);
    forecast.update(1.0);
    assert_eq!(forecast.expected(guess), (1.0, 0.5));
    forecast.update(2.0);
    assert_eq!(forecast.expected(guess), (1.5, 0.5));
    forecast.update(3.0);
    assert_eq!(forecast.expected(guess), (2.0, 1.0));
    for _ in 0..SAMPLES {
        forecast.update(5.0);
    }
    assert_eq!(forecast.expected(guess), (5.0, 0.0));
}
