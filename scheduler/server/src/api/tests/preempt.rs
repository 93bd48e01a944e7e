//! VMs that are stopped for others, and begin anew, against scripted nodes.

use shoal_proto::cluster::{GetVmRequest, QueuedVm, StreamLogsRequest, Vm};

use super::*;
use crate::api::run_vm::run_now;
use crate::execute::launch::LaunchError;
use crate::observe;
use crate::record::{Outcome, Phase, VmRecord};

/// A VM to be. A node has 1 GiB and lends one and a half times as much.
fn draft(cluster: &Cluster, name: &str, mib: u64, priority: u32, preemptible: bool) -> VmRecord {
    let mut draft = cluster.draft(name, mib * MIB);
    draft.wishes.priority = priority;
    draft.wishes.preemptible = preemptible;
    draft
}

async fn run(cluster: &Cluster, draft: VmRecord) -> Result<Arc<VmEntry>, LaunchError> {
    let ran = run_now(&cluster.scheduler, draft, None).await;
    cluster.report();
    ran
}

async fn low(cluster: &Cluster) -> Arc<VmEntry> {
    let low = run(cluster, draft(cluster, "low", 1000, 2, true)).await;
    low.expect("it has all the room there is")
}

async fn vm(cluster: &Cluster, name: &str) -> Vm {
    let answer = api(cluster).list_vms(Request::new(ListVmsRequest {})).await;
    let vms = answer.expect("listed").into_inner().vms;
    let mut found = vms.into_iter().filter(|vm| vm.name == name);
    let vm = found.next().expect("there");
    assert_eq!(found.next(), None, "once");
    vm
}

async fn queued(cluster: &Cluster) -> Vec<QueuedVm> {
    let answer = api(cluster).list_queue(Request::new(ListQueueRequest {})).await;
    answer.expect("listed").into_inner().vms
}

fn names(queued: &[QueuedVm]) -> Vec<&str> {
    queued.iter().map(|vm| vm.name.as_str()).collect()
}

async fn stop(cluster: &Cluster, name: &str) -> Result<Vm, Status> {
    let request = StopVmRequest { vm: name.to_owned() };
    let answer = api(cluster).stop_vm(Request::new(request)).await?;
    Ok(answer.into_inner())
}

async fn remove(cluster: &Cluster, name: &str, force: bool) {
    let request = RemoveVmRequest {
        vm: name.to_owned(),
        force,
    };
    let removed = api(cluster).remove_vm(Request::new(request)).await;
    removed.expect("removed");
}

async fn console(cluster: &Cluster, name: &str) -> Result<String, Status> {
    let request = StreamLogsRequest {
        vm: name.to_owned(),
        follow: false,
        from_offset: 0,
    };
    let stream = api(cluster).stream_logs(Request::new(request)).await?;
    let pieces: Vec<_> = stream.into_inner().collect().await;
    let data = pieces.into_iter().flat_map(|piece| piece.expect("readable").data);
    Ok(String::from_utf8(data.collect()).expect("text"))
}

/// Has `high` ask for the room of `low` while the node does not answer: who gives way is stored, and nothing is done yet.
async fn decide(cluster: &Cluster) {
    cluster.nodes[0].set_silent(true);
    let high = draft(cluster, "high", 900, 8, false);
    let scheduler = Arc::clone(&cluster.scheduler);
    tokio::spawn(async move { run_now(&scheduler, high, None).await });
    until("it to be decided", || {
        let low = cluster.scheduler.vms.find("low").expect("there");
        low.record().giving_way.is_some() && low.try_lock().is_some()
    })
    .await;
}

