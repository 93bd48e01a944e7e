//! Suspend and resume, against scripted nodes.

use shoal_proto::cluster::{GetVmRequest, RebalanceRequest, ResumeVmRequest, SuspendVmRequest, Vm};

use super::*;
use crate::observe;

async fn suspend(cluster: &Cluster, reason: &str) -> Result<Vm, Status> {
    let request = SuspendVmRequest {
        vm: "a".to_owned(),
        reason: reason.to_owned(),
    };
    let answer = api(cluster).suspend_vm(Request::new(request)).await?;
    Ok(answer.into_inner())
}

async fn resume(cluster: &Cluster) -> Result<Vm, Status> {
    let request = ResumeVmRequest { vm: "a".to_owned() };
    let answer = api(cluster).resume_vm(Request::new(request)).await?;
    Ok(answer.into_inner())
}

/// Reports until as many VMs run as should.
async fn until_running(cluster: &Cluster, wanted: usize) {
    until("the nodes to do what is stored", || {
        cluster.report();
        cluster.nodes[0].running() == wanted
    })
    .await;
}

#[tokio::test]
async fn a_suspended_vm_says_why_and_stays_so_over_a_new_scheduler() {
    let mut cluster = Cluster::start(2, 1 << 30).await;
    start(&cluster, "a").await;
    let vm = suspend(&cluster, "lunch").await.expect("suspended");
    assert_eq!(
        (vm.phase(), vm.message.as_str()),
        (VmPhase::Suspended, "asked for by a user: lunch")
    );
    assert!(vm.suspension.is_some_and(|why| why.since_unix_ms > 0));
    assert_eq!(cluster.nodes[0].running(), 0);

    cluster.restart().await;
    let again = suspend(&cluster, "other words").await.expect("it is so already");
    assert_eq!(again.message, "asked for by a user: lunch");
    let request = ExplainVmRequest {
        vm: "a".to_owned(),
        limit: 0,
    };
    let explained = api(&cluster).explain_vm(Request::new(request)).await;
    let verdict = explained.expect("explained").into_inner().verdict;
    assert!(verdict.contains("asked for by a user: lunch"), "{verdict}");
    let seen = observe::snapshot(&cluster.scheduler);
    assert_eq!((seen.vms[0].suspended, seen.vms[0].cannot_move), (true, None));

    let vm = resume(&cluster).await.expect("resumed");
    assert_eq!((vm.phase(), vm.suspension), (VmPhase::Running, None));
    assert_eq!(cluster.nodes[0].running(), 1);
    let resumed = cluster.nodes[0].resumed();
    resume(&cluster).await.expect("it runs already");
    assert_eq!(cluster.nodes[0].resumed(), resumed);
    migrate(&cluster, "a", "node2").await;
}

/// Where VM `a` is and what it does.
async fn place(cluster: &Cluster) -> (String, VmPhase) {
    let request = GetVmRequest { vm: "a".to_owned() };
    let vm = api(cluster).get_vm(Request::new(request)).await;
    let vm = vm.expect("it is known").into_inner();
    (vm.node.clone(), vm.phase())
}

fn running(cluster: &Cluster) -> [usize; 2] {
    [cluster.nodes[0].running(), cluster.nodes[1].running()]
}

#[tokio::test]
async fn a_suspended_vm_is_suspended_whatever_becomes_of_its_move() {
    for (script, node) in [
        (Script::Complete, "node2"),
        (Script::Fail, "node1"),
        (Script::InDoubt { commit_arrives: true }, "node2"),
        (
            Script::InDoubt {
                commit_arrives: false,
            },
            "node1",
        ),
    ] {
        let cluster = Cluster::start(2, 1 << 30).await;
        start(&cluster, "a").await;
        suspend(&cluster, "").await.expect("suspended");
        cluster.nodes[0].set_script(script.clone());
        migrate(&cluster, "a", "node2").await;
        cluster.report();
        assert_eq!(
            (place(&cluster).await, running(&cluster)),
            ((node.to_owned(), VmPhase::Suspended), [0, 0]),
            "{script:?}"
        );
        resume(&cluster).await.expect("resumed");
        let expected = if node == "node1" { [1, 0] } else { [0, 1] };
        assert_eq!(running(&cluster), expected, "{script:?}");
    }
}

#[tokio::test]
async fn a_new_scheduler_ends_the_move_of_a_suspended_vm_with_one_that_is_suspended() {
    let mut cluster = Cluster::start(2, 1 << 30).await;
    start(&cluster, "a").await;
    suspend(&cluster, "").await.expect("suspended");
    cluster.nodes[0].set_script(Script::GoOn);
    begin(&cluster, "a", MigrationPolicy::default())
        .await
        .expect("begun");
    cluster.restart().await;
    let cancelled = cancel(&cluster, "a").await.expect("taken up, and cancelled");
    let result = cancelled.report.map(|report| report.result());
    assert_eq!(result, Some(MigrationResult::Cancelled));
    cluster.report();
    assert_eq!(
        (place(&cluster).await, running(&cluster)),
        (("node1".to_owned(), VmPhase::Suspended), [0, 0])
    );
}

#[tokio::test]
async fn a_move_is_waited_for_and_what_was_asked_for_holds_where_it_ends() {
    let cluster = Cluster::start(2, 1 << 30).await;
    start(&cluster, "a").await;
    for wanted in [VmPhase::Suspended, VmPhase::Running] {
        cluster.nodes[0].set_script(Script::GoOn);
        begin(&cluster, "a", MigrationPolicy::default())
            .await
            .expect("begun");
        let cancels = async { cancel(&cluster, "a").await.expect("cancelled") };
        let asks = async {
            match wanted {
                VmPhase::Suspended => suspend(&cluster, "").await,
                _ => resume(&cluster).await,
            }
        };
        let (asked, _) = tokio::join!(asks, cancels);
        assert_eq!(asked.expect("done after the move").phase(), wanted);
    }
    assert_eq!(running(&cluster), [1, 0]);
}

