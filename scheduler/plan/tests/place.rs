//! What a user is told about a place for a VM.

use std::sync::Arc;
use std::time::Duration;

use shoal_plan::{
    Bytes, BytesPerSecond, CannotMove, ClusterSnapshot, CpuClass, Held, InFlight, Kernels, KvmKind,
    LaunchRequest, NodeName, NodeState, NodeView, PlaceError, Policy, SoftwareKernel, VmId, VmView,
    place_handover, place_launch, place_migration, text,
};

/// node1 is full, node2 has room, node3 is cordoned, node4 has one CPU.
fn cluster() -> ClusterSnapshot {
    let mut nodes: Vec<NodeView> = (1..=4)
        .map(|number| NodeView::new(&format!("node{number}"), 2, Bytes::gib(1)))
        .collect();
    nodes[0].memory_available = Bytes::mib(224);
    nodes[2].state = NodeState::Cordoned;
    nodes[3].cpus = 1;
    let mut full = VmView::new("full", "node1", 2, Bytes::gib(1));
    full.resident = Some(Bytes::mib(800));
    let mut small = VmView::new("small", "node2", 1, Bytes::mib(256));
    small.resident = Some(Bytes::mib(128));
    nodes[1].memory_available = Bytes::mib(896);
    ClusterSnapshot {
        nodes,
        vms: vec![full, small],
        ..ClusterSnapshot::default()
    }
}

