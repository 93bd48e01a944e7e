//! Slots of the queue, nodes that are asked for or preferred, and nodes that one VM has for itself, against scripted nodes of 4
//! CPUs.

use shoal_proto::cluster::{GetVmRequest, Rules, RunVmRequest, Vm};

use super::*;
use crate::record::{ImageRecord, Phase};

/// A cluster with an image of one CPU and 64 MiB.
async fn cluster(nodes: usize) -> Cluster {
    let cluster = Cluster::start(nodes, 1 << 30).await;
    add_image(&cluster);
    cluster.report();
    cluster
}

/// Another scheduler goes on with what is stored, which the image is not.
async fn restart(cluster: &mut Cluster) {
    cluster.restart().await;
    add_image(cluster);
    cluster.report();
}

fn add_image(cluster: &Cluster) {
    let like = cluster.draft("image", 64 * MIB);
    cluster.scheduler.images.insert(Arc::new(ImageRecord {
        name: "probe".to_owned(),
        digest: String::new(),
        kernel: like.kernel,
        initrd: None,
        cmdline: String::new(),
        software_kvm: None,
        cpus: 1,
        max_cpus: None,
        memory_bytes: 64 * MIB,
        created_unix_ms: 0,
    }));
}

async fn run(cluster: &Cluster, name: &str, request: RunVmRequest) -> Result<Vm, Status> {
    let request = RunVmRequest {
        image: "probe".to_owned(),
        name: name.to_owned(),
        ..request
    };
    let answer = api(cluster).run_vm(Request::new(request)).await;
    cluster.report();
    answer.map(tonic::Response::into_inner)
}

async fn shown(cluster: &Cluster, vm: &str) -> Vm {
    let request = GetVmRequest { vm: vm.to_owned() };
    let answer = api(cluster).get_vm(Request::new(request)).await;
    answer.expect("there").into_inner()
}

/// Whatever is queued starts as room allows, until a VM runs.
async fn until_runs(cluster: &Cluster, name: &str) {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        cluster.report();
        queue::advance(&cluster.scheduler).await;
        let found = cluster.scheduler.vms.find(name);
        if found.is_some_and(|vm| vm.record().phase == Phase::Running) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{name} does not run");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

async fn stop(cluster: &Cluster, name: &str) {
    let request = StopVmRequest { vm: name.to_owned() };
    let stopped = api(cluster).stop_vm(Request::new(request)).await;
    stopped.expect("stopped");
    cluster.report();
}

fn queued() -> RunVmRequest {
    RunVmRequest {
        queue: true,
        ..RunVmRequest::default()
    }
}

#[tokio::test]
async fn the_queue_starts_as_many_as_there_are_cpus_and_the_next_when_one_has_ended() {
    let mut cluster = cluster(2).await;
    let mut waiting = Vec::new();
    for number in 0..10 {
        let vm = run(&cluster, &format!("job{number}"), queued())
            .await
            .expect("taken");
        if vm.phase() == VmPhase::Pending {
            waiting.push(vm);
        }
    }
    let names: Vec<&str> = waiting.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["job8", "job9"]);
    let why = &waiting[0].message;
    assert!(
        why.starts_with("place 1 in the queue: nothing fits: node1: 4 vCPUs declared there")
            && why.contains("its 4 slots for the queue"),
        "{why}"
    );
    // Whoever does not queue takes what the overcommit allows; it does not wait.
    let now = run(&cluster, "now", RunVmRequest::default())
        .await
        .expect("taken");
    assert_eq!(now.phase(), VmPhase::Running);
    stop(&cluster, "now").await;

    // By what rule they wait is known to the next scheduler, too.
    restart(&mut cluster).await;
    stop(&cluster, "job3").await;
    until_runs(&cluster, "job8").await;
    cluster.report();
    queue::advance(&cluster.scheduler).await;
    assert_eq!(shown(&cluster, "job9").await.phase(), VmPhase::Pending);
    stop(&cluster, "job0").await;
    until_runs(&cluster, "job9").await;
}

#[tokio::test]
async fn what_can_never_fit_does_not_wait() {
    let cluster = cluster(2).await;
    for (request, words) in [
        (
            RunVmRequest { cpus: 5, ..queued() },
            "it has 4 CPUs, the VM asks for 5",
        ),
        (
            RunVmRequest {
                memory_bytes: 2 << 30,
                ..queued()
            },
            "2 GiB more would pass its limit of 1536 MiB declared memory",
        ),
    ] {
        let refused = run(&cluster, "large", request).await.expect_err("too large");
        assert_eq!(refused.code(), Code::ResourceExhausted);
        let message = refused.message();
        assert!(
            message.starts_with(
                "nothing fits, even if every node were empty and took 4 vCPUs and 1382 MiB: node1: "
            ),
            "{message}"
        );
        assert!(message.contains(words), "{message}");
    }
    assert!(cluster.scheduler.queue.is_empty());
}