/// What the node reports is acted on until a VM runs.
async fn until_runs(cluster: &Cluster, name: &str) {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        cluster.report();
        queue::advance(&cluster.scheduler).await;
        let found = cluster.scheduler.vms.find(name);
        if found.is_some_and(|vm| vm.record().phase == Phase::Running) {
            return cluster.report();
        }
        assert!(tokio::time::Instant::now() < deadline, "{name} does not run");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_higher_priority_gets_the_room_of_one_that_begins_anew_later() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let entry = low(&cluster).await;
    let id = entry.record().id;
    let high = run(&cluster, draft(&cluster, "high", 900, 8, false)).await;
    let high = high.expect("it runs when the answer comes").record();
    assert_eq!((&high.phase, high.runs.preempted), (&Phase::Running, 0));
    assert!(
        high.placement.contains("room was made for it"),
        "{}",
        high.placement
    );
    assert_eq!(cluster.nodes[0].running(), 1);

    let waits = vm(&cluster, "low").await;
    assert_eq!(
        (waits.phase(), waits.id.as_str()),
        (VmPhase::Pending, id.to_string().as_str())
    );
    assert!(waits.preemptible && waits.priority == 2);
    let preempted = waits.preempted.expect("it says so");
    assert_eq!(
        (preempted.times, preempted.by.as_str(), preempted.by_priority),
        (1, "high", 8)
    );
    assert!(
        waits
            .message
            .contains("stopped for others once, the last time for 'high' (priority 8)"),
        "{}",
        waits.message
    );
    let in_queue = queued(&cluster).await;
    assert_eq!(names(&in_queue), ["low"]);
    assert!(in_queue[0].preempted.is_some());
    let events = cluster.scheduler.events.after(0);
    let told = events
        .iter()
        .find(|event| event.kind == "vm-preempted")
        .expect("told");
    assert_eq!((told.vm.as_str(), told.node.as_str()), ("low", "node1"));
    assert!(
        told.message
            .starts_with("'high' (priority 8, 900 MiB declared) fits nowhere;"),
        "{}",
        told.message
    );
    let error = stop(&cluster, "low").await.expect_err("it does not run");
    assert_eq!(error.code(), Code::FailedPrecondition);

    stop(&cluster, "high").await.expect("stopped");
    until_runs(&cluster, "low").await;
    assert_eq!(queued(&cluster).await, []);
    let again = entry.record();
    assert_eq!(
        (again.epoch.0, again.last_epoch.0, again.fenced_through.0),
        (2, 2, 1)
    );
    assert_eq!(cluster.nodes[0].epochs_of(id), [2]);
    assert_eq!(vm(&cluster, "low").await.preempted.expect("it says so").times, 1);
}

#[tokio::test]
async fn nobody_is_stopped_who_is_not_marked_or_not_lower() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let entry = low(&cluster).await;
    let ask = |priority| run(&cluster, draft(&cluster, "other", 900, priority, false));
    for priority in [0, 2] {
        let refused = ask(priority).await.expect_err("nothing fits");
        assert!(matches!(refused, LaunchError::Place(_)), "{refused}");
    }
    let policy = |value: &str| {
        let values = [("preempt".to_owned(), value.to_owned())];
        SetPolicyRequest {
            values: values.into(),
            reset: Vec::new(),
        }
    };
    let api = api(&cluster);
    api.set_policy(Request::new(policy("off"))).await.expect("set");
    assert!(ask(9).await.is_err());
    api.set_policy(Request::new(policy("on"))).await.expect("set");
    let record = entry.record();
    let mut wishes = record.wishes.clone();
    wishes.preemptible = false;
    let unmarked = VmRecord {
        wishes,
        ..record.as_ref().clone()
    };
    cluster
        .scheduler
        .save_vm(unmarked, Vec::new())
        .await
        .expect("stored");
    assert!(ask(9).await.is_err());
    assert_eq!((cluster.nodes[0].running(), queued(&cluster).await.len()), (1, 0));
}

#[tokio::test]
async fn the_room_goes_to_whom_it_was_made_for() {
    let cluster = Cluster::start(1, 1 << 30).await;
    low(&cluster).await;
    // Of another user, whose turn it is, and as large as what becomes free.
    let mut other = draft(&cluster, "other", 1000, 2, false);
    other.wishes.labels = "user=other".parse().expect("a label");
    queue::enqueue(&cluster.scheduler, other, None)
        .await
        .expect("it waits");
    decide(&cluster).await;
    queue::advance(&cluster.scheduler).await;
    let waits = queued(&cluster).await;
    assert_eq!(names(&waits), ["high", "other"]);
    assert_eq!(
        waits[0].reason,
        "room is being made on node1: 'low' (priority 2) stops"
    );
    let seen = observe::snapshot(&cluster.scheduler);
    assert_eq!((seen.held.len(), seen.held[0].node.as_str()), (1, "node1"));
    let third = run(&cluster, draft(&cluster, "third", 1000, 9, false)).await;
    assert!(third.is_err(), "a node makes room for one at a time");

    cluster.nodes[0].set_silent(false);
    until_runs(&cluster, "high").await;
    let waits = queued(&cluster).await;
    assert_eq!(names(&waits), ["other", "low"], "{waits:?}");
    assert_eq!(observe::snapshot(&cluster.scheduler).held, []);
    assert_eq!(cluster.nodes[0].running(), 1);
}