fn launch(cpus: u32, memory: Bytes, node: Option<&str>) -> Result<String, String> {
    let request = LaunchRequest {
        cpus,
        memory,
        node: node.map(NodeName::new),
        cpu_class: None,
        ..LaunchRequest::default()
    };
    match place_launch(&cluster(), &Policy::default(), &request) {
        Ok(placement) => Ok(placement.node.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

fn migrate(snapshot: &ClusterSnapshot, vm: &str, node: Option<&str>) -> Result<String, String> {
    let node = node.map(NodeName::new);
    match place_migration(snapshot, &Policy::default(), &VmId::new(vm), node.as_ref()) {
        Ok(placement) => Ok(placement.node.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn a_launch_goes_to_the_cheapest_node_that_fits() {
    assert_eq!(launch(2, Bytes::mib(384), None), Ok("node2".to_owned()));
    assert_eq!(launch(1, Bytes::mib(384), Some("node4")), Ok("node4".to_owned()));
}

#[test]
fn every_node_says_why_it_cannot_take_a_launch() {
    let request = LaunchRequest {
        cpus: 2,
        memory: Bytes::gib(2),
        node: None,
        cpu_class: None,
        ..LaunchRequest::default()
    };
    let Err(PlaceError::NothingFits { rejections, .. }) =
        place_launch(&cluster(), &Policy::default(), &request)
    else {
        panic!("2 GiB fit nowhere");
    };
    let reasons: Vec<String> = rejections
        .iter()
        .map(|r| format!("{}: {}", r.node, r.reason))
        .collect();
    assert_eq!(
        reasons,
        [
            "node1: 1 GiB declared there and 2 GiB more would pass its limit of 1536 MiB declared memory",
            "node2: 256 MiB declared there and 2 GiB more would pass its limit of 1536 MiB declared memory",
            "node3: it is cordoned",
            "node4: it has 1 CPUs, the VM asks for 2",
        ]
    );
    let text = launch(1, Bytes::mib(256), Some("node1")).expect_err("node1 is full");
    assert!(
        text.contains("node1: 800 MiB used or reserved there and 170 MiB expected of the VM"),
        "{text}"
    );
    assert!(text.contains("node2: node1 was asked for"), "{text}");
    let text = launch(1, Bytes::mib(256), Some("node9")).expect_err("there is no node9");
    assert!(text.starts_with("node node9 is unknown"), "{text}");
}

#[test]
fn an_empty_cluster_says_so() {
    let request = LaunchRequest {
        cpus: 1,
        memory: Bytes::mib(64),
        node: None,
        cpu_class: None,
        ..LaunchRequest::default()
    };
    let error =
        place_launch(&ClusterSnapshot::default(), &Policy::default(), &request).expect_err("no nodes");
    assert_eq!(error.to_string(), "nothing fits: the cluster has no nodes");
}

#[test]
fn each_wrong_migration_has_its_own_error() {
    let snapshot = cluster();
    for (vm, node, starts) in [
        ("none", Some("node2"), "VM none is unknown"),
        ("small", Some("node9"), "node node9 is unknown"),
        ("small", Some("node2"), "VM small is on node2 already"),
        ("small", Some("node3"), "node node3 is cordoned"),
        (
            "small",
            Some("node1"),
            "VM small does not fit on node1: 800 MiB used",
        ),
        (
            "full",
            Some("node4"),
            "VM full does not fit on node4: it has 1 CPUs",
        ),
        ("full", None, "nothing fits: node2: 128 MiB used"),
    ] {
        let text = migrate(&snapshot, vm, node).expect_err(starts);
        assert!(text.starts_with(starts), "{text}");
    }
    assert_eq!(migrate(&snapshot, "small", None), Ok("node4".to_owned()));
}

#[test]
fn a_vm_stays_on_its_node_only_when_asked_to_and_a_copy_needs_room() {
    let mut snapshot = cluster();
    let handover = |snapshot: &ClusterSnapshot, vm: &str, shared| {
        place_handover(snapshot, &Policy::default(), &VmId::new(vm), shared)
            .map(|place| place.node.to_string())
            .map_err(|error| error.to_string())
    };
    assert_eq!(handover(&snapshot, "small", false), Ok("node2".to_owned()));
    snapshot.nodes[1].state = NodeState::Draining;
    assert_eq!(handover(&snapshot, "small", true), Ok("node2".to_owned()));
    let refused = handover(&snapshot, "full", false).expect_err("holds most of its node");
    assert!(refused.starts_with("VM full does not fit on node1"), "{refused}");
    assert_eq!(handover(&snapshot, "full", true), Ok("node1".to_owned()));
    snapshot.vms[0].cannot_move = Some(CannotMove::Settling);
    let refused = handover(&snapshot, "full", true).expect_err("cannot move");
    assert!(
        refused.ends_with("its last migration is not over yet"),
        "{refused}"
    );
}

#[test]
fn a_vm_that_cannot_move_says_why() {
    let mut snapshot = cluster();
    for (why, text) in [
        (CannotMove::Starting, "VM small cannot be moved: it is starting"),
        (
            CannotMove::InDoubt,
            "VM small cannot be moved: it is in doubt after a migration",
        ),
        (
            CannotMove::Locked,
            "VM small cannot be moved: it is locked to its node",
        ),
        (
            CannotMove::Pinned,
            "VM small cannot be moved: it is locked to its node by --node: `shoal unlock` it first",
        ),
    ] {
        snapshot.vms[1].cannot_move = Some(why);
        assert_eq!(migrate(&snapshot, "small", None), Err(text.to_owned()));
    }
    snapshot.vms[1].in_flight = Some(InFlight {
        to: NodeName::new("node4"),
        received: Bytes(0),
    });
    let text = "VM small cannot be moved: it is migrating to node4";
    assert_eq!(migrate(&snapshot, "small", Some("node1")), Err(text.to_owned()));
    snapshot.vms[1].in_flight = None;
    snapshot.vms[1].cannot_move = None;
    snapshot.nodes[1].state = NodeState::Unreachable;
    let text = "VM small cannot be moved: its node node2 is unreachable";
    assert_eq!(migrate(&snapshot, "small", None), Err(text.to_owned()));
}

#[test]
fn what_is_on_its_way_is_reserved_once() {
    let mut snapshot = cluster();
    // 600 MiB of `full` are on their way to node2, 500 of them there and in its report.
    snapshot.vms[0].resident = Some(Bytes::mib(600));
    snapshot.vms[0].declared = Bytes::mib(768);
    snapshot.vms[0].in_flight = Some(InFlight {
        to: NodeName::new("node2"),
        received: Bytes::mib(500),
    });
    snapshot.nodes[1].memory_available = Bytes::mib(1024 - 128 - 500);
    let request = |mib| LaunchRequest {
        cpus: 1,
        memory: Bytes::mib(mib),
        node: Some(NodeName::new("node2")),
        cpu_class: None,
        ..LaunchRequest::default()
    };
    // 728 MiB are used or reserved; up to 921 there is room for two thirds of 288, not of 300.
    assert!(place_launch(&snapshot, &Policy::default(), &request(288)).is_ok());
    assert!(place_launch(&snapshot, &Policy::default(), &request(300)).is_err());
}

#[test]
fn a_vm_not_yet_reported_counts_with_what_is_expected_of_it() {
    let mut snapshot = cluster();
    snapshot.vms[1].resident = None;
    snapshot.vms[1].growth = BytesPerSecond(1 << 30);
    snapshot.nodes[1].memory_available = Bytes::gib(1);
    let text = migrate(&snapshot, "full", Some("node2")).expect_err("too much");
    assert!(text.contains("170 MiB used or reserved there"), "{text}");
}

#[test]
fn a_vm_never_goes_where_its_cpu_features_are_not() {
    let mut snapshot = cluster();
    for vm in &mut snapshot.vms {
        vm.cpu_class = Some(CpuClass::new("wide"));
    }
    let narrow = [(CpuClass::new("wide"), Arc::from("AVX512F, AVX512BW"))];
    let node4 = snapshot
        .nodes
        .iter_mut()
        .find(|node| node.name.as_str() == "node4");
    node4.expect("there").cpu_lacks = Arc::from(narrow);
    let lacking = "its CPU lacks AVX512F, AVX512BW, which the VM has";
    let asked = migrate(&snapshot, "small", Some("node4")).expect_err("another CPU");
    assert!(asked.ends_with(lacking), "{asked}");
    let chosen = migrate(&snapshot, "small", None).expect_err("nowhere else");
    assert!(chosen.contains(&format!("node4: {lacking}")), "{chosen}");

    let launch = |class: Option<&str>| {
        let request = LaunchRequest {
            cpus: 1,
            memory: Bytes::mib(64),
            node: Some(NodeName::new("node4")),
            cpu_class: class.map(CpuClass::new),
            ..LaunchRequest::default()
        };
        place_launch(&snapshot, &Policy::default(), &request).is_ok()
    };
    assert!(launch(None) && launch(Some("other")) && !launch(Some("wide")));

    let text = text::print(&snapshot, &Policy::default());
    let read = text::parse(&text).expect("its own text").snapshot;
    assert_eq!((read.nodes, read.vms), (snapshot.nodes, snapshot.vms));
}

/// node1 and node3 have hardware virtualization, node2 and node4 have none.
fn two_kinds() -> ClusterSnapshot {
    let mut snapshot = cluster();
    snapshot.nodes[2].state = NodeState::Ready;
    for (number, node) in snapshot.nodes.iter_mut().enumerate() {
        let software = number % 2 == 1;
        node.kvm = Some(if software {
            KvmKind::Software
        } else {
            KvmKind::Hardware
        });
    }
    snapshot
}

fn place_image(
    snapshot: &ClusterSnapshot,
    kernels: &Kernels,
    cpus: u32,
    node: Option<&str>,
) -> Result<String, PlaceError> {
    let request = LaunchRequest {
        cpus,
        memory: Bytes::mib(64),
        node: node.map(NodeName::new),
        kernels: Some(Arc::new(kernels.clone())),
        ..LaunchRequest::default()
    };
    place_launch(snapshot, &Policy::default(), &request).map(|placement| placement.node.to_string())
}

#[test]
fn an_image_starts_where_it_has_a_kernel_for_the_kind_of_kvm() {
    let mut snapshot = two_kinds();
    let linux = Kernels {
        image: Arc::from("linux"),
        hardware: true,
        software: None,
        software_cpus: None,
    };
    let error = place_image(&snapshot, &linux, 1, Some("node2")).expect_err("no kernel for it");
    assert!(error.is_final());
    let words = "node2: its KVM has no hardware virtualization, and image linux has no kernel for that ([software_kvm] kernel in image.toml)";
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!(
        place_image(&snapshot, &linux, 1, None).expect("node3 is empty"),
        "node3"
    );

    let only_software = Kernels {
        hardware: false,
        software: Some(SoftwareKernel::Ring3),
        ..linux.clone()
    };
    let error = place_image(&snapshot, &only_software, 1, Some("node3")).expect_err("no kernel for it");
    let words = "node3: its KVM has hardware virtualization, and image linux has no kernel for that (kernel in image.toml)";
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!(
        place_image(&snapshot, &only_software, 1, Some("node4")).expect("it has"),
        "node4"
    );

    snapshot.nodes[3].kvm_trouble = Some(Arc::from("external interrupts do not arrive"));
    let error = place_image(&snapshot, &only_software, 1, Some("node4")).expect_err("it cannot");
    let words = "node4: its KVM cannot run a kernel in ring 3: external interrupts do not arrive";
    assert!(error.is_final() && error.to_string().contains(words), "{error}");
    // It takes other kernels all the same.
    let plain = Kernels {
        software: Some(SoftwareKernel::Plain),
        ..linux
    };
    assert!(place_image(&snapshot, &plain, 1, Some("node4")).is_ok());

    snapshot.nodes[3].kvm = None;
    let error = place_image(&snapshot, &plain, 1, Some("node4")).expect_err("no KVM");
    assert!(!error.is_final(), "it may be mended");
    assert!(
        error
            .to_string()
            .contains("node4: its KVM cannot be used: external"),
        "{error}"
    );
}

#[test]
fn a_kernel_with_few_cpus_is_said_in_one_sentence_where_no_node_has_another() {
    let mut snapshot = two_kinds();
    let kernels = Kernels {
        image: Arc::from("linux"),
        hardware: true,
        software: Some(SoftwareKernel::Ring3),
        software_cpus: Some(1),
    };
    snapshot.held.push(Held {
        vm: VmId::new("waits"),
        node: NodeName::new("node2"),
        request: LaunchRequest {
            kernels: Some(Arc::new(kernels.clone())),
            ..LaunchRequest::default()
        },
        quiet: Duration::ZERO,
    });
    let written = text::print(&snapshot, &Policy::default());
    assert!(
        written.contains(" image=linux kernels=hardware,ring3 software_cpus=1"),
        "{written}"
    );
    assert_eq!(
        text::parse(&written).expect("its own text").snapshot.held,
        snapshot.held
    );
    snapshot.held.clear();
    assert_eq!(
        place_image(&snapshot, &kernels, 2, None).expect("hardware"),
        "node3"
    );
    assert!(place_image(&snapshot, &kernels, 1, Some("node2")).is_ok());
    let error = place_image(&snapshot, &kernels, 2, Some("node2")).expect_err("one CPU");
    let words = "node2: image linux runs with 1 CPU where KVM has no hardware virtualization, as there, and the VM asks for 2";
    assert!(error.is_final() && error.to_string().contains(words), "{error}");
    snapshot.nodes.retain(|node| node.kvm == Some(KvmKind::Software));
    snapshot.nodes[0].state = NodeState::Cordoned;
    let error = place_image(&snapshot, &kernels, 2, None).expect_err("one CPU");
    assert!(error.is_final());
    assert_eq!(
        error.to_string(),
        "nothing fits: image linux runs with 1 CPU where KVM has no hardware virtualization; node2 and node4 are such"
    );
}

#[test]
fn a_vm_that_runs_keeps_to_its_kind_of_kvm() {
    let mut snapshot = two_kinds();
    let words = "its KVM has hardware virtualization, and the VM was started without: only a new start can bring it there";
    // Nobody has said what `small` was started on: its node is what it is.
    let error = migrate(&snapshot, "small", Some("node3")).expect_err("the other kind");
    assert_eq!(error, format!("VM small does not fit on node3: {words}"));
    assert_eq!(migrate(&snapshot, "small", None), Ok("node4".to_owned()));
    let small = snapshot.vms.iter_mut().find(|vm| vm.name.as_ref() == "small");
    small.expect("there").ring3 = true;
    snapshot.nodes[3].kvm_trouble = Some(Arc::from("no luck"));
    let error = migrate(&snapshot, "small", Some("node4")).expect_err("not in ring 3");
    assert!(
        error.ends_with("its KVM cannot run a kernel in ring 3: no luck"),
        "{error}"
    );

    for vm in &mut snapshot.vms {
        (vm.kvm, vm.ring3) = (Some(KvmKind::Hardware), false);
    }
    let error = migrate(&snapshot, "small", Some("node4")).expect_err("the other kind");
    let words = "its KVM has no hardware virtualization, and the VM was started with it: only a new start can bring it there";
    assert!(error.ends_with(words), "{error}");
    assert_eq!(migrate(&snapshot, "small", None), Ok("node3".to_owned()));
}

#[test]
fn a_vm_never_goes_where_one_node_has_a_certificate_and_the_other_has_none() {
    let mut snapshot = cluster();
    let tls = |snapshot: &mut ClusterSnapshot, name: &str, has: bool| {
        let mut nodes = snapshot.nodes.iter_mut();
        let node = nodes.find(|node| node.name.as_str() == name);
        node.expect("there").migration_tls = has;
    };
    let home = snapshot
        .vms
        .iter()
        .find(|vm| &*vm.name == "small")
        .expect("there");
    let home = home.node.as_str().to_owned();
    assert!(migrate(&snapshot, "small", Some("node4")).is_ok());

    tls(&mut snapshot, &home, true);
    let lacks = format!("it has no certificate for migrations, and {home} sends VMs over TLS only");
    let asked = migrate(&snapshot, "small", Some("node4")).expect_err("one of two");
    assert!(asked.contains(&lacks), "{asked}");
    let chosen = migrate(&snapshot, "small", None).expect_err("nowhere else");
    assert!(chosen.contains(&format!("node4: {lacks}")), "{chosen}");

    tls(&mut snapshot, "node4", true);
    assert!(migrate(&snapshot, "small", Some("node4")).is_ok());
    let text = text::print(&snapshot, &Policy::default());
    let read = text::parse(&text).expect("its own text").snapshot;
    assert_eq!(read.nodes, snapshot.nodes);

    tls(&mut snapshot, &home, false);
    let asked = migrate(&snapshot, "small", Some("node4")).expect_err("one of two");
    let takes = format!("it takes VMs over TLS only, and {home} has no certificate for migrations");
    assert!(asked.contains(&takes), "{asked}");
    let request = LaunchRequest {
        cpus: 1,
        memory: Bytes::mib(64),
        node: Some(NodeName::new("node4")),
        ..LaunchRequest::default()
    };
    assert!(place_launch(&snapshot, &Policy::default(), &request).is_ok());
}
