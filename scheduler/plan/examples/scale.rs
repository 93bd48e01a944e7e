//! Time of one round for a large cluster: `cargo run --release -p shoal-plan --example scale [NODES VMS]`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_plan::{
    Bytes, BytesPerSecond, ClusterSnapshot, Estimate, LaunchRequest, Mode, NodeName, NodeState, NodeView,
    Policy, Rules, Turn, VmId, VmView, Waiting, place_launches, round, take_turns,
};

const RUNS: usize = 5;

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse().unwrap_or(0));
    let (nodes, vms) = (
        arguments.next().unwrap_or(10_000),
        arguments.next().unwrap_or(100_000),
    );
    println!("{nodes} nodes, {vms} VMs; one thread, the median of {RUNS}");
    let policy = Policy {
        max_migrations: 50,
        ..Policy::default()
    };
    let requests = vec![
        LaunchRequest {
            cpus: 2,
            memory: Bytes::gib(4),
            ..LaunchRequest::default()
        };
        100
    ];
    for (name, memory_factor, cpu_factor) in [
        ("balanced", 40, 40),
        ("uneven CPU", 40, 120),
        ("memory short on a part of the nodes", 75, 60),
        ("memory short on many nodes", 140, 60),
        ("memory short on every node", 260, 60),
    ] {
        let snapshot = cluster(nodes, vms, memory_factor, cpu_factor);
        let (placed, place_ms) = median(|| place_launches(&snapshot, &policy, &requests));
        let (plan, round_ms) = median(|| round(&snapshot, &policy));
        println!(
            "{name}: {:.0} ms = {place_ms:.0} to place 100 VMs ({} placed) + {round_ms:.0} for {} moves and {} notes, \
             score {:.0} to {:.0}",
            place_ms + round_ms,
            placed.iter().filter(|placed| placed.is_ok()).count(),
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
    let (plan, ms) = median(|| round(&snapshot, &policy));
    println!(
        "one node in twenty drained: {ms:.0} ms, {} moves, {} notes",
        plan.actions.len(),
        plan.notes.len()
    );
    let mut snapshot = cluster(nodes, vms, 40, 60);
    rules(&mut snapshot);
    let (plan, ms) = median(|| round(&snapshot, &policy));
    println!(
        "every VM with labels and rules: {ms:.0} ms, {} moves",
        plan.actions.len()
    );
    preemption(nodes, vms, &policy);
    let pack = Policy {
        mode: Mode::Pack,
        ..policy.clone()
    };
    let snapshot = cluster(nodes, vms, 40, 40);
    let (plan, ms) = median(|| round(&snapshot, &pack));
    println!("packing: {ms:.0} ms, {} moves", plan.actions.len());
    let n_plus_one = Policy {
        n_plus_one: true,
        ..policy
    };
    let (placed, ms) = median(|| place_launches(&snapshot, &n_plus_one, &requests));
    let placed = placed.iter().filter(|placed| placed.is_ok()).count();
    println!("place 100 VMs with N+1: {ms:.0} ms, {placed} placed");
    if let Some(peak) = peak_memory() {
        println!("peak memory: {peak}");
    }
}

/// Twenty large VMs wait in a cluster that is full, where every VM may be stopped for them, or none.
fn preemption(nodes: usize, vms: usize, policy: &Policy) {
    for marked in [false, true] {
        let mut snapshot = cluster(nodes, vms, 180, 60);
        for (number, vm) in snapshot.vms.iter_mut().enumerate() {
            vm.preemptible = marked;
            vm.priority = u32::try_from(number % 5).unwrap_or(0);
        }
        let waiting: Vec<Waiting> = (0..20)
            .map(|number| Waiting {
                id: VmId::new(&format!("w{number}")),
                name: format!("w{number}"),
                request: LaunchRequest {
                    cpus: 2,
                    memory: Bytes::gib(60),
                    priority: 8,
                    ..LaunchRequest::default()
                },
                since: Duration::ZERO,
            })
            .collect();
        let (turns, ms) = median(|| take_turns(&snapshot, policy, &waiting));
        let made = turns
            .iter()
            .filter(|(_, turn)| matches!(turn, Turn::Preempt(_)))
            .count();
        let which = if marked {
            "every VM is marked"
        } else {
            "none is marked"
        };
        println!("20 large VMs wait, {which}: {ms:.0} ms, room is made for {made}");
    }
}

/// What the last of some runs gives, and the median time in milliseconds.
fn median<T>(work: impl Fn() -> T) -> (T, f64) {
    let mut times = [0.0; RUNS];
    let mut last = None;
    for time in &mut times {
        let start = Instant::now();
        last = Some(work());
        *time = start.elapsed().as_secs_f64() * 1e3;
    }
    times.sort_by(f64::total_cmp);
    (last.expect("it ran"), times[RUNS / 2])
}

fn peak_memory() -> Option<Bytes> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib << 10))
}

/// Ten zones and a taint; VMs of a hundred applications whose replicas keep apart, each in a zone.
fn rules(snapshot: &mut ClusterSnapshot) {
    for (number, node) in snapshot.nodes.iter_mut().enumerate() {
        node.labels = format!("zone=z{}", number % 10).parse().expect("a label");
        if number % 50 == 0 {
            node.taints = "gpu".parse().expect("a label");
        }
    }
    let zones: HashMap<NodeName, String> = snapshot
        .nodes
        .iter()
        .map(|node| {
            (
                node.name.clone(),
                node.labels.get("zone").unwrap_or_default().to_owned(),
            )
        })
        .collect();
    for (number, vm) in snapshot.vms.iter_mut().enumerate() {
        let app = number / 10;
        vm.labels = format!("app=a{app},user=u{}", number % 100)
            .parse()
            .expect("labels");
        vm.rules = Some(Arc::new(Rules {
            selector: vec![format!("zone={}", zones[&vm.node]).parse().expect("a term")],
            anti_affinity: vec![format!("app=a{app}").parse().expect("a term")],
            ..Rules::default()
        }));
    }
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
        ..ClusterSnapshot::default()
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
        vm.cpu = Some(Estimate {
            mean: vcpus_each * (next(2 * cpu_factor) as f64) / 100.0,
            error: vcpus_each * (next(cpu_factor) as f64) / 1000.0,
        });
        vm.growth = BytesPerSecond(next(1 << 20));
        node.memory_available = Bytes(
            node.memory_available
                .0
                .saturating_sub(vm.resident.unwrap_or_default().0),
        );
        snapshot.vms.push(vm);
    }
    snapshot
}
