//! Two kinds of KVM in one cluster, against scripted nodes: node1 has hardware virtualization, the others have none.

use shoal_plan::KvmKind;
use shoal_proto::cluster::{self, ExplainVmRequest, GetVmRequest, ListNodesRequest, Vm};

use super::*;
use crate::api::run_vm::run_now;
use crate::execute::launch::LaunchError;
use crate::record::{BlobRef, Phase, SoftwareKvm, VmRecord};

async fn two_kinds(nodes: usize) -> Cluster {
    let cluster = Cluster::start(nodes, 1 << 30).await;
    for (number, node) in cluster.nodes.iter().enumerate() {
        let kind = if number == 0 {
            KvmKind::Hardware
        } else {
            KvmKind::Software
        };
        node.set_kvm(&cluster.scheduler, kind);
    }
    cluster
}

/// Of an image with a kernel for each kind; the one for software KVM has one CPU.
fn draft(cluster: &Cluster, name: &str, mib: u64) -> VmRecord {
    VmRecord {
        image: "linux".to_owned(),
        software_kvm: Some(SoftwareKvm {
            kernel: Some(BlobRef {
                sha256: "1".repeat(64),
                size_bytes: 1,
            }),
            cmdline: "noapic".to_owned(),
            max_cpus: Some(1),
        }),
        ..cluster.draft(name, mib * MIB)
    }
}

async fn run(cluster: &Cluster, draft: VmRecord, on: Option<&str>) -> Result<Arc<VmEntry>, LaunchError> {
    let node = on.map(|name| name.parse().expect("a name"));
    let ran = run_now(&cluster.scheduler, draft, node).await;
    cluster.report();
    ran
}

async fn shown(cluster: &Cluster, vm: &str) -> Vm {
    let request = GetVmRequest { vm: vm.to_owned() };
    let answer = api(cluster).get_vm(Request::new(request)).await;
    answer.expect("there").into_inner()
}

#[tokio::test]
async fn a_vm_keeps_to_its_kind_of_kvm() {
    let mut cluster = two_kinds(3).await;
    let plain = run(&cluster, draft(&cluster, "plain", 64), Some("node1")).await;
    let ring3 = run(&cluster, draft(&cluster, "ring3", 64), Some("node2")).await;
    let (plain, ring3) = (plain.expect("runs"), ring3.expect("runs"));
    assert_eq!(plain.record().kvm, Some(KvmKind::Hardware));
    assert_eq!(ring3.record().kvm, Some(KvmKind::Software));

    for (vm, to, words) in [
        (
            "plain",
            "node2",
            "its KVM has no hardware virtualization, and the VM was started with it",
        ),
        (
            "ring3",
            "node1",
            "its KVM has hardware virtualization, and the VM was started without",
        ),
    ] {
        let request = MigrateVmRequest {
            vm: vm.to_owned(),
            to_node: to.to_owned(),
            policy: None,
        };
        let refused = api(&cluster).migrate_vm(Request::new(request)).await;
        let refused = refused.map(drop).expect_err("the other kind");
        let expected = format!("VM {vm} does not fit on {to}: {words}");
        assert!(refused.message().starts_with(&expected), "{refused}");
    }
    assert!(
        list(&cluster, ListMigrationsRequest::default()).await.is_empty(),
        "nothing was started"
    );
    let why = ExplainVmRequest {
        vm: "plain".to_owned(),
        limit: 0,
    };
    let why = api(&cluster).explain_vm(Request::new(why)).await;
    let nodes = why.expect("explained").into_inner().nodes;
    let other_kind = nodes
        .iter()
        .all(|node| node.rejected.contains("the VM was started with it"));
    assert!(nodes.len() == 2 && other_kind, "{nodes:?}");
    migrate(&cluster, "ring3", "node3").await;
    assert_eq!(ring3.record().node.as_str(), "node3");

    // The next scheduler knows it as well.
    drop((plain, ring3));
    cluster.restart().await;
    let (plain, ring3) = (shown(&cluster, "plain").await, shown(&cluster, "ring3").await);
    assert_eq!(
        (plain.kvm(), plain.ring3_kernel),
        (cluster::KvmKind::Hardware, false)
    );
    assert_eq!(
        (ring3.kvm(), ring3.ring3_kernel),
        (cluster::KvmKind::Software, true)
    );
}

