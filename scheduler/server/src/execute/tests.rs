use std::sync::Arc;

use shoal_proto::cluster::VmPhase;
use shoal_proto::vm::{MigrationPolicy, MigrationResult};
use shoal_proto::{Epoch, cluster};

use super::finish;
use super::launch::{self, LaunchError};
use super::migrate;
use super::stop;
use crate::control::{self, Wanted};
use crate::migrations::OpenMigration;
use crate::record::{Cordon, Outcome, Phase};
use crate::testing::{Cluster, FakeNode, Script, until};
use crate::view;
use crate::vms::VmEntry;

mod blame;
mod keeping;
mod lost;

const GIB: u64 = 1 << 30;

async fn running_vm(cluster: &Cluster) -> Arc<VmEntry> {
    let draft = cluster.draft("vm", 256 << 20);
    let first = cluster.nodes[0].record.name.clone();
    let (entry, guard) = launch::submit(&cluster.scheduler, draft, Some(&first))
        .await
        .expect("placed");
    launch::start(&cluster.scheduler, &entry, &guard)
        .await
        .expect("started");
    drop(guard);
    cluster.report();
    entry
}

async fn migrate(cluster: &Cluster, entry: &Arc<VmEntry>) -> Arc<OpenMigration> {
    let to = cluster.nodes[1].record.name.clone();
    migrate::begin_requested(&cluster.scheduler, entry, Some(&to), &MigrationPolicy::default())
        .await
        .expect("begun")
}

async fn outcome(migration: &OpenMigration) -> (MigrationResult, cluster::Migration) {
    let mut views = migration.watch();
    let view = views
        .wait_for(|view| view.outcome.is_some())
        .await
        .expect("the sender is in hand")
        .clone();
    let outcome = view.outcome.expect("waited for");
    let report = outcome.report.clone().expect("a report");
    (report.result(), outcome)
}

/// Migrates to the second node.
async fn migrated(cluster: &Cluster, entry: &Arc<VmEntry>) -> (MigrationResult, cluster::Migration) {
    let migration = migrate(cluster, entry).await;
    outcome(&migration).await
}

/// What the planner would do now if the first node were to be emptied.
async fn drain_plan(cluster: &Cluster) -> shoal_plan::Plan {
    let first = &cluster.nodes[0].record.name;
    let entry = cluster.scheduler.nodes.get(first).expect("registered");
    entry.set_cordon(Cordon::Draining);
    let plan = control::plan(&cluster.scheduler, Wanted::Drains).await;
    entry.set_cordon(Cordon::Open);
    plan
}

async fn doubt(migration: &OpenMigration) {
    let mut views = migration.watch();
    views
        .wait_for(|view| view.in_doubt.is_some())
        .await
        .expect("the sender is in hand");
}

fn running(nodes: &[FakeNode]) -> Vec<usize> {
    nodes.iter().map(FakeNode::running).collect()
}

#[tokio::test]
async fn a_migration_moves_the_record_and_destroys_the_source() {
    let cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    let (result, outcome) = migrated(&cluster, &entry).await;
    assert_eq!((result, outcome.epoch), (MigrationResult::Completed, 2));
    let record = entry.record();
    assert_eq!(
        (record.node.as_str(), record.epoch, record.last_epoch),
        ("node2", Epoch(2), Epoch(2))
    );
    assert_eq!(running(&cluster.nodes), [0, 1]);
    assert_eq!(
        cluster.nodes[0].vmms(),
        0,
        "the source was destroyed before the end was told"
    );
    assert_eq!(entry.migrations().len(), 1);
    assert!(cluster.scheduler.migrations.get(record.id).is_none());
}

#[tokio::test]
async fn a_failed_attempt_burns_its_epoch() {
    let cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    cluster.nodes[0].set_script(Script::Fail);
    let (result, outcome) = migrated(&cluster, &entry).await;
    assert_eq!(result, MigrationResult::Failed);
    assert_eq!(outcome.report.expect("a report").reason, "scripted");
    assert_eq!(
        (entry.record().epoch, entry.record().last_epoch),
        (Epoch(1), Epoch(2))
    );
    assert_eq!(running(&cluster.nodes), [1, 0]);
    assert_eq!(cluster.nodes[1].vmms(), 0);

    cluster.nodes[0].set_script(Script::Complete);
    let (result, outcome) = migrated(&cluster, &entry).await;
    assert_eq!((result, outcome.epoch), (MigrationResult::Completed, 3));
}

