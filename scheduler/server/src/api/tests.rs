//! The calls about migrations, against scripted nodes.

use std::sync::Arc;

use shoal_proto::cluster::cluster_server::Cluster as _;
use shoal_proto::cluster::{
    CancelMigrationRequest, GetMigrationDefaultsRequest, GetMigrationRequest, ListMigrationsRequest,
    MigrateVmRequest, Migration, MigrationDefaults, SetMigrationRequest,
};
use shoal_proto::vm::{MigrationPolicy, MigrationResult, OnStall};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status};

use super::ClusterApi;
use crate::execute::launch;
use crate::testing::{Cluster, Script, until};
use crate::vms::VmEntry;

const MIB: u64 = 1 << 20;

async fn start(cluster: &Cluster, name: &str) -> Arc<VmEntry> {
    let first = cluster.nodes[0].record.name.clone();
    let draft = cluster.draft(name, 64 * MIB);
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

fn api(cluster: &Cluster) -> ClusterApi {
    ClusterApi(Arc::clone(&cluster.scheduler))
}

/// Begins a migration and does not wait for its end.
async fn begin(cluster: &Cluster, vm: &str, policy: MigrationPolicy) -> Result<(), Status> {
    let request = MigrateVmRequest {
        vm: vm.to_owned(),
        to_node: "node2".to_owned(),
        policy: Some(policy),
    };
    api(cluster).migrate_vm(Request::new(request)).await.map(drop)
}

async fn migrate(cluster: &Cluster, vm: &str, to: &str) -> Migration {
    let request = MigrateVmRequest {
        vm: vm.to_owned(),
        to_node: to.to_owned(),
        policy: None,
    };
    let answer = api(cluster)
        .migrate_vm(Request::new(request))
        .await
        .expect("begun");
    let messages: Vec<_> = answer.into_inner().collect().await;
    let last = messages.into_iter().next_back().expect("a message");
    last.expect("no error").outcome.expect("an outcome")
}

async fn list(cluster: &Cluster, request: ListMigrationsRequest) -> Vec<Migration> {
    let answer = api(cluster).list_migrations(Request::new(request)).await;
    answer.expect("listed").into_inner().migrations
}

async fn get(cluster: &Cluster, id: &str) -> Result<Migration, Status> {
    let request = GetMigrationRequest { id: id.to_owned() };
    api(cluster)
        .get_migration(Request::new(request))
        .await
        .map(|answer| answer.into_inner())
}

async fn cancel(cluster: &Cluster, vm: &str) -> Result<Migration, Status> {
    let request = CancelMigrationRequest { vm: vm.to_owned() };
    api(cluster)
        .cancel_migration(Request::new(request))
        .await
        .map(|answer| answer.into_inner())
}

async fn set(cluster: &Cluster, vm: &str, policy: MigrationPolicy) -> Result<MigrationPolicy, Status> {
    let request = SetMigrationRequest {
        vm: vm.to_owned(),
        policy: Some(policy),
    };
    api(cluster)
        .set_migration(Request::new(request))
        .await
        .map(|answer| answer.into_inner())
}

async fn set_defaults(cluster: &Cluster, defaults: MigrationDefaults) -> Result<MigrationDefaults, Status> {
    let answer = api(cluster).set_migration_defaults(Request::new(defaults)).await;
    answer.map(|answer| answer.into_inner())
}

#[tokio::test]
async fn the_history_is_listed_latest_first_and_shown_whole_also_after_a_restart() {
    let mut cluster = Cluster::start(2, 1 << 30).await;
    start(&cluster, "web").await;
    let first = migrate(&cluster, "web", "node2").await;
    let second = migrate(&cluster, "web", "node1").await;
    start(&cluster, "db").await;
    let third = migrate(&cluster, "db", "node2").await;
    for _ in 0..2 {
        let ids = |migrations: Vec<Migration>| migrations.into_iter().map(|m| m.id).collect::<Vec<_>>();
        let all = list(&cluster, ListMigrationsRequest::default()).await;
        assert!(
            all.iter()
                .all(|m| m.report.as_ref().is_some_and(|report| report.samples.is_empty()))
        );
        assert_eq!(ids(all), [&third, &second, &first].map(|m| m.id.clone()));
        let of_web = ListMigrationsRequest {
            vm: "web".to_owned(),
            limit: 1,
            ..Default::default()
        };
        assert_eq!(
            ids(list(&cluster, of_web).await),
            std::slice::from_ref(&second.id)
        );
        let elsewhere = ListMigrationsRequest {
            node: "node1".to_owned(),
            running_only: true,
            ..Default::default()
        };
        assert!(list(&cluster, elsewhere).await.is_empty());
        let whole = get(&cluster, &first.id).await.expect("kept");
        assert_eq!(whole.report.as_ref().map(|report| report.samples.len()), Some(1));
        assert_eq!(
            whole.policy.map(|policy| policy.on_stall()),
            Some(OnStall::Cancel)
        );
        assert_eq!(
            get(&cluster, &first.id[..8])
                .await
                .expect("its beginning is enough")
                .id,
            first.id
        );
        cluster.restart();
    }
    for (id, code) in [("", Code::InvalidArgument), ("nobody", Code::NotFound)] {
        assert_eq!(get(&cluster, id).await.expect_err(id).code(), code);
    }
    let nobody = ListMigrationsRequest {
        vm: "nobody".to_owned(),
        ..Default::default()
    };
    let answer = api(&cluster).list_migrations(Request::new(nobody)).await;
    assert_eq!(answer.expect_err("no such VM").code(), Code::NotFound);
}

#[tokio::test]
async fn a_running_migration_is_listed_shown_and_cancelled() {
    let cluster = Cluster::start(2, 1 << 30).await;
    start(&cluster, "web").await;
    let refused = cancel(&cluster, "web").await.expect_err("nothing to cancel");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    cluster.nodes[0].set_script(Script::GoOn);
    begin(&cluster, "web", MigrationPolicy::default())
        .await
        .expect("begun");
    let running = ListMigrationsRequest {
        running_only: true,
        ..Default::default()
    };
    let listed = list(&cluster, running.clone()).await;
    assert_eq!((listed.len(), listed[0].vm_name.as_str()), (1, "web"));
    let shown = get(&cluster, &listed[0].id).await.expect("it runs");
    assert!(shown.report.is_none() && shown.policy.is_some());

    let ended = cancel(&cluster, "web").await.expect("cancelled");
    assert_eq!(
        ended.report.map(|report| report.result()),
        Some(MigrationResult::Cancelled)
    );
    assert!(list(&cluster, running).await.is_empty());
    assert_eq!(cluster.nodes[0].running(), 1, "the source goes on");
}

#[tokio::test]
async fn a_migration_in_post_copy_is_too_late_to_cancel() {
    let cluster = Cluster::start(2, 1 << 30).await;
    let entry = start(&cluster, "web").await;
    cluster.nodes[0].set_script(Script::PostCopy);
    begin(&cluster, "web", MigrationPolicy::default())
        .await
        .expect("begun");
    until("it has started", || !cluster.nodes[0].told().is_empty()).await;
    let refused = cancel(&cluster, "web").await.expect_err("too late");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("too late"), "{refused}");
    cluster.nodes[0].end_post_copy();
    until("it is over", || {
        cluster.scheduler.migrations.get(entry.record().id).is_none()
    })
    .await;
    assert_eq!(entry.record().node.as_str(), "node2");
}

