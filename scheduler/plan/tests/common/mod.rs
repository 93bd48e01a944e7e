//! What several tests need: random clusters, and plans carried out at once.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use shoal_plan::{
    Bytes, BytesPerSecond, CannotMove, ClusterSnapshot, Estimate, InFlight, KvmKind, Labels, NodeName,
    NodeState, NodeView, Plan, Rules, VmView,
};

/// A cluster whose numbers agree with each other, as a server makes it.
pub fn clusters() -> impl Strategy<Value = ClusterSnapshot> {
    (1usize..9)
        .prop_flat_map(|count| {
            (
                prop::collection::vec(node(), count),
                prop::collection::vec((vm(), 0..count, 0..count), 0..40),
            )
        })
        .prop_map(|(mut nodes, vms)| {
            for (number, node) in nodes.iter_mut().enumerate() {
                node.name = NodeName::new(&format!("node{number}"));
            }
            let mut snapshot = ClusterSnapshot {
                nodes,
                vms: Vec::new(),
                ..ClusterSnapshot::default()
            };
            for (number, (mut vm, on, to)) in vms.into_iter().enumerate() {
                vm.id = shoal_plan::VmId::new(&format!("vm{number:02}"));
                vm.name = format!("name{number}").into();
                vm.node = snapshot.nodes[on].name.clone();
                // Its record has it, or is older than that.
                vm.kvm = snapshot.nodes[on].kvm.filter(|_| number % 2 == 0);
                match &mut vm.in_flight {
                    Some(flight) if on != to => flight.to = snapshot.nodes[to].name.clone(),
                    flight => *flight = None,
                }
                snapshot.vms.push(vm);
            }
            settle(&mut snapshot);
            snapshot
        })
}

fn node() -> impl Strategy<Value = NodeView> {
    let state = prop_oneof![
        8 => Just(NodeState::Ready),
        1 => Just(NodeState::Cordoned),
        1 => Just(NodeState::Draining),
        1 => Just(NodeState::Unreachable),
    ];
    let pressure = prop_oneof![9 => Just(0.0), 1 => 0.0..100.0f64];
    let labels = prop_oneof![Just(""), Just("zone=a"), Just("zone=b,disk=ssd")];
    let taints = prop_oneof![5 => Just(""), 1 => Just("gpu")];
    let reserved = prop_oneof![4 => Just(0u64), 1 => 0u64..2048];
    let trouble = prop_oneof![9 => Just(None), 1 => Just(Some(Arc::from("no luck = none")))];
    (
        1u32..17,
        256u64..8192,
        (
            prop_oneof![Just(1.0), 0.5..3.0f64],
            prop_oneof![9 => Just(None), 1 => (0.1..2.0f64).prop_map(Some)],
        ),
        (state, pressure),
        (labels, taints, reserved),
        (kvm(), trouble),
    )
        .prop_map(
            |(
                cpus,
                mib,
                (speed, cpu_limit),
                (state, pressure_memory),
                (labels, taints, reserved),
                (kvm, kvm_trouble),
            )| {
                NodeView {
                    kvm,
                    kvm_trouble,
                    speed,
                    cpu_limit,
                    state,
                    pressure_memory,
                    labels: parse_labels(labels),
                    taints: parse_labels(taints),
                    reserved_memory: Bytes::mib(reserved.min(mib)),
                    ..NodeView::new("", cpus, Bytes::mib(mib))
                }
            },
        )
}

/// Mostly of one kind, as clusters are.
fn kvm() -> impl Strategy<Value = Option<KvmKind>> {
    prop_oneof![
        6 => Just(Some(KvmKind::Hardware)),
        2 => Just(Some(KvmKind::Software)),
        1 => Just(None),
    ]
}

pub fn parse_labels(text: &str) -> Labels {
    if text.is_empty() {
        Labels::default()
    } else {
        text.parse().expect("labels")
    }
}

/// Mostly none.
fn rules() -> impl Strategy<Value = Option<Arc<Rules>>> {
    let terms = |choices: &'static [&'static str]| {
        prop_oneof![
            3 => Just(Vec::new()),
            1 => prop::sample::select(choices).prop_map(|text| vec![text.parse().expect("a term")]),
        ]
    };
    let rules = (
        terms(&["zone=a", "zone", "zone!=b", "disk=ssd"]),
        terms(&["gpu"]),
        terms(&["app=web", "app=db", "tier"]),
        terms(&["app=web", "app=db", "app!=db", "tier"]),
        prop::bool::weighted(0.1),
    );
    prop_oneof![
        2 => Just(None),
        1 => rules.prop_map(|(selector, tolerations, affinity, anti_affinity, exclusive)| {
            let rules = Rules { selector, tolerations, affinity, anti_affinity, exclusive };
            (!rules.is_empty()).then(|| Arc::new(rules))
        }),
    ]
}

