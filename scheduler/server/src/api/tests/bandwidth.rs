//! A cap that has no room for all migrations that are asked for.

use shoal_proto::LEAST_BANDWIDTH;

use super::*;

fn caps(cluster: u64) -> MigrationDefaults {
    MigrationDefaults {
        cluster_bandwidth_bytes_per_second: Some(cluster),
        ..Default::default()
    }
}

async fn waiting(cluster: &Cluster) -> Vec<String> {
    let running = ListMigrationsRequest {
        running_only: true,
        ..Default::default()
    };
    let all = list(cluster, running).await.into_iter();
    let mut names: Vec<String> = all
        .filter(|migration| !migration.waits.is_empty())
        .map(|migration| migration.vm_name)
        .collect();
    names.sort_unstable();
    names
}

async fn explained(cluster: &Cluster, vm: &str) -> String {
    let request = ExplainVmRequest {
        vm: vm.to_owned(),
        limit: 0,
    };
    let answer = api(cluster).explain_vm(Request::new(request)).await;
    answer.expect("explained").into_inner().verdict
}

async fn shown(cluster: &Cluster, vm: &str) -> String {
    let answer = api(cluster).list_vms(Request::new(ListVmsRequest {})).await;
    let vms = answer.expect("listed").into_inner().vms;
    vms.into_iter()
        .find(|seen| seen.name == vm)
        .expect("there")
        .message
}

#[tokio::test]
async fn what_a_cap_has_no_room_for_waits_says_why_and_begins_when_another_has_ended() {
    let cluster = Cluster::start(2, 1 << 30).await;
    for name in ["a", "b", "c"] {
        start(&cluster, name).await;
    }
    cluster.nodes[0].set_script(Script::GoOn);
    set_defaults(&cluster, caps(LEAST_BANDWIDTH)).await.expect("set");
    let policy = MigrationPolicy::default;
    let urgent = MigrationPolicy {
        priority: Some(9),
        ..policy()
    };
    for name in ["a", "b", "c"] {
        begin(&cluster, name, policy()).await.expect("taken");
    }
    until("the first has begun", || cluster.nodes[0].told().len() == 1).await;
    let told = cluster.nodes[0].told()[0];
    assert_eq!(told.bandwidth_bytes_per_second, Some(LEAST_BANDWIDTH));
    assert_eq!(waiting(&cluster).await, ["b", "c"]);
    for said in [explained(&cluster, "b").await, shown(&cluster, "c").await] {
        assert!(
            said.starts_with("waits to move to node2: the 1.0 MiB/s that all migrations may use"),
            "{said}"
        );
    }

    // One that waits can be changed, which may make it the next, and cancelled.
    assert_eq!(
        set(&cluster, "c", urgent).await.expect("changed").priority,
        Some(9)
    );
    cancel(&cluster, "a").await.expect("cancelled");
    until("the urgent one has begun", || {
        cluster.nodes[0]
            .last_told()
            .iter()
            .any(|policy| policy.priority == Some(9))
    })
    .await;
    assert_eq!(waiting(&cluster).await, ["b"]);
    let ended = cancel(&cluster, "b").await.expect("cancelled");
    assert_eq!(
        ended.report.expect("a report").result(),
        MigrationResult::Cancelled
    );
    assert!(ended.waits.is_empty(), "{:?}", ended.waits);

    // A larger cap has room at once.
    begin(&cluster, "b", policy()).await.expect("taken");
    assert_eq!(waiting(&cluster).await, ["b"]);
    set_defaults(&cluster, caps(3 * LEAST_BANDWIDTH))
        .await
        .expect("set");
    assert!(waiting(&cluster).await.is_empty());
    until("both are told their shares", || {
        let told = cluster.nodes[0].last_told();
        let rates = told.iter().filter_map(|policy| policy.bandwidth_bytes_per_second);
        rates.sum::<u64>() >= 3 * LEAST_BANDWIDTH - 2
    })
    .await;
}

#[tokio::test]
async fn a_guest_that_ends_while_its_migration_waits_is_not_kept_waiting() {
    let cluster = Cluster::start(2, 1 << 30).await;
    for name in ["a", "b"] {
        start(&cluster, name).await;
    }
    cluster.nodes[0].set_script(Script::GoOn);
    set_defaults(&cluster, caps(LEAST_BANDWIDTH)).await.expect("set");
    begin(&cluster, "a", MigrationPolicy::default())
        .await
        .expect("taken");
    begin(&cluster, "b", MigrationPolicy::default())
        .await
        .expect("taken");
    assert_eq!(waiting(&cluster).await, ["b"]);
    cluster.nodes[0].guests_exit(7);
    cluster.report();
    let entry = cluster.scheduler.vms.find("b").expect("there");
    until("its end is known", || entry.record().phase.is_over()).await;
    assert!(waiting(&cluster).await.is_empty());
}