#[tokio::test]
async fn a_vm_stays_on_the_node_that_was_asked_for_until_it_is_unlocked() {
    let mut cluster = cluster(2).await;
    let on = |node: &str| RunVmRequest {
        node: node.to_owned(),
        ..RunVmRequest::default()
    };
    let vm = run(&cluster, "a", on("node1")).await.expect("started");
    assert_eq!(
        (vm.node.as_str(), vm.locked, vm.pinned.as_str()),
        ("node1", true, "node1")
    );
    restart(&mut cluster).await;
    let words = "it is locked to its node by --node: `shoal unlock` it first";
    let refused = begin(&cluster, "a", MigrationPolicy::default()).await;
    let text = refused.expect_err("locked").message().to_owned();
    assert!(text.ends_with(words), "{text}");
    let explain = ExplainVmRequest {
        vm: "a".to_owned(),
        limit: 0,
    };
    let why = api(&cluster).explain_vm(Request::new(explain)).await;
    assert_eq!(
        why.expect("explained").into_inner().verdict,
        format!("stays: {words}")
    );

    let unlock = UpdateVmRequest {
        vm: "a".to_owned(),
        locked: Some(false),
        priority: None,
    };
    let vm = api(&cluster).update_vm(Request::new(unlock)).await;
    let vm = vm.expect("unlocked").into_inner();
    assert_eq!((vm.locked, vm.pinned.as_str()), (false, ""));
    let entry = cluster.scheduler.vms.find("a").expect("there");
    assert_eq!(entry.record().runs.pinned, None, "nor is it when it begins anew");
    migrate(&cluster, "a", "node2").await;
    assert_eq!(entry.record().node.as_str(), "node2");
}

#[tokio::test]
async fn one_that_prefers_a_node_starts_there_or_elsewhere_and_may_be_moved() {
    let cluster = cluster(2).await;
    let prefers = |cpus, node: &str| RunVmRequest {
        cpus,
        prefer_node: node.to_owned(),
        ..RunVmRequest::default()
    };
    let first = run(&cluster, "first", prefers(4, "node2"))
        .await
        .expect("started");
    assert_eq!((first.node.as_str(), first.locked), ("node2", false));
    let both = RunVmRequest {
        node: "node1".to_owned(),
        ..prefers(1, "node2")
    };
    let refused = run(&cluster, "both", both).await.expect_err("a contradiction");
    assert!(refused.message().starts_with("prefer_node: "), "{refused}");
    let refused = run(&cluster, "gone", prefers(1, "node9"))
        .await
        .expect_err("unknown");
    assert_eq!(refused.code(), Code::NotFound);

    // As a job it takes the other node's slots, since those of node2 are taken.
    let job = RunVmRequest {
        queue: true,
        ..prefers(4, "node2")
    };
    let job = run(&cluster, "job", job).await.expect("started");
    assert_eq!(job.node, "node1");
    let placement = &cluster
        .scheduler
        .vms
        .find("job")
        .expect("there")
        .record()
        .placement;
    assert!(
        placement.starts_with("node2 was preferred, and there 4 vCPUs"),
        "{placement}"
    );
    // One for a certain node waits for that one, although the other has room first.
    let pinned = RunVmRequest {
        node: "node2".to_owned(),
        ..queued()
    };
    let waits = run(&cluster, "waits", pinned).await.expect("taken");
    assert_eq!(
        (waits.phase(), waits.pinned.as_str()),
        (VmPhase::Pending, "node2")
    );
    stop(&cluster, "job").await;
    queue::advance(&cluster.scheduler).await;
    assert_eq!(shown(&cluster, "waits").await.phase(), VmPhase::Pending);
    stop(&cluster, "first").await;
    until_runs(&cluster, "waits").await;
    assert_eq!(shown(&cluster, "waits").await.node, "node2");
}

#[tokio::test]
async fn a_node_for_itself_is_a_rule_that_is_stored() {
    let mut cluster = cluster(1).await;
    let alone = RunVmRequest {
        rules: Some(Rules {
            exclusive: true,
            ..Rules::default()
        }),
        ..RunVmRequest::default()
    };
    let vm = run(&cluster, "alone", alone.clone()).await.expect("started");
    assert!(vm.rules.is_some_and(|rules| rules.exclusive));
    restart(&mut cluster).await;
    let refused = run(&cluster, "other", RunVmRequest::default()).await;
    let refused = refused.expect_err("it is alone there");
    assert!(
        refused.message().contains("node1: 'alone' has it for itself"),
        "{refused}"
    );
    stop(&cluster, "alone").await;
    run(&cluster, "other", RunVmRequest::default())
        .await
        .expect("started");
    let refused = run(&cluster, "again", alone).await.expect_err("it is not empty");
    assert!(
        refused
            .message()
            .contains("1 VMs are there, and the VM is to have a node for itself"),
        "{refused}"
    );
}

#[tokio::test]
async fn who_waits_for_one_that_is_taken_out_of_the_queue_hears_of_it() {
    let cluster = cluster(1).await;
    let whole = RunVmRequest { cpus: 4, ..queued() };
    run(&cluster, "whole", whole).await.expect("started");
    run(&cluster, "waits", queued()).await.expect("taken");
    let request = GetVmRequest {
        vm: "waits".to_owned(),
    };
    let api = api(&cluster);
    let (watched, ()) = tokio::join!(api.wait_vm(Request::new(request)), async {
        let remove = RemoveVmRequest {
            vm: "waits".to_owned(),
            force: false,
        };
        api.remove_vm(Request::new(remove)).await.expect("taken out");
    });
    let ended = watched.expect("it is told").into_inner();
    assert_eq!(
        (ended.phase(), ended.message.as_str()),
        (VmPhase::Failed, "taken out of the queue")
    );
}