#[tokio::test]
async fn a_migration_does_not_begin_where_only_one_node_has_a_certificate() {
    for with in 0..2 {
        let cluster = Cluster::start(2, GIB).await;
        let entry = running_vm(&cluster).await;
        cluster.nodes[with].set_migration_tls(&cluster.scheduler, true);
        let error = migrate::begin_requested(&cluster.scheduler, &entry, None, &Default::default())
            .await
            .expect_err("refused")
            .to_string();
        let says = [
            "it has no certificate for migrations, and node1 sends VMs over TLS only",
            "it takes VMs over TLS only, and node1 has no certificate for migrations",
        ];
        assert!(error.contains(&format!("node2: {}", says[with])), "{error}");
        let drain = drain_plan(&cluster).await;
        assert!(
            drain.actions.is_empty() && drain.notes.iter().any(|note| note.text.contains(says[with])),
            "{drain:?}"
        );
        assert_eq!(entry.record().last_epoch, Epoch(1), "no epoch is used up");
        cluster.nodes[1 - with].set_migration_tls(&cluster.scheduler, true);
        let (result, _) = migrated(&cluster, &entry).await;
        assert_eq!(result, MigrationResult::Completed);
    }
}

#[tokio::test]
async fn a_destination_that_cannot_be_prepared_changes_nothing() {
    let cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    cluster.nodes[1].set_silent(true);
    let (result, outcome) = migrated(&cluster, &entry).await;
    assert_eq!(result, MigrationResult::Failed);
    let reason = outcome.report.expect("a report").reason;
    assert!(reason.contains("node2"), "{reason}");
    assert_eq!(running(&cluster.nodes), [1, 0]);
}

#[tokio::test]
async fn in_doubt_the_source_is_not_resumed_until_the_destination_says_that_it_never_ran() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = in_doubt(&cluster, false).await;
    assert_eq!(cluster.nodes[0].resumed(), 0);
    assert_eq!(view::vm(&cluster.scheduler, &entry).phase(), VmPhase::InDoubt);
    let stopped = stop::stop(&cluster.scheduler, &entry).await;
    assert!(matches!(stopped, Err(stop::StopError::InDoubt(_))));

    cluster.nodes[1].set_silent(false);
    let (result, _) = outcome(&migration).await;
    assert_eq!(result, MigrationResult::Failed);
    assert_eq!(cluster.nodes[0].resumed(), 1);
    assert_eq!(running(&cluster.nodes), [1, 0]);
    assert_eq!(
        (entry.record().node.as_str(), entry.record().epoch),
        ("node1", Epoch(1))
    );
}

#[tokio::test]
async fn in_doubt_with_a_commit_that_arrived_the_destination_owns_the_vm() {
    let cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    cluster.nodes[0].set_script(Script::InDoubt { commit_arrives: true });
    let (result, _) = migrated(&cluster, &entry).await;
    assert_eq!(result, MigrationResult::Completed);
    assert_eq!(cluster.nodes[0].resumed(), 0);
    assert_eq!(running(&cluster.nodes), [0, 1]);
    assert_eq!(entry.record().node.as_str(), "node2");
}

/// A VM in doubt whose destination does not answer, although it may have got the commit.
async fn in_doubt(cluster: &Cluster, commit_arrives: bool) -> (Arc<VmEntry>, Arc<OpenMigration>) {
    let entry = running_vm(cluster).await;
    cluster.nodes[0].set_script(Script::InDoubt { commit_arrives });
    cluster.nodes[1].silence_once_prepared();
    let migration = migrate(cluster, &entry).await;
    doubt(&migration).await;
    (entry, migration)
}

#[tokio::test]
async fn an_operator_who_keeps_the_source_fences_the_destination() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = in_doubt(&cluster, true).await;
    migration.ask(|wish| wish.keep = Some(cluster.nodes[0].record.name.clone()));
    outcome(&migration).await;
    until("the source runs again", || cluster.nodes[0].running() == 1).await;
    assert_eq!(
        (entry.record().node.as_str(), entry.record().epoch),
        ("node1", Epoch(1))
    );

    // The other node comes back with a VM that runs at the newer, fenced epoch.
    cluster.nodes[1].set_silent(false);
    until("the fenced copy is destroyed", || {
        cluster.report();
        cluster.nodes[1].vmms() == 0
    })
    .await;
    assert_eq!(running(&cluster.nodes), [1, 0]);
}

