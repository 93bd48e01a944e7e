use shoal_cpuid::Entry;
use shoal_plan as plan;
use shoal_proto::node::Register;
use tokio::sync::mpsc;

use super::*;
use crate::execute::launch;
use crate::observe;
use crate::record::VmRecord;
use crate::testing::Cluster;

const AVX2: u32 = 1 << 5;
const AVX512F: u32 = 1 << 16;

fn cpu(vendor: u32, ebx: u32) -> Table {
    let leaf = |function, ebx| Entry {
        function,
        ebx,
        ..Entry::default()
    };
    vec![leaf(0, vendor), leaf(7, ebx)].into()
}

const INTEL: u32 = 0x756e_6547;
const AMD: u32 = 0x6874_7541;

/// Each node tells its CPU, as its agent does when it registers.
async fn tell(cluster: &Cluster, cpus: &[Table]) {
    tell_msrs(cluster, cpus, &[]).await;
}

/// And the MSRs that it saves, as far as there are lists of them.
async fn tell_msrs(cluster: &Cluster, cpus: &[Table], msrs: &[&[u32]]) {
    for (number, (node, cpu)) in cluster.nodes.iter().zip(cpus).enumerate() {
        let register = Register {
            node: node.record.name.to_string(),
            address: node.record.address.clone(),
            cpus: node.record.cpus,
            memory_bytes: node.record.memory_bytes,
            cpuid: cpu.to_bytes(),
            msrs: msrs.get(number).map_or_else(Vec::new, |msrs| msrs.to_vec()),
            ..Register::default()
        };
        let (sender, _) = mpsc::channel(1);
        crate::registry::begin(&cluster.scheduler, &register, 7, sender)
            .await
            .expect("registered");
        node.report(&cluster.scheduler);
    }
}

async fn run(cluster: &Cluster, name: &str, node: usize) -> Arc<VmRecord> {
    let node = cluster.nodes[node].record.name.clone();
    let draft = cluster.draft(name, 64 << 20);
    let (entry, guard) = launch::submit(&cluster.scheduler, draft, Some(&node))
        .await
        .expect("placed");
    launch::start(&cluster.scheduler, &entry, &guard)
        .await
        .expect("started");
    drop(guard);
    cluster.report();
    entry.record()
}

