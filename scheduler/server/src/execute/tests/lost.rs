//! Nodes that an operator declares lost, rightly or not, and removes.

use std::time::Duration;

use shoal_proto::LEAST_BANDWIDTH;
use shoal_proto::cluster::{MigrationDefaults, NodeState};
use tokio::sync::mpsc;

use super::*;
use crate::execute::lost::{self, Given, LostError};
use crate::nodes::NodeEntry;
use crate::registry;

/// The node does not answer, and has not reported for a while.
fn cut_off(cluster: &Cluster, index: usize) -> Arc<NodeEntry> {
    let node = &cluster.nodes[index];
    node.set_silent(true);
    let entry = cluster
        .scheduler
        .nodes
        .get(&node.record.name)
        .expect("registered");
    entry.silence(Duration::from_secs(6));
    entry
}

/// Every other node reports.
fn report_but(cluster: &Cluster, index: usize) {
    for (at, node) in cluster.nodes.iter().enumerate() {
        if at != index {
            node.report(&cluster.scheduler);
        }
    }
}

async fn declare(cluster: &Cluster, entry: &NodeEntry) -> Given {
    lost::declare(&cluster.scheduler, entry).await.expect("declared")
}

fn failed_of(entry: &VmEntry) -> String {
    match &entry.record().phase {
        Phase::Ended(Outcome::Failed { reason }) => reason.clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_lost_node_gives_up_its_vms_and_runs_none_of_them_when_it_comes_back() {
    let cluster = Cluster::start(2, GIB).await;
    let scheduler = &cluster.scheduler;
    let entry = running_vm(&cluster).await;
    let node = cut_off(&cluster, 0);
    let later = stop::stop(scheduler, &entry).await.expect_err("nobody answers");
    assert!(
        later.to_string().contains("`shoal node lost node1`"),
        "it says what can be done: {later}"
    );
    let given = declare(&cluster, &node).await;
    assert_eq!((given.up, given.later), (vec!["vm".to_owned()], vec![]));
    assert_eq!(failed_of(&entry), "node node1 was declared lost");
    assert_eq!(view::node(scheduler, &node).state(), NodeState::Lost);

    // Its name is free, and another takes it while the old one still runs where nobody can see it.
    stop::remove(scheduler, &entry, false).await.expect("removed");
    let (second, guard) = launch::submit(scheduler, cluster.draft("vm", 256 << 20), None)
        .await
        .expect("placed");
    launch::start(scheduler, &second, &guard).await.expect("started");
    drop(guard);
    assert_eq!(second.record().node.as_str(), "node2");
    assert_eq!(running(&cluster.nodes), [1, 1], "as the operator was wrong");

    // The agent reports again, but its calls are not answered yet: it is not ready.
    cluster.report();
    let shown = view::node(scheduler, &node);
    assert_eq!(shown.state(), NodeState::NotReady, "{}", shown.trouble);
    assert!(shown.trouble.contains("was declared lost"), "{}", shown.trouble);
    let name = node.name();
    launch::submit(scheduler, cluster.draft("other", 256 << 20), Some(&name))
        .await
        .expect_err("no VM goes there");

    cluster.nodes[0].set_silent(false);
    until("it is ready", || {
        cluster.report();
        view::node(scheduler, &node).state() == NodeState::Ready
    })
    .await;
    assert_eq!(running(&cluster.nodes), [0, 1]);
    assert_eq!(cluster.nodes[0].vmms(), 0);
}

#[tokio::test]
async fn a_word_that_is_said_again_is_no_event() {
    let cluster = Cluster::start(2, GIB).await;
    running_vm(&cluster).await;
    let node = cut_off(&cluster, 0);
    let events = || cluster.scheduler.events.after(0);
    declare(&cluster, &node).await;
    let (told, lost) = (events().len(), node.lost());
    let said = |words: &str| events().iter().any(|event| event.message == words);
    assert!(
        said("node1 was declared lost; 1 VM failed by that"),
        "{:?}",
        events()
    );
    assert_eq!(declare(&cluster, &node).await, Given::default());
    assert_eq!((events().len(), node.lost()), (told, lost));
    let other = cut_off(&cluster, 1);
    declare(&cluster, &other).await;
    assert!(said("node2 was declared lost; it had no VMs"), "{:?}", events());
}

#[tokio::test]
async fn a_node_that_reports_is_neither_lost_nor_removed() {
    let cluster = Cluster::start(1, GIB).await;
    let scheduler = &cluster.scheduler;
    running_vm(&cluster).await;
    let node = scheduler
        .nodes
        .get(&cluster.nodes[0].record.name)
        .expect("registered");
    let refused = lost::declare(scheduler, &node).await;
    assert!(matches!(refused, Err(LostError::Reports { .. })), "{refused:?}");
    let refused = lost::remove(scheduler, &node).await;
    assert!(matches!(refused, Err(LostError::Connected { .. })), "{refused:?}");
    node.end_session(1);
    cut_off(&cluster, 0);
    let refused = lost::remove(scheduler, &node).await;
    assert!(
        matches!(refused, Err(LostError::HasVms { vms: 1, .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_lost_node_that_was_removed_too_still_ends_what_it_had() {
    let mut cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    let node = cut_off(&cluster, 0);
    declare(&cluster, &node).await;
    stop::remove(&cluster.scheduler, &entry, false)
        .await
        .expect("removed");
    node.end_session(1);
    lost::remove(&cluster.scheduler, &node).await.expect("removed");
    assert!(cluster.scheduler.nodes.get(&node.name()).is_none());

    cluster.restart_without(0).await;
    let scheduler = &cluster.scheduler;
    assert!(
        scheduler.nodes.get(&node.name()).is_none(),
        "also after a restart"
    );
    let record = &cluster.nodes[0].record;
    let register = shoal_proto::node::Register {
        node: record.name.to_string(),
        address: record.address.clone(),
        cpus: record.cpus,
        memory_bytes: record.memory_bytes,
        ..Default::default()
    };
    let (sender, _messages) = mpsc::channel(1);
    let (_, node) = registry::begin(scheduler, &register, 7, sender)
        .await
        .expect("registered");
    cluster.nodes[0].report(scheduler);
    assert_eq!(view::node(scheduler, &node).state(), NodeState::NotReady);
    cluster.nodes[0].set_silent(false);
    until("it is ready", || {
        cluster.report();
        view::node(scheduler, &node).state() == NodeState::Ready
    })
    .await;
    assert_eq!(cluster.nodes[0].vmms(), 0);
}

#[tokio::test]
async fn a_scheduler_that_dies_after_it_has_stored_the_word_is_followed_by_one_that_acts_on_it() {
    let mut cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    let node = cut_off(&cluster, 0);
    // Something else is done with the VM: it does not fail at once.
    let guard = entry.lock().await;
    let scheduler = Arc::clone(&cluster.scheduler);
    let declaring = tokio::spawn(async move { lost::declare(&scheduler, &node).await });
    let name = cluster.nodes[0].record.name.clone();
    until("the word is stored", || cluster.scheduler.nodes.is_lost(&name)).await;
    declaring.abort();
    assert_eq!(entry.record().phase, Phase::Running);
    drop(guard);

    cluster.nodes[0].set_silent(false);
    cluster.restart().await;
    let scheduler = &cluster.scheduler;
    until("it is ready, and has nothing", || {
        cluster.report();
        !scheduler.nodes.is_lost(&name) && cluster.nodes[0].vmms() == 0
    })
    .await;
    let vm = scheduler.vms.find("vm").expect("known");
    assert_eq!(failed_of(&vm), "node node1 was declared lost");
}

#[tokio::test]
async fn a_vm_in_doubt_runs_on_at_its_source_when_its_destination_is_lost() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = in_doubt(&cluster, true).await;
    let node = cut_off(&cluster, 1);
    let given = declare(&cluster, &node).await;
    assert_eq!(given, Given::default(), "it is not that node's");
    assert_eq!(outcome(&migration).await.0, MigrationResult::Failed);
    until("the source runs again", || cluster.nodes[0].running() == 1).await;
    assert_eq!(
        (entry.record().node.as_str(), entry.record().epoch),
        ("node1", Epoch(1))
    );

    // Commit had arrived, and the host was not off: it comes back with a second copy.
    assert_eq!(cluster.nodes[1].running(), 1);
    cluster.nodes[1].set_silent(false);
    until("the second copy is destroyed", || {
        cluster.report();
        !node.is_lost()
    })
    .await;
    assert_eq!(running(&cluster.nodes), [1, 0]);
}

#[tokio::test]
async fn a_vm_is_lost_with_its_source_unless_its_destination_has_all_of_it() {
    for (script, runs) in [(Script::Complete, true), (Script::GoOn, false)] {
        let cluster = Cluster::start(2, GIB).await;
        let entry = running_vm(&cluster).await;
        cluster.nodes[0].set_script(script);
        let guard = entry.lock().await;
        drop(guard);
        let migration = migrate(&cluster, &entry).await;
        until("it is under way", || {
            cluster.nodes[0].told().len() == 1 || migration.view().outcome.is_some()
        })
        .await;
        let node = cut_off(&cluster, 0);
        declare(&cluster, &node).await;
        let (result, _) = outcome(&migration).await;
        assert_eq!(result == MigrationResult::Completed, runs);
        if runs {
            assert_eq!(entry.record().node.as_str(), "node2");
            assert_eq!(entry.record().phase, Phase::Running);
        } else {
            until("it has failed", || entry.record().phase.is_over()).await;
            failed_of(&entry);
            until("nothing is left of it", || {
                report_but(&cluster, 0);
                cluster.nodes[1].vmms() == 0
            })
            .await;
        }
    }
}

#[tokio::test]
async fn in_post_copy_a_lost_source_that_still_serves_is_believed_and_one_that_does_not_is_not() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = post_copy(&cluster).await;
    let node = cut_off(&cluster, 0);
    declare(&cluster, &node).await;
    report_but(&cluster, 0);
    assert!(migration.view().outcome.is_none(), "it fetches memory from there");
    cluster.nodes[1].lose_links();
    assert_eq!(outcome(&migration).await.0, MigrationResult::Failed);
    until("it has failed", || entry.record().phase.is_over()).await;
    let reason = failed_of(&entry);
    assert!(reason.starts_with("memory lost with node node1"), "{reason}");
}

#[tokio::test]
async fn a_migration_to_a_node_that_is_declared_lost_is_cancelled_and_the_vm_runs_on() {
    // The node does not answer, or it still does and only its reports do not come.
    for answers in [false, true] {
        let cluster = Cluster::start(2, GIB).await;
        let entry = running_vm(&cluster).await;
        cluster.nodes[0].set_script(Script::GoOn);
        let migration = migrate(&cluster, &entry).await;
        until("it is under way", || cluster.nodes[0].told().len() == 1).await;
        let node = cut_off(&cluster, 1);
        cluster.nodes[1].set_silent(!answers);
        declare(&cluster, &node).await;
        let (result, ended) = outcome(&migration).await;
        assert_eq!(result, MigrationResult::Cancelled);
        let reason = ended.report.expect("a report").reason;
        assert_eq!(reason, "node node2 was declared lost");
        assert_eq!(running(&cluster.nodes), [1, 0]);
        let record = entry.record();
        assert_eq!(
            (record.node.as_str(), record.epoch, &record.phase),
            ("node1", Epoch(1), &Phase::Running)
        );
        cluster.nodes[1].set_silent(false);
        until("it is as any other", || {
            cluster.report();
            !node.is_lost()
        })
        .await;
        assert_eq!(cluster.nodes[1].vmms(), 0);
    }
}

#[tokio::test]
async fn a_lost_destination_that_is_back_with_the_vm_does_not_get_it_while_the_source_has_it() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = in_doubt(&cluster, true).await;
    let node = cut_off(&cluster, 1);
    cluster.nodes[0].set_silent(true);
    declare(&cluster, &node).await;
    assert_eq!(cluster.nodes[1].running(), 1);
    cluster.nodes[1].set_silent(false);
    cluster.nodes[0].set_silent(false);
    assert_eq!(outcome(&migration).await.0, MigrationResult::Failed);
    until("the source runs again, and nothing else does", || {
        running(&cluster.nodes) == [1, 0]
    })
    .await;
    let record = entry.record();
    assert_eq!(
        (record.node.as_str(), record.epoch, &record.phase),
        ("node1", Epoch(1), &Phase::Running)
    );
}

#[tokio::test]
async fn a_vm_that_its_source_says_has_moved_to_a_lost_node_fails_with_it() {
    let cluster = Cluster::start(2, GIB).await;
    let (entry, migration) = post_copy(&cluster).await;
    let node = cut_off(&cluster, 1);
    assert_eq!(declare(&cluster, &node).await.up, ["vm"]);
    assert_eq!(outcome(&migration).await.0, MigrationResult::Completed);
    assert_eq!(failed_of(&entry), "node node2 was declared lost");
}

/// `vm` waits at the first node until the network has room for its migration to the second.
async fn waiting(cluster: &Cluster) -> (Arc<VmEntry>, Arc<OpenMigration>) {
    let scheduler = &cluster.scheduler;
    scheduler.defaults.replace(MigrationDefaults {
        cluster_bandwidth_bytes_per_second: Some(LEAST_BANDWIDTH),
        ..Default::default()
    });
    cluster.nodes[2].set_script(Script::GoOn);
    let third = cluster.nodes[2].record.name.clone();
    let (other, guard) = launch::submit(scheduler, cluster.draft("other", 256 << 20), Some(&third))
        .await
        .expect("placed");
    launch::start(scheduler, &other, &guard).await.expect("started");
    drop(guard);
    let entry = running_vm(cluster).await;
    migrate(cluster, &other).await;
    let migration = migrate(cluster, &entry).await;
    assert!(migration.waits().is_some());
    (entry, migration)
}

#[tokio::test]
async fn a_move_that_waits_for_bandwidth_ends_at_once_when_one_of_its_nodes_is_lost() {
    for (lost, words) in [(0, "node node1"), (1, "node node2")] {
        let cluster = Cluster::start(3, GIB).await;
        let (entry, migration) = waiting(&cluster).await;
        let node = cut_off(&cluster, lost);
        let given = declare(&cluster, &node).await;
        let (result, ended) = outcome(&migration).await;
        assert_eq!(result, MigrationResult::Cancelled);
        let reason = ended.report.expect("a report").reason;
        assert_eq!(reason, format!("{words} was declared lost before it began"));
        assert_eq!(cluster.nodes[1].epochs_of(entry.record().id), [0_u64; 0]);
        let failed = usize::from(lost == 0);
        assert_eq!((given.up.len(), given.later.len()), (failed, 0));
        if lost == 0 {
            assert_eq!(failed_of(&entry), "node node1 was declared lost");
        } else {
            assert_eq!(entry.record().phase, Phase::Running);
            assert_eq!(cluster.nodes[0].running(), 1);
        }
        let events = cluster.scheduler.events.after(0);
        let at = |kind: &str| events.iter().position(|event| event.kind == kind);
        let declared = at("node-declared-lost").expect("told");
        let told = if lost == 0 {
            "node1 was declared lost; 1 VM failed by that"
        } else {
            "node2 was declared lost; it had no VMs"
        };
        assert_eq!(events[declared].message, told);
        assert!(
            at("vm-failed").is_none_or(|failed| failed < declared),
            "{events:?}"
        );
    }
}

#[tokio::test]
async fn a_move_that_waited_when_the_scheduler_was_restarted_is_cancelled() {
    let mut cluster = Cluster::start(3, GIB).await;
    let id = waiting(&cluster).await.0.record().id;
    cluster.restart().await;
    let scheduler = &cluster.scheduler;
    until("it has ended", || scheduler.migrations.get(id).is_none()).await;
    let entry = scheduler.vms.get(id).expect("known");
    let ended = entry.migrations().pop().expect("remembered");
    let report = ended.report.expect("a report");
    assert_eq!(report.result(), MigrationResult::Cancelled);
    assert!(
        report
            .reason
            .starts_with("the scheduler was restarted before it began"),
        "{}",
        report.reason
    );
    assert_eq!(running(&cluster.nodes)[..2], [1, 0]);
}