#[tokio::test]
async fn whatever_scheduler_ends_it_it_is_in_the_queue_once() {
    for phase in [
        Phase::Stopping,
        Phase::Ending(Outcome::Exited {
            status: None,
            how: String::new(),
        }),
    ] {
        let mut cluster = Cluster::start(1, 1 << 30).await;
        let entry = low(&cluster).await;
        decide(&cluster).await;
        let record = VmRecord {
            phase: phase.clone(),
            ..entry.record().as_ref().clone()
        };
        cluster
            .scheduler
            .save_vm(record, Vec::new())
            .await
            .expect("stored");
        cluster.restart().await;
        assert_eq!(names(&queued(&cluster).await), ["high"], "{phase:?}");
        cluster.nodes[0].set_silent(false);
        until_runs(&cluster, "high").await;
        assert_eq!(names(&queued(&cluster).await), ["low"], "{phase:?}");
        assert_eq!(cluster.nodes[0].running(), 1);

        cluster.restart().await;
        until_runs(&cluster, "high").await;
        let waits = vm(&cluster, "low").await;
        assert_eq!(waits.preempted.expect("it says so").times, 1, "{phase:?}");
        stop(&cluster, "high").await.expect("stopped");
        until_runs(&cluster, "low").await;
        let id = entry.record().id;
        assert_eq!(
            cluster.nodes[0].epochs_of(id),
            [2],
            "never at an epoch that has run"
        );
    }
}

#[tokio::test]
async fn one_that_comes_to_its_own_end_first_does_not_begin_anew() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let entry = low(&cluster).await;
    decide(&cluster).await;
    cluster.nodes[0].guests_exit(3);
    cluster.nodes[0].set_silent(false);
    until_runs(&cluster, "high").await;
    let record = entry.record();
    assert_eq!(
        record.phase,
        Phase::Ended(Outcome::Exited {
            status: Some(3),
            how: String::new()
        })
    );
    assert_eq!(
        (record.giving_way.clone(), queued(&cluster).await.len()),
        (None, 0)
    );
}

#[tokio::test]
async fn what_a_user_stops_does_not_come_back() {
    let cluster = Cluster::start(1, 1 << 30).await;
    low(&cluster).await;
    decide(&cluster).await;
    cluster.nodes[0].set_silent(false);
    let stopped = stop(&cluster, "low").await.expect("stopped");
    assert_eq!(stopped.phase(), VmPhase::Exited);
    until_runs(&cluster, "high").await;
    assert_eq!(queued(&cluster).await, []);
    remove(&cluster, "low", false).await;

    // In the queue, too.
    stop(&cluster, "high").await.expect("stopped");
    remove(&cluster, "high", false).await;
    low(&cluster).await;
    let high = run(&cluster, draft(&cluster, "high", 900, 8, false)).await;
    high.expect("started");
    remove(&cluster, "low", true).await;
    assert_eq!(queued(&cluster).await, []);
    stop(&cluster, "high").await.expect("stopped");
    queue::advance(&cluster.scheduler).await;
    assert_eq!(cluster.nodes[0].running(), 0);
}