#[tokio::test]
async fn an_operator_who_keeps_the_destination_destroys_the_source() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = in_doubt(&cluster, true).await;
    migration.ask(|wish| wish.keep = Some(cluster.nodes[1].record.name.clone()));
    let (result, _) = outcome(&migration).await;
    assert_eq!(result, MigrationResult::Completed);
    cluster.nodes[1].set_silent(false);
    until("the source is destroyed", || cluster.nodes[0].vmms() == 0).await;
    assert_eq!(
        (entry.record().node.as_str(), entry.record().epoch),
        ("node2", Epoch(2))
    );
    assert_eq!(running(&cluster.nodes), [0, 1]);
}

#[tokio::test]
async fn a_restarted_scheduler_ends_what_it_finds_open() {
    for commit_arrives in [false, true] {
        let mut cluster = Cluster::start(2, GIB).await;
        let id = in_doubt(&cluster, commit_arrives).await.0.record().id;
        cluster.restart().await;
        let open = cluster.scheduler.migrations.get(id).expect("taken up");
        doubt(&open).await;
        cluster.nodes[1].set_silent(false);
        until("closed", || cluster.scheduler.migrations.get(id).is_none()).await;
        until("one copy", || {
            cluster.nodes.iter().map(FakeNode::vmms).sum::<usize>() == 1
        })
        .await;
        let expected = if commit_arrives { [0, 1] } else { [1, 0] };
        until("one runs", || running(&cluster.nodes) == expected).await;
    }
}

#[tokio::test]
async fn a_copy_that_runs_at_a_newer_epoch_is_taken_up_not_destroyed() {
    let cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    // As if the store had been put back to before the migration.
    let before = entry.record();
    let (result, _) = migrated(&cluster, &entry).await;
    assert_eq!(result, MigrationResult::Completed);
    let guard = entry.lock().await;
    cluster
        .scheduler
        .save_vm(before.as_ref().clone(), Vec::new())
        .await
        .expect("stored");
    drop(guard);
    until("the record follows", || {
        cluster.report();
        entry.record().epoch == Epoch(2)
    })
    .await;
    assert_eq!(entry.record().node.as_str(), "node2");
    assert_eq!(running(&cluster.nodes), [0, 1]);
}

#[tokio::test]
async fn a_launch_whose_answer_is_lost_is_asked_for() {
    let cluster = Cluster::start(1, GIB).await;
    for (done, name) in [(true, "done"), (false, "undone")] {
        cluster.nodes[0].lose_next_launch(done);
        let draft = cluster.draft(name, 64 << 20);
        let (entry, guard) = launch::submit(&cluster.scheduler, draft, None)
            .await
            .expect("placed");
        let started = launch::start(&cluster.scheduler, &entry, &guard).await;
        if done {
            started.expect("it runs");
            assert_eq!(entry.record().phase, Phase::Running);
        } else {
            assert!(matches!(started, Err(LaunchError::Failed { .. })), "{started:?}");
            assert!(cluster.scheduler.vms.find(name).is_none());
        }
    }
    assert_eq!(cluster.nodes[0].running(), 1);
}

#[tokio::test]
async fn two_submissions_at_once_do_not_share_the_last_room() {
    let cluster = Cluster::start(1, GIB).await;
    let submit = |name| launch::submit(&cluster.scheduler, cluster.draft(name, GIB), None);
    let (first, second) = tokio::join!(submit("a"), submit("b"));
    assert_eq!(u32::from(first.is_ok()) + u32::from(second.is_ok()), 1);
    let (first, second) = tokio::join!(submit("c"), submit("c"));
    assert!(first.is_err() && second.is_err());
}