#[tokio::test]
async fn a_policy_is_checked_resolved_and_changed_while_it_holds() {
    let cluster = Cluster::start(2, 1 << 30).await;
    start(&cluster, "web").await;
    cluster.nodes[0].set_script(Script::GoOn);
    let bad = MigrationPolicy {
        priority: Some(10),
        ..Default::default()
    };
    let refused = begin(&cluster, "web", bad).await.expect_err("out of range");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().starts_with("priority: "), "{refused}");

    let defaults = MigrationDefaults {
        policy: Some(MigrationPolicy {
            timeout_ms: Some(77_000),
            ..Default::default()
        }),
        ..Default::default()
    };
    set_defaults(&cluster, defaults).await.expect("set");
    let asked = MigrationPolicy {
        on_stall: OnStall::Force.into(),
        bandwidth_bytes_per_second: Some(30 * MIB),
        ..Default::default()
    };
    begin(&cluster, "web", asked).await.expect("begun");
    until("it has started", || !cluster.nodes[0].told().is_empty()).await;
    let told = cluster.nodes[0].told()[0];
    assert_eq!((told.timeout_ms, told.on_stall()), (Some(77_000), OnStall::Force));
    assert_eq!(told.bandwidth_bytes_per_second, Some(30 * MIB));

    let change = MigrationPolicy {
        bandwidth_bytes_per_second: Some(20 * MIB),
        max_downtime_ms: Some(5),
        ..Default::default()
    };
    let now = set(&cluster, "web", change).await.expect("changed");
    assert_eq!(
        (
            now.bandwidth_bytes_per_second,
            now.max_downtime_ms,
            now.on_stall()
        ),
        (Some(20 * MIB), Some(5), OnStall::Force)
    );
    let told = cluster.nodes[0].told().pop().expect("told");
    assert_eq!(
        told,
        MigrationPolicy {
            on_stall: 0,
            ..change
        }
    );
    for (change, field) in [
        (
            MigrationPolicy {
                connections: Some(2),
                ..Default::default()
            },
            "connections",
        ),
        (
            MigrationPolicy {
                bandwidth_bytes_per_second: Some(3),
                ..Default::default()
            },
            "bandwidth",
        ),
        (MigrationPolicy::default(), "policy"),
    ] {
        let refused = set(&cluster, "web", change).await.expect_err(field);
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with(field), "{refused}");
    }
    let ended = cancel(&cluster, "web").await.expect("cancelled");
    assert_eq!(
        ended.policy,
        Some(now),
        "the history has the policy that held at the end"
    );
}