#[tokio::test]
async fn its_console_and_its_end_are_waited_for_over_its_runs() {
    let mut cluster = Cluster::start(1, 1 << 30).await;
    let entry = low(&cluster).await;
    let id = entry.record().id;
    let (waiting, request) = (api(&cluster), GetVmRequest { vm: "low".to_owned() });
    let end = tokio::spawn(async move { waiting.wait_vm(Request::new(request)).await });
    let first = b"first run\n".to_vec();
    let stored = cluster.scheduler.logs.append(id, 0, first).await;
    stored.expect("stored");
    let high = run(&cluster, draft(&cluster, "high", 900, 8, false)).await;
    high.expect("started");
    let text = console(&cluster, "low").await.expect("it waits, and has run");
    let line = "first run\n\n[shoal: stopped for 'high' (priority 8); what follows is another run]\n";
    assert_eq!(text, line);
    let error = console(&cluster, "none").await.expect_err("there is none");
    assert_eq!(error.code(), Code::NotFound);

    stop(&cluster, "high").await.expect("stopped");
    until_runs(&cluster, "low").await;
    let record = entry.record();
    assert_eq!(record.runs.console_offset, line.len() as u64);
    let spec = cluster.scheduler.spec_to_launch(&record);
    assert_eq!(spec.console_offset, line.len() as u64);
    assert!(observe::may_write_console(
        &cluster.scheduler,
        &record.node,
        id,
        record.epoch
    ));
    cluster.nodes[0].guests_exit(0);
    until("its end", || {
        cluster.report();
        matches!(entry.record().phase, Phase::Ended(_))
    })
    .await;
    let ended = end.await.expect("no panic").expect("answered").into_inner();
    assert_eq!(
        (ended.phase(), ended.exit_status, ended.epoch),
        (VmPhase::Exited, Some(0), 2)
    );

    // Another scheduler, which does not have what was written before, leaves a gap and numbers on.
    cluster.restart().await;
    let (runs, mut next) = (record.runs.clone(), draft(&cluster, "next", 100, 5, true));
    next.runs = runs;
    let started = run(&cluster, next).await.expect("started").record();
    assert_eq!(started.runs.console_offset, line.len() as u64);
}

#[tokio::test]
async fn one_that_cannot_be_started_again_is_not_forgotten() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let entry = low(&cluster).await;
    let high = run(&cluster, draft(&cluster, "high", 900, 8, false)).await;
    high.expect("started");
    stop(&cluster, "high").await.expect("stopped");
    cluster.nodes[0].refuse_launches();
    queue::advance(&cluster.scheduler).await;
    until("its end", || matches!(entry.record().phase, Phase::Ended(_))).await;
    let failed = vm(&cluster, "low").await;
    assert_eq!(failed.phase(), VmPhase::Failed);
    assert!(
        failed.message.contains("could not start it again"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn what_an_earlier_run_left_is_destroyed_while_it_waits() {
    let cluster = Cluster::start(2, 1 << 30).await;
    let blocker = run_now(
        &cluster.scheduler,
        draft(&cluster, "blocker", 1000, 9, false),
        None,
    )
    .await;
    let blocker = blocker.expect("started").record();
    let low = low(&cluster).await.record();
    assert_ne!(low.node, blocker.node);
    let high = run(&cluster, draft(&cluster, "high", 900, 8, false)).await;
    high.expect("started");
    let place = cluster.nodes.iter().find(|node| node.record.name == blocker.node);
    let place = place.expect("there");
    place.leave_behind(low.id, 1);
    until("it to be destroyed", || {
        cluster.report();
        place.epochs_of(low.id).is_empty()
    })
    .await;
    assert_eq!(names(&queued(&cluster).await), ["low"]);
}

#[tokio::test]
async fn one_that_is_busy_is_asked_again() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let entry = low(&cluster).await;
    let busy = entry.lock().await;
    let patient = draft(&cluster, "patient", 900, 8, false);
    let waits = queue::enqueue(&cluster.scheduler, patient, None).await;
    let message = waits.expect("it waits").message();
    assert!(
        message.ends_with("VM low is to give way and is busy"),
        "{message}"
    );
    drop(busy);
    until_runs(&cluster, "patient").await;

    // The same for one that does not wait in the queue.
    stop(&cluster, "patient").await.expect("stopped");
    until_runs(&cluster, "low").await;
    let busy = entry.lock().await;
    let (scheduler, hasty) = (
        Arc::clone(&cluster.scheduler),
        draft(&cluster, "hasty", 900, 8, false),
    );
    let hasty = tokio::spawn(async move { run_now(&scheduler, hasty, None).await });
    tokio::task::yield_now().await;
    drop(busy);
    hasty.await.expect("no panic").expect("started");
    let waits = vm(&cluster, "low").await.preempted.expect("it says so");
    assert_eq!((waits.times, waits.by.as_str()), (2, "hasty"));
}