#[tokio::test]
async fn a_vm_that_vanishes_with_its_node_is_failed_and_one_that_exits_is_cleaned_up() {
    let cluster = Cluster::start(1, GIB).await;
    let entry = running_vm(&cluster).await;
    cluster.nodes[0].guests_exit(7);
    until("ended", || {
        cluster.report();
        matches!(entry.record().phase, Phase::Ended(_))
    })
    .await;
    assert_eq!(
        entry.record().phase,
        Phase::Ended(Outcome::Exited {
            status: Some(7),
            how: String::new()
        })
    );
    assert_eq!(cluster.nodes[0].vmms(), 0);
    stop::remove(&cluster.scheduler, &entry, false)
        .await
        .expect("removed");

    let entry = running_vm(&cluster).await;
    cluster.nodes[0].lose_everything();
    until("ended", || {
        cluster.report();
        matches!(entry.record().phase, Phase::Ended(Outcome::Failed { .. }))
    })
    .await;
}

async fn open_migration(cluster: &Cluster, script: Script) -> (Arc<VmEntry>, Arc<OpenMigration>) {
    let entry = running_vm(cluster).await;
    cluster.nodes[0].set_script(script);
    let migration = migrate(cluster, &entry).await;
    (entry, migration)
}

async fn post_copy(cluster: &Cluster) -> (Arc<VmEntry>, Arc<OpenMigration>) {
    let (entry, migration) = open_migration(cluster, Script::PostCopy).await;
    until("the destination owns it", || entry.record().epoch == Epoch(2)).await;
    (entry, migration)
}

#[tokio::test]
async fn in_post_copy_the_destination_owns_the_vm_and_the_source_stays_until_nothing_is_missing() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = post_copy(&cluster).await;
    assert_eq!(entry.record().node.as_str(), "node2");
    assert!(cluster.scheduler.migrations.get(entry.record().id).is_some());
    for _ in 0..3 {
        cluster.report();
        tokio::task::yield_now().await;
    }
    assert_eq!(
        cluster.nodes[0].vmms(),
        1,
        "the source still has memory that is needed"
    );
    let node1 = cluster.nodes[0].record.name.clone();
    assert!(
        !crate::drain::is_empty(&cluster.scheduler, &node1),
        "so the node is not empty"
    );

    cluster.nodes[0].end_post_copy();
    let (result, _) = outcome(&migration).await;
    assert_eq!(result, MigrationResult::Completed);
    assert_eq!(cluster.nodes[0].vmms(), 0);
    assert_eq!(running(&cluster.nodes), [0, 1]);
    assert!(crate::drain::is_empty(&cluster.scheduler, &node1));
}

#[tokio::test]
async fn memory_that_is_gone_with_its_node_fails_the_vm() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = post_copy(&cluster).await;
    cluster.nodes[1].lose_links();
    cluster.nodes[0].kill_vmms();
    let (result, ended) = outcome(&migration).await;
    assert_eq!(result, MigrationResult::Failed);
    let reason = ended.report.expect("a report").reason;
    assert!(reason.starts_with("memory lost with node node1"), "{reason}");
    until("nothing runs", || running(&cluster.nodes) == [0, 0]).await;
    let Phase::Ended(Outcome::Failed { reason }) = &entry.record().phase else {
        panic!("{:?}", entry.record().phase);
    };
    assert!(reason.starts_with("memory lost"), "{reason}");
}

#[tokio::test]
async fn a_lost_link_in_post_copy_is_told_and_waited_for() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = post_copy(&cluster).await;
    cluster.nodes[1].lose_links();
    cluster.nodes[0].set_silent(true);
    until("it is told", || {
        cluster.report();
        migration.view().link_lost
    })
    .await;
    let shown = view::vm(&cluster.scheduler, &entry);
    assert_eq!(shown.phase(), VmPhase::Migrating);
    assert!(shown.message.contains("node1"), "{}", shown.message);
    assert_eq!(running(&cluster.nodes), [0, 1], "nobody gave it up");

    cluster.nodes[0].set_silent(false);
    cluster.nodes[0].end_post_copy();
    assert_eq!(outcome(&migration).await.0, MigrationResult::Completed);
}

#[tokio::test]
async fn post_copy_is_resumed_by_the_next_scheduler() {
    let mut cluster = Cluster::start(2, GIB).await;
    let (entry, _) = post_copy(&cluster).await;
    let id = entry.record().id;
    cluster.restart().await;
    let migration = cluster.scheduler.migrations.get(id).expect("taken up");
    until("its state is known", || migration.view().post_copy).await;
    assert_eq!(cluster.nodes[0].vmms(), 1);
    cluster.nodes[0].end_post_copy();
    assert_eq!(outcome(&migration).await.0, MigrationResult::Completed);
    assert_eq!(running(&cluster.nodes), [0, 1]);
}

