//! Whom a migration that failed says something of, and how soon one ends whose source cannot be reached.

use super::*;

/// What is remembered of moves to the second node.
fn remembered(cluster: &Cluster) -> Vec<String> {
    let failing = cluster.scheduler.failures.of(&cluster.nodes[1].record.name);
    failing.iter().map(|(_, why)| why.to_string()).collect()
}

#[tokio::test]
async fn a_source_that_was_never_told_to_start_fails_the_move_and_not_its_destination() {
    let cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    cluster.nodes[0].lose_agent(&cluster.scheduler);
    // The destination would wait for ever.
    let (result, outcome) = migrated(&cluster, &entry).await;
    let reason = outcome.report.expect("a report").reason;
    assert_eq!(result, MigrationResult::Failed);
    assert!(reason.contains("node1 gave no clear answer"), "{reason}");
    assert_eq!(cluster.nodes[1].vmms(), 0, "nothing is left of it there");
    assert_eq!(
        (entry.record().node.as_str(), entry.record().epoch),
        ("node1", Epoch(1))
    );
    assert_eq!(entry.record().phase, Phase::Running);
    assert_eq!(remembered(&cluster), Vec::<String>::new());
}

#[tokio::test]
async fn one_whose_source_falls_silent_can_be_cancelled_all_the_same() {
    let cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    cluster.nodes[0].set_script(Script::GoOn);
    let migration = migrate(&cluster, &entry).await;
    until("it is under way", || !cluster.nodes[0].told().is_empty()).await;
    cluster.nodes[0].set_silent(true);
    migration.ask(|wish| wish.cancel = true);
    let (result, outcome) = outcome(&migration).await;
    let reason = outcome.report.expect("a report").reason;
    assert_eq!(result, MigrationResult::Cancelled, "{reason}");
    assert!(reason.starts_with("cancelled on request"), "{reason}");
    assert_eq!(cluster.nodes[1].vmms(), 0);
    assert_eq!(remembered(&cluster), Vec::<String>::new());
}

#[tokio::test]
async fn a_destination_that_does_not_answer_is_remembered() {
    let cluster = Cluster::start(2, GIB).await;
    let entry = running_vm(&cluster).await;
    cluster.nodes[1].lose_agent(&cluster.scheduler);
    let (result, _) = migrated(&cluster, &entry).await;
    assert_eq!(result, MigrationResult::Failed);
    let why = remembered(&cluster);
    assert!(
        why.len() == 1 && why[0].starts_with("the last move there from node1 failed"),
        "{why:?}"
    );
}

/// What the operator decides says nothing of the node that the VM is not kept on.
#[tokio::test]
async fn a_move_that_an_operator_ends_is_nobodys_failure() {
    let cluster = Cluster::start(2, GIB).await;
    let (_, migration) = in_doubt(&cluster, false).await;
    migration.ask(|wish| wish.keep = Some(cluster.nodes[0].record.name.clone()));
    let (result, _) = outcome(&migration).await;
    assert_eq!(result, MigrationResult::Failed);
    assert_eq!(remembered(&cluster), Vec::<String>::new());
}