fn may_move(cluster: &Cluster, vm: &VmRecord, to: &str) -> Result<(), String> {
    let scheduler = &cluster.scheduler;
    let (id, to) = (plan::VmId::new(&vm.id.to_string()), plan::NodeName::new(to));
    let place = plan::place_migration(
        &observe::snapshot(scheduler),
        &scheduler.policy.get(),
        &id,
        Some(&to),
    );
    place.map(drop).map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_vm_moves_only_where_its_features_are_unless_it_has_the_baseline() {
    let mut cluster = Cluster::start(2, 1 << 30).await;
    let cpus = [cpu(INTEL, AVX2 | AVX512F), cpu(INTEL, AVX2)];
    tell(&cluster, &cpus).await;
    let wide = run(&cluster, "wide", 0).await;
    let refused = may_move(&cluster, &wide, "node2").expect_err("AVX512F is not there");
    assert!(
        refused.ends_with("its CPU lacks AVX512F, which the VM has"),
        "{refused}"
    );
    let narrow = run(&cluster, "narrow", 1).await;
    assert_eq!(may_move(&cluster, &narrow, "node1"), Ok(()));
    assert!(cluster.scheduler.spec_to_launch(&narrow).cpu_baseline.is_empty());

    let before = view(&cluster.scheduler);
    assert!(!before.applied);
    assert_eq!(before.features, ["AVX2"]);
    apply_baseline(&cluster.scheduler).await.expect("applied");
    let shown = view(&cluster.scheduler);
    assert!(shown.applied);
    assert_eq!(shown.nodes[0].extra_features, ["AVX512F"]);
    assert!(shown.nodes.iter().all(|node| node.missing_features.is_empty()));
    let common = run(&cluster, "common", 0).await;
    assert_eq!(may_move(&cluster, &common, "node2"), Ok(()));
    let told = cluster.scheduler.spec_to_launch(&common).cpu_baseline;
    assert_eq!(
        Table::from_bytes(&told).expect("a table"),
        cpus[1].features_only()
    );
    assert!(
        may_move(&cluster, &wide, "node2").is_err(),
        "it keeps what it has"
    );

    cluster.restart().await;
    tell(&cluster, &cpus).await;
    assert_eq!(view(&cluster.scheduler), shown);
    assert!(may_move(&cluster, &wide, "node2").is_err());
    assert_eq!(cluster.scheduler.spec_to_launch(&common).cpu_baseline, told);
    clear_baseline(&cluster.scheduler).await.expect("cleared");
    assert!(!view(&cluster.scheduler).applied);
}

#[tokio::test]
async fn a_vm_moves_only_where_its_msrs_are_saved() {
    const TSC: u32 = 0x10;
    const XSS: u32 = 0xda0;
    const LSTAR: u32 = 0xc000_0082;
    let cluster = Cluster::start(3, 1 << 30).await;
    let cpus = [cpu(INTEL, AVX2), cpu(INTEL, AVX2), cpu(INTEL, AVX2)];
    // What no guest without XSAVES has is not missed, in whatever order they are told.
    tell_msrs(&cluster, &cpus, &[&[TSC, XSS, LSTAR], &[LSTAR, TSC], &[TSC]]).await;
    let vm = run(&cluster, "vm", 0).await;
    assert_eq!(may_move(&cluster, &vm, "node2"), Ok(()));
    let refused = may_move(&cluster, &vm, "node3").expect_err("LSTAR is not there");
    assert!(
        refused.ends_with("its CPU lacks MSR 0xc0000082 (SYSCALL), which the VM has"),
        "{refused}"
    );
    // A VM needs what is saved where it is.
    let small = run(&cluster, "small", 2).await;
    assert_eq!(may_move(&cluster, &small, "node1"), Ok(()));
    // Of an agent that does not tell nothing is said.
    tell_msrs(&cluster, &cpus, &[&[TSC, XSS, LSTAR], &[LSTAR, TSC], &[]]).await;
    assert_eq!(may_move(&cluster, &vm, "node3"), Ok(()));

    apply_baseline(&cluster.scheduler).await.expect("applied");
    tell_msrs(&cluster, &cpus, &[&[TSC, LSTAR], &[TSC], &[TSC]]).await;
    let common = run(&cluster, "common", 1).await;
    assert_eq!(may_move(&cluster, &common, "node3"), Ok(()));
}

#[tokio::test]
async fn too_many_msrs_are_refused_at_registration() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let register = Register {
        node: "node1".to_owned(),
        address: cluster.nodes[0].record.address.clone(),
        cpus: 1,
        memory_bytes: 1,
        msrs: vec![1; 4097],
        ..Register::default()
    };
    let (sender, _) = mpsc::channel(1);
    let refused = crate::registry::begin(&cluster.scheduler, &register, 7, sender).await;
    let refused = refused.expect_err("too many");
    assert_eq!(refused.message(), "msrs: 4097, at most 4096");
}

#[tokio::test]
async fn a_node_that_lacks_the_baseline_gets_no_new_vms_of_it() {
    let cluster = Cluster::start(2, 1 << 30).await;
    tell(&cluster, &[cpu(INTEL, AVX2), cpu(INTEL, AVX2)]).await;
    apply_baseline(&cluster.scheduler).await.expect("applied");
    tell(&cluster, &[cpu(INTEL, AVX2), cpu(INTEL, AVX512F)]).await;
    let shown = view(&cluster.scheduler);
    assert_eq!(shown.nodes[1].missing_features, ["AVX2"]);
    let node2 = cluster.nodes[1].record.name.clone();
    let draft = cluster.draft("vm", 64 << 20);
    let refused = launch::submit(&cluster.scheduler, draft, Some(&node2))
        .await
        .expect_err("AVX2 is not there");
    assert!(refused.to_string().contains("lacks AVX2"), "{refused}");
}

#[tokio::test]
async fn there_is_no_baseline_of_nothing_or_of_two_vendors() {
    let cluster = Cluster::start(2, 1 << 30).await;
    assert!(matches!(
        apply_baseline(&cluster.scheduler).await,
        Err(BaselineError::NoNodes)
    ));
    tell(&cluster, &[cpu(INTEL, AVX2), cpu(AMD, AVX2)]).await;
    let refused = apply_baseline(&cluster.scheduler).await;
    assert!(matches!(refused, Err(BaselineError::Vendors { .. })));
    assert!(!view(&cluster.scheduler).applied);
}

#[tokio::test]
async fn a_malformed_table_is_refused_at_registration() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let register = Register {
        node: "node1".to_owned(),
        address: cluster.nodes[0].record.address.clone(),
        cpus: 1,
        memory_bytes: 1,
        cpuid: vec![0; 41],
        ..Register::default()
    };
    let (sender, _) = mpsc::channel(1);
    let refused = crate::registry::begin(&cluster.scheduler, &register, 7, sender).await;
    assert!(refused.expect_err("no table").message().starts_with("cpuid: "));
}