#[tokio::test]
async fn a_plan_about_a_vm_that_has_moved_is_not_carried_out() {
    let cluster = Cluster::start(2, 1 << 30).await;
    let vm = start(&cluster, "a").await;
    migrate(&cluster, "a", "node2").await;
    let hold = |node: &str| shoal_plan::Hold {
        vm: shoal_plan::VmId::new(&vm.record().id.to_string()),
        node: shoal_plan::NodeName::new(node),
        growth: shoal_plan::BytesPerSecond(4096),
        reason: format!("no room on {node}"),
    };
    // What comes second is the one that is carried out.
    let plan = shoal_plan::Plan {
        suspend: vec![hold("node1"), hold("node2")],
        ..shoal_plan::Plan::default()
    };
    crate::execute::suspend::begin_planned(&cluster.scheduler, &plan);
    until("the plan to be carried out", || cluster.nodes[1].running() == 0).await;
    let suspended = vm.record().suspended.clone();
    assert_eq!(
        suspended.map(|why| why.reason).as_deref(),
        Some("no room on node2")
    );
}

#[tokio::test]
async fn what_a_node_was_not_told_it_is_told_later() {
    let cluster = Cluster::start(1, 1 << 30).await;
    start(&cluster, "a").await;
    cluster.nodes[0].set_silent(true);
    let error = suspend(&cluster, "").await.expect_err("no answer");
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(cluster.nodes[0].running(), 1);
    cluster.nodes[0].set_silent(false);
    until_running(&cluster, 0).await;

    cluster.nodes[0].set_silent(true);
    let error = resume(&cluster).await.expect_err("no answer");
    assert_eq!(error.code(), Code::Unavailable);
    cluster.nodes[0].set_silent(false);
    until_running(&cluster, 1).await;
}

#[tokio::test]
async fn what_cannot_be_suspended_is_refused_and_nothing_changes() {
    let cluster = Cluster::start(2, 1 << 30).await;
    let vm = start(&cluster, "a").await;
    let error = suspend(&cluster, &"long".repeat(100))
        .await
        .expect_err("too long");
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("reason: "), "{error}");

    assert_eq!(vm.record().suspended, None);
    let stop = StopVmRequest { vm: "a".to_owned() };
    let api = api(&cluster);
    api.stop_vm(Request::new(stop)).await.expect("stopped");
    let error = suspend(&cluster, "").await.expect_err("it has ended");
    assert_eq!(error.code(), Code::FailedPrecondition);
    let error = resume(&cluster).await.expect_err("it has ended");
    assert!(error.message().contains("cannot be resumed"), "{error}");
}

#[tokio::test]
async fn a_suspended_vm_can_be_stopped() {
    let cluster = Cluster::start(1, 1 << 30).await;
    start(&cluster, "a").await;
    suspend(&cluster, "").await.expect("suspended");
    let stop = StopVmRequest { vm: "a".to_owned() };
    let stopped = api(&cluster).stop_vm(Request::new(stop)).await.expect("stopped");
    let vm = stopped.into_inner();
    assert_eq!((vm.phase(), vm.suspension), (VmPhase::Exited, None));
}

#[tokio::test]
async fn a_plan_takes_back_what_a_plan_suspended_and_not_what_a_user_did() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let vm = start(&cluster, "a").await;
    let hold = shoal_plan::Hold {
        vm: shoal_plan::VmId::new(&vm.record().id.to_string()),
        node: shoal_plan::NodeName::new("node1"),
        growth: shoal_plan::BytesPerSecond(4096),
        reason: "no room".to_owned(),
    };
    let (suspends, resumes) = (
        shoal_plan::Plan {
            suspend: vec![hold.clone()],
            ..shoal_plan::Plan::default()
        },
        shoal_plan::Plan {
            resume: vec![hold],
            ..shoal_plan::Plan::default()
        },
    );
    let carry_out = |plan| crate::execute::suspend::begin_planned(&cluster.scheduler, plan);
    carry_out(&suspends);
    until_running(&cluster, 0).await;
    let seen = || observe::snapshot(&cluster.scheduler).vms[0].suspended_growth;
    assert_eq!(seen(), Some(shoal_plan::BytesPerSecond(4096)));
    let dry_run = RebalanceRequest {
        dry_run: true,
        ..RebalanceRequest::default()
    };
    let shown = api(&cluster)
        .rebalance(Request::new(dry_run))
        .await
        .expect("planned");
    let shown = shown.into_inner();
    let holds = shown.holds.iter();
    let holds: Vec<_> = holds
        .map(|hold| (hold.action.as_str(), hold.vm.as_str(), hold.node.as_str()))
        .collect();
    assert_eq!(holds, [("resume", "a", "node1")]);
    assert_eq!(shown.summary, "nothing to move; 1 to resume");
    carry_out(&resumes);
    until_running(&cluster, 1).await;

    carry_out(&suspends);
    until_running(&cluster, 0).await;
    let mine = suspend(&cluster, "mine").await.expect("it is so already");
    assert_eq!(mine.message, "asked for by a user: mine");
    assert_eq!(seen(), None, "no plan resumes it");
    carry_out(&resumes);
    // The call after it has the VM's lock after the plan had it.
    suspend(&cluster, "mine").await.expect("it is so still");
    assert_eq!(cluster.nodes[0].running(), 0);
    resume(&cluster).await.expect("resumed");
    assert_eq!(cluster.nodes[0].running(), 1);
}