fn vm() -> impl Strategy<Value = VmView> {
    let growth = prop_oneof![3 => Just(0u64), 1 => 0u64..100 << 20];
    let suspended = prop_oneof![9 => Just(None), 1 => any::<bool>().prop_map(Some)];
    let cannot_move = prop_oneof![
        9 => Just(None),
        1 => prop::sample::select(vec![Some(CannotMove::Locked), Some(CannotMove::Pinned)]),
        1 => Just(Some(CannotMove::Starting)),
    ];
    let in_flight = prop_oneof![
        9 => Just(None),
        1 => (0u64..64).prop_map(|mib| Some(InFlight { to: NodeName::new(""), received: Bytes::mib(mib) })),
    ];
    let moved = prop_oneof![2 => Just(None), 1 => (0u64..120).prop_map(|s| Some(Duration::from_secs(s)))];
    let resident = prop_oneof![1 => Just(None), 9 => (0.0..1.0f64).prop_map(Some)];
    let dirty = prop::option::of((0u64..200 << 20).prop_map(BytesPerSecond));
    let dirty = (dirty, prop::option::of((0u64..2048).prop_map(Bytes::mib)));
    let labels = prop_oneof![
        2 => Just(""), 1 => Just("app=web"), 1 => Just("app=db"), 1 => Just("app=db,tier=back"),
    ];
    (
        (1u32..5, 16u64..2048, resident, 0.0..1.0f64),
        (growth, suspended),
        dirty,
        cannot_move,
        in_flight,
        moved,
        (
            labels,
            rules(),
            prop_oneof![Just(5u32), 0u32..10],
            any::<bool>(),
            prop::option::of((0u64..1000).prop_map(Duration::from_secs)),
            any::<bool>(),
        ),
    )
        .prop_map(
            |(
                (cpus, mib, resident, busy),
                (growth, suspended),
                (dirty_rate, working_set),
                cannot_move,
                in_flight,
                since_last_move,
                (labels, rules, priority, preemptible, ran, ring3),
            )| {
                VmView {
                    labels: parse_labels(labels),
                    rules,
                    priority,
                    preemptible,
                    ran,
                    ring3,
                    resident: resident.map(|part| bytes(part * Bytes::mib(mib).0 as f64)),
                    cpu: (busy < 0.9).then(|| Estimate {
                        mean: busy * f64::from(cpus),
                        error: busy * (0.9 - busy) / 4.0,
                    }),
                    growth: BytesPerSecond(if suspended.is_some() { 0 } else { growth }),
                    dirty_rate,
                    working_set,
                    cannot_move,
                    in_flight,
                    since_last_move,
                    suspended: suspended.is_some(),
                    // By a plan, or by a user.
                    suspended_growth: suspended.filter(|&plan| plan).map(|_| BytesPerSecond(growth)),
                    ..VmView::new("", "", cpus, Bytes::mib(mib))
                }
            },
        )
}

/// Makes the nodes' memory in use the sum of their VMs'.
pub fn settle(snapshot: &mut ClusterSnapshot) {
    for node in &mut snapshot.nodes {
        let here = snapshot.vms.iter().filter(|vm| vm.node == node.name);
        let residents: u64 = here.filter_map(|vm| vm.resident).map(|bytes| bytes.0).sum();
        let flights = snapshot.vms.iter().filter_map(|vm| vm.in_flight.as_ref());
        let received: u64 = flights
            .filter(|flight| flight.to == node.name)
            .map(|flight| flight.received.0)
            .sum();
        node.memory_available = Bytes(node.memory.0.saturating_sub(residents + received));
    }
}

/// Marks a plan's moves as under way.
pub fn start(snapshot: &mut ClusterSnapshot, plan: &Plan) {
    for action in &plan.actions {
        let vm = snapshot
            .vms
            .iter_mut()
            .find(|vm| vm.id == action.vm)
            .expect("a plan names VMs of the snapshot");
        vm.in_flight = Some(InFlight {
            to: action.to.clone(),
            received: Bytes(0),
        });
    }
}

/// Ends every move under way; nothing is remembered of them.
pub fn finish(snapshot: &mut ClusterSnapshot) {
    for vm in &mut snapshot.vms {
        if let Some(flight) = vm.in_flight.take() {
            vm.node = flight.to;
        }
        vm.since_last_move = None;
    }
    settle(snapshot);
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // float casts saturate
fn bytes(amount: f64) -> Bytes {
    Bytes(amount as u64)
}
