//! Time of one round for a large cluster: `cargo run --release -p shoal-plan --example scale [NODES VMS]`.

use std::time::Instant;

use shoal_plan::{
    Bytes, BytesPerSecond, ClusterSnapshot, LaunchRequest, NodeName, NodeState, NodeView, Policy, VmView,
    place_launch, round,
};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse().unwrap_or(0));
    let (nodes, vms) = (
        arguments.next().unwrap_or(10_000),
        arguments.next().unwrap_or(100_000),
    );
    println!("{nodes} nodes, {vms} VMs; times of one round, one thread");
    for (name, memory_factor, cpu_factor) in [
        ("balanced", 40, 40),
        ("uneven CPU", 40, 120),
        ("memory short on a part of the nodes", 75, 60),
        ("memory short on many nodes", 140, 60),
        ("memory short on every node", 260, 60),
    ] {
        let snapshot = cluster(nodes, vms, memory_factor, cpu_factor);
        let start = Instant::now();
        let plan = round(
            &snapshot,
            &Policy {
                max_migrations: 64,
                ..Policy::default()
            },
        );
        println!(
            "{name}: {:.0} ms, {} moves, {} notes, score {:.0} to {:.0}",
            start.elapsed().as_secs_f64() * 1e3,
            plan.actions.len(),
            plan.notes.len(),
            plan.score_before,
            plan.score_after
        );
    }
    let mut snapshot = cluster(nodes, vms, 60, 60);
    for node in snapshot.nodes.iter_mut().step_by(20) {
        node.state = NodeState::Draining;
    }
    let start = Instant::now();
    let plan = round(&snapshot, &Policy::default());
    let millis = start.elapsed().as_secs_f64() * 1e3;
    println!(
        "one node in twenty drained: {millis:.0} ms, {} moves, {} notes",
        plan.actions.len(),
        plan.notes.len()
    );
    let start = Instant::now();
    let placed = place_launch(
        &snapshot,
        &Policy::default(),
        &LaunchRequest {
            cpus: 2,
            memory: Bytes::gib(4),
            node: None,
            cpu_class: None,
            ..LaunchRequest::default()
        },
    );
    println!(
        "place one VM: {:.0} ms, {}",
        start.elapsed().as_secs_f64() * 1e3,
        placed.is_ok()
    );
}

/// Nodes of 64 GiB and 32 CPUs; VMs spread by a fixed pseudo-random sequence. The factors are percent of an even fill.
fn cluster(nodes: usize, vms: usize, memory_factor: u64, cpu_factor: u64) -> ClusterSnapshot {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below.max(1)
    };
    let memory = Bytes::gib(64);
    let mut snapshot = ClusterSnapshot {
        nodes: (0..nodes)
            .map(|n| NodeView::new(&format!("node{n:05}"), 32, memory))
            .collect(),
        vms: Vec::with_capacity(vms),
    };
    let (memory_each, vcpus_each) = (
        memory.0 * nodes as u64 / vms.max(1) as u64,
        32.0 * nodes as f64 / vms.max(1) as f64,
    );
    for number in 0..vms {
        let on = usize::try_from(next(nodes as u64)).unwrap_or(0);
        let node = &mut snapshot.nodes[on];
        let mut vm = VmView::new(&format!("vm{number:06}"), "", 4, Bytes(memory_each));
        vm.node = NodeName::new(node.name.as_str());
        vm.resident = Some(Bytes(
            memory_each / 200 * memory_factor + next(memory_each / 200 * memory_factor),
        ));
        vm.cpu_use = vcpus_each * (next(2 * cpu_factor) as f64) / 100.0;
        vm.growth = BytesPerSecond(next(1 << 20));
        node.memory_available = Bytes(
            node.memory_available
                .0
                .saturating_sub(vm.resident.unwrap_or_default().0),
        );
        node.load_local += vm.cpu_use;
        node.load_exported = node.load_local * 1.1;
        snapshot.vms.push(vm);
    }
    snapshot
}