#[tokio::test]
async fn a_vm_that_is_stopped_in_post_copy_needs_no_more_memory() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = post_copy(&cluster).await;
    stop::stop(&cluster.scheduler, &entry).await.expect("stopped");
    assert_eq!(outcome(&migration).await.0, MigrationResult::Completed);
    assert!(matches!(
        entry.record().phase,
        Phase::Ended(Outcome::Exited { .. })
    ));
    until("nothing is left", || {
        cluster.report();
        cluster.nodes.iter().all(|node| node.vmms() == 0)
    })
    .await;
}

#[tokio::test]
async fn a_vm_that_is_stopped_in_pre_copy_cancels_its_migration() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = open_migration(&cluster, Script::GoOn).await;
    stop::remove(&cluster.scheduler, &entry, true)
        .await
        .expect("removed");
    assert_eq!(outcome(&migration).await.0, MigrationResult::Cancelled);
    assert_eq!(running(&cluster.nodes), [0, 0]);
    let filter = crate::history::Filter {
        vm: Some("vm".to_owned()),
        ..Default::default()
    };
    let kept = cluster.scheduler.history.list(&filter, 10);
    assert_eq!(kept.len(), 1, "the history outlives the VM");
}

#[tokio::test]
async fn a_migration_that_is_cancelled_before_it_starts_never_starts() {
    let cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    cluster.nodes[0].set_script(Script::GoOn);
    let migration = migrate(&cluster, &entry).await;
    migration.ask(|wish| wish.cancel = true);
    let (result, ended) = outcome(&migration).await;
    assert_eq!(result, MigrationResult::Cancelled, "{ended:?}");
    assert_eq!(running(&cluster.nodes), [1, 0]);
    assert_eq!(cluster.nodes[1].vmms(), 0);
}

#[tokio::test]
async fn a_second_migration_of_a_vm_is_refused() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = open_migration(&cluster, Script::GoOn).await;
    let again = migrate::begin_requested(&cluster.scheduler, &entry, None, &MigrationPolicy::default()).await;
    assert!(matches!(again, Err(migrate::BeginError::AlreadyMigrating { .. })));
    migration.ask(|wish| wish.cancel = true);
    outcome(&migration).await;
}

#[tokio::test]
async fn a_vm_can_go_to_a_new_vmm_on_its_node() {
    let cluster = Cluster::start(1, GIB).await;
    let entry = running_vm(&cluster).await;
    let own = cluster.nodes[0].record.name.clone();
    let migration = migrate::begin_requested(
        &cluster.scheduler,
        &entry,
        Some(&own),
        &MigrationPolicy::default(),
    )
    .await
    .expect("begun");
    let (result, ended) = outcome(&migration).await;
    assert_eq!(result, MigrationResult::Completed, "{ended:?}");
    let record = entry.record();
    assert_eq!((record.node.as_str(), record.epoch), ("node1", Epoch(2)));
    assert_eq!((cluster.nodes[0].vmms(), cluster.nodes[0].running()), (1, 1));
}

#[tokio::test]
async fn what_can_never_be_stored_is_told_once_and_not_tried_for_ever() {
    let cluster = Cluster::start(1, GIB).await;
    let entry = running_vm(&cluster).await;
    let too_large = crate::record::VmRecord {
        message: "x".repeat(2 << 20),
        ..entry.record().as_ref().clone()
    };
    let scheduler = Arc::clone(&cluster.scheduler);
    let task = tokio::spawn(async move { finish::save_at_last(&scheduler, too_large, Vec::new()).await });
    let told = || {
        let events = cluster.scheduler.events.after(0).into_iter();
        events
            .filter(|event| event.kind == "store-refused")
            .collect::<Vec<_>>()
    };
    until("it is told", || !told().is_empty()).await;
    assert!(
        told()[0].message.contains("more than can be stored at once"),
        "{:?}",
        told()
    );
    assert!(!task.is_finished(), "whoever holds the VM goes on holding it");
    assert!(
        entry.record().message.is_empty(),
        "nothing is shown that is not stored"
    );
    task.abort();
}