#[tokio::test]
async fn caps_are_shared_and_shared_again_as_migrations_come_and_go() {
    let cluster = Cluster::start(2, 1 << 30).await;
    for name in ["a", "b"] {
        start(&cluster, name).await;
    }
    cluster.nodes[0].set_script(Script::GoOn);
    let caps = MigrationDefaults {
        link_bandwidth_bytes_per_second: Some(60 * MIB),
        ..Default::default()
    };
    set_defaults(&cluster, caps).await.expect("set");
    begin(&cluster, "a", MigrationPolicy::default())
        .await
        .expect("begun");
    let last = || -> Vec<u64> {
        let mut shares: Vec<u64> = cluster.nodes[0]
            .last_told()
            .iter()
            .filter_map(|policy| policy.bandwidth_bytes_per_second)
            .map(|share| share / MIB)
            .collect();
        shares.sort_unstable();
        shares
    };
    until("alone it has the link", || last() == [60]).await;
    let modest = MigrationPolicy {
        priority: Some(2),
        ..Default::default()
    };
    begin(&cluster, "b", modest).await.expect("begun");
    until("they share it by priority", || last() == [20, 40]).await;
    let caps = MigrationDefaults {
        cluster_bandwidth_bytes_per_second: Some(30 * MIB),
        ..Default::default()
    };
    set_defaults(&cluster, caps).await.expect("set");
    until("the cluster's cap holds as well", || last() == [10, 20]).await;
    cancel(&cluster, "a").await.expect("cancelled");
    until("what one leaves the other gets", || last().contains(&30)).await;
}

#[tokio::test]
async fn defaults_are_kept_over_a_restart() {
    let mut cluster = Cluster::start(1, 1 << 30).await;
    let set = MigrationDefaults {
        policy: Some(MigrationPolicy {
            max_downtime_ms: Some(20),
            ..Default::default()
        }),
        ..Default::default()
    };
    let answered = set_defaults(&cluster, set).await.expect("set");
    cluster.restart();
    let request = Request::new(GetMigrationDefaultsRequest {});
    let now = api(&cluster)
        .get_migration_defaults(request)
        .await
        .expect("got")
        .into_inner();
    assert_eq!(now, answered);
    let policy = now.policy.expect("a policy");
    assert_eq!(
        (policy.max_downtime_ms, policy.timeout_ms),
        (Some(20), Some(600_000))
    );
    let bad = MigrationDefaults {
        policy: Some(MigrationPolicy {
            timeout_ms: Some(0),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(
        set_defaults(&cluster, bad).await.expect_err("bad").code(),
        Code::InvalidArgument
    );
}