#[tokio::test]
async fn what_no_kernel_can_do_is_refused_at_once_also_with_a_queue() {
    let cluster = two_kinds(3).await;
    let unplaced = |placed: Result<Arc<VmEntry>, LaunchError>| placed.expect_err("no kernel").to_string();
    let only_hardware = || VmRecord {
        software_kvm: None,
        kernel: None,
        ..draft(&cluster, "none", 64)
    };
    let refused = unplaced(run(&cluster, only_hardware(), None).await);
    let words = "node2: its KVM has no hardware virtualization, and image linux has no kernel for that ([software_kvm] kernel in image.toml)";
    assert!(refused.contains(words), "{refused}");
    let wide = || VmRecord {
        cpus: 2,
        kernel: None,
        ..draft(&cluster, "wide", 64)
    };
    let refused = queue::enqueue(&cluster.scheduler, wide(), None).await;
    let refused = refused.expect_err("there is no use in waiting").to_string();
    assert!(
        refused.contains("node2: image linux runs with 1 CPU where KVM has no hardware virtualization"),
        "{refused}"
    );
    assert!(cluster.scheduler.queue.is_empty());
    let on_hardware = VmRecord {
        cpus: 2,
        ..draft(&cluster, "wide", 64)
    };
    let ran = run(&cluster, on_hardware.clone(), None).await.expect("runs");
    assert_eq!(ran.record().node.as_str(), "node1");
    let another = VmRecord {
        name: "wide2".parse().expect("a name"),
        memory_bytes: 1000 * MIB,
        ..on_hardware
    };
    let waits = queue::enqueue(&cluster.scheduler, another, None).await;
    waits.expect("node1 may have room later");
}

#[tokio::test]
async fn one_that_begins_anew_may_take_the_other_kind() {
    let cluster = two_kinds(2).await;
    let mut low = draft(&cluster, "low", 1000);
    (low.wishes.priority, low.wishes.preemptible) = (2, true);
    let low = run(&cluster, low, None).await.expect("runs");
    assert_eq!(low.record().kvm, Some(KvmKind::Hardware));
    let busy = run(&cluster, draft(&cluster, "busy", 1000), None)
        .await
        .expect("runs");
    assert_eq!(busy.record().node.as_str(), "node2");
    let mut high = draft(&cluster, "high", 900);
    high.wishes.priority = 8;
    run(&cluster, high, None).await.expect("it gets the room of low");
    let waits = &cluster.scheduler.queue.list()[0].record.vm;
    assert_eq!((waits.name.to_string().as_str(), waits.kvm), ("low", None));

    let remove = RemoveVmRequest {
        vm: "busy".to_owned(),
        force: true,
    };
    api(&cluster)
        .remove_vm(Request::new(remove))
        .await
        .expect("removed");
    cluster.report();
    queue::advance(&cluster.scheduler).await;
    until("low to begin anew", || {
        let low = cluster.scheduler.vms.find("low");
        low.is_some_and(|low| low.record().phase == Phase::Running)
    })
    .await;
    let low = shown(&cluster, "low").await;
    assert_eq!(
        (low.node.as_str(), low.kvm(), low.ring3_kernel),
        ("node2", cluster::KvmKind::Software, true)
    );
}

#[tokio::test]
async fn a_node_tells_its_kind_when_it_registers() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let record = cluster.nodes[0].record.clone();
    let register = |software_kvm, trouble: &str| shoal_proto::node::Register {
        node: record.name.to_string(),
        address: record.address.clone(),
        cpus: 4,
        memory_bytes: 1 << 30,
        software_kvm,
        kvm_trouble: trouble.to_owned(),
        ..Default::default()
    };
    for (software, trouble, kind) in [
        (Some(false), "", cluster::KvmKind::Hardware),
        (Some(true), "interrupts do not arrive", cluster::KvmKind::Software),
        (None, "/dev/kvm: no such file", cluster::KvmKind::Unspecified),
    ] {
        let (sender, _) = tokio::sync::mpsc::channel(1);
        let register = register(software, trouble);
        let begun = crate::registry::begin(&cluster.scheduler, &register, 2, sender).await;
        begun.expect("registered");
        let nodes = api(&cluster).list_nodes(Request::new(ListNodesRequest {})).await;
        let node = nodes.expect("listed").into_inner().nodes.remove(0);
        assert_eq!((node.kvm(), node.kvm_trouble.as_str()), (kind, trouble));
    }
    cluster.report();
    let refused = run(&cluster, draft(&cluster, "a", 64), None).await;
    let refused = refused.expect_err("no KVM").to_string();
    assert!(
        refused.contains("its KVM cannot be used: /dev/kvm: no such file"),
        "{refused}"
    );
}
