//! The calls about migrations, against scripted nodes.

mod admission;
mod bandwidth;
mod kvm;
mod preempt;
mod suspend;

use super::Role;
use std::sync::Arc;

use shoal_proto::cluster::cluster_server::Cluster as _;
use shoal_proto::cluster::move_vms_request::Direction;
use shoal_proto::cluster::{
    CancelMigrationRequest, DrainNodeRequest, ExplainVmRequest, GetMigrationDefaultsRequest,
    GetMigrationRequest, GetPolicyRequest, ListMigrationsRequest, ListQueueRequest, ListVmsRequest,
    MigrateVmRequest, Migration, MigrationDefaults, MoveVmsRequest, RemoveVmRequest, SetMigrationRequest,
    SetPolicyRequest, StopVmRequest, UncordonNodeRequest, UpdateNodeRequest, UpdateVmRequest, VmPhase,
};
use shoal_proto::vm::{MigrationPolicy, MigrationResult, OnStall};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status};

use super::ClusterApi;
use crate::execute::launch;
use crate::moves::{self, MoveOrder};
use crate::queue;
use crate::record::Cordon;
use crate::store::Write;
use crate::testing::{Cluster, Script, until};
use crate::vms::VmEntry;

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn a_drain_ends_when_its_node_is_uncordoned_and_says_who_stays() {
    let cluster = Cluster::start(2, 1024 * MIB).await;
    start(&cluster, "a").await;
    let node = "node1".to_owned();
    // Nothing carries it out: without the uncordon it would not end.
    let request = Request::new(DrainNodeRequest { node: node.clone() });
    let drain = api(&cluster).drain_node(request).await;
    let mut steps = drain.expect("it begins").into_inner();
    let first = steps.next().await.expect("a step").expect("no error");
    assert_eq!((first.done, first.remaining), (false, 1), "{first:?}");
    let request = Request::new(UncordonNodeRequest { node });
    let uncordoned = api(&cluster).uncordon_node(request).await;
    uncordoned.expect("uncordoned");

    let ended = steps.next().await.expect("an end").expect_err("not done");
    assert_eq!(ended.code(), Code::Aborted, "{ended}");
    assert_eq!(
        ended.message(),
        "node1 is not drained any more: it was uncordoned; on it stay a"
    );
    assert!(steps.next().await.is_none(), "the stream has ended");
}

#[tokio::test]
async fn a_node_that_is_open_and_one_that_is_lost_are_not_said_to_take_vms_again() {
    let cluster = Cluster::start(1, 1024 * MIB).await;
    let events = || cluster.scheduler.events.after(0);
    let uncordon = async || {
        let request = UncordonNodeRequest {
            node: "node1".to_owned(),
        };
        let uncordoned = api(&cluster).uncordon_node(Request::new(request)).await;
        uncordoned.expect("uncordoned");
    };
    let before = events().len();
    uncordon().await;
    assert_eq!(events().len(), before, "nothing has changed: {:?}", events());
    let entry = cluster.scheduler.nodes.list().remove(0);
    entry.set_cordon(Cordon::Cordoned);
    entry.silence(std::time::Duration::from_secs(40));
    uncordon().await;
    let last = events().pop().expect("an event").message;
    assert!(last.contains("does not answer"), "{last}");
}

#[tokio::test]
async fn an_expel_from_a_node_whose_agent_has_died_ends_with_the_reason() {
    let cluster = Cluster::start(2, 1 << 30).await;
    start(&cluster, "a").await;
    cluster.nodes[0].lose_agent(&cluster.scheduler);
    let expel = async || {
        let request = MoveVmsRequest {
            node: "node1".to_owned(),
            direction: Direction::Expel.into(),
        };
        let answer = api(&cluster).move_vms(Request::new(request)).await;
        let steps: Vec<_> = answer.expect("begun").into_inner().collect().await;
        steps.into_iter().next_back().expect("a step").expect("good")
    };
    // It has reported a moment ago.
    let end = expel().await;
    assert!(end.done && (end.moved, end.remaining) == (0, 1), "{end:?}");
    assert!(end.message.contains("node1 gave no clear answer"), "{end:?}");
    // It is known to be silent.
    let entry = cluster.scheduler.nodes.list().remove(0);
    entry.silence(std::time::Duration::from_secs(6));
    let end = expel().await;
    assert!(end.done && (end.moved, end.remaining) == (0, 1), "{end:?}");
    assert!(end.message.contains("node1 is unreachable"), "{end:?}");
}

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
    ClusterApi::new(Role::Leader(Arc::clone(&cluster.scheduler)))
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
        cluster.restart().await;
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
    cluster.restart().await;
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

#[tokio::test]
async fn a_locked_vm_stays_until_it_is_unlocked() {
    let cluster = Cluster::start(2, 1 << 30).await;
    let vm = start(&cluster, "a").await;
    let update = |locked| {
        let request = UpdateVmRequest {
            vm: "a".to_owned(),
            locked: Some(locked),
            priority: None,
        };
        let api = api(&cluster);
        async move {
            api.update_vm(Request::new(request))
                .await
                .map(tonic::Response::into_inner)
        }
    };
    assert!(update(true).await.expect("locked").locked);
    let refused = begin(&cluster, "a", MigrationPolicy::default()).await;
    let text = refused.expect_err("locked").message().to_owned();
    assert!(text.contains("it is locked to its node"), "{text}");
    assert!(!update(false).await.expect("unlocked").locked);
    migrate(&cluster, "a", "node2").await;
    assert_eq!(vm.record().node.as_str(), "node2");
}

#[tokio::test]
async fn what_is_wished_for_nodes_and_vms_decides_where_they_go() {
    let cluster = Cluster::start(2, 1 << 30).await;
    cluster.report();
    let request = UpdateNodeRequest {
        node: "node2".to_owned(),
        set_labels: vec!["zone=b".to_owned()],
        set_taints: vec!["gpu".to_owned()],
        reserved_memory_bytes: Some(512 * MIB),
        reserved_cpus: Some(0.5),
        ..Default::default()
    };
    let update = |request: UpdateNodeRequest| {
        let api = api(&cluster);
        async move {
            api.update_node(Request::new(request))
                .await
                .map(tonic::Response::into_inner)
        }
    };
    let node = update(request.clone()).await.expect("updated");
    assert_eq!(
        (node.labels, node.taints),
        (vec!["zone=b".to_owned()], vec!["gpu".to_owned()])
    );
    assert_eq!((node.reserved_memory_bytes, node.reserved_cpus), (512 * MIB, 0.5));

    let mut draft = cluster.draft("picky", 64 * MIB);
    let rules = |tolerations: &str| {
        Some(Arc::new(shoal_plan::Rules {
            selector: shoal_plan::labels::parse_terms("zone=b").expect("terms"),
            tolerations: shoal_plan::labels::parse_terms(tolerations).expect("terms"),
            ..Default::default()
        }))
    };
    draft.wishes.rules = rules("other");
    let refused = launch::submit(&cluster.scheduler, draft.clone(), None).await;
    let text = refused.expect_err("not tolerated").to_string();
    assert!(text.contains("node1: its labels are not 'zone=b'"), "{text}");
    assert!(text.contains("node2: it has the taint 'gpu'"), "{text}");
    draft.wishes.rules = rules("gpu");
    let (entry, _guard) = launch::submit(&cluster.scheduler, draft, None)
        .await
        .expect("placed");
    assert_eq!(entry.record().node.as_str(), "node2");

    let large = cluster.draft("large", 800 * MIB);
    let on_node2 = "node2".parse().expect("a name");
    let refused = launch::submit(&cluster.scheduler, large, Some(&on_node2)).await;
    assert!(refused.is_err(), "half of it is reserved, and tainted");

    for (bad, field) in [
        (
            UpdateNodeRequest {
                set_labels: vec!["=".to_owned()],
                ..request.clone()
            },
            "labels: ",
        ),
        (
            UpdateNodeRequest {
                set_taints: vec!["a b".to_owned()],
                ..request.clone()
            },
            "taints: ",
        ),
        (
            UpdateNodeRequest {
                reserved_cpus: Some(f64::NAN),
                ..request.clone()
            },
            "reserved_cpus: ",
        ),
        (
            UpdateNodeRequest {
                reserved_memory_bytes: Some(u64::MAX),
                ..request.clone()
            },
            "reserved_memory_bytes: ",
        ),
    ] {
        let status = update(bad).await.expect_err(field);
        assert!(
            status.code() == Code::InvalidArgument && status.message().starts_with(field),
            "{status}"
        );
    }
    let removed = UpdateNodeRequest {
        node: "node2".to_owned(),
        remove_labels: vec!["zone".to_owned()],
        remove_taints: vec!["gpu".to_owned()],
        ..Default::default()
    };
    let node = update(removed).await.expect("updated");
    assert!(node.labels.is_empty() && node.taints.is_empty() && node.reserved_memory_bytes > 0);
}

#[tokio::test]
async fn the_policy_is_shown_changed_and_kept() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let set = |name: &str, value: &str| {
        let request = SetPolicyRequest {
            values: [(name.to_owned(), value.to_owned())].into(),
            reset: Vec::new(),
        };
        let api = api(&cluster);
        async move { api.set_policy(Request::new(request)).await }
    };
    set("n_plus_one", "on").await.expect("set");
    let refused = set("usher_threshold", "7").await.expect_err("out of range");
    assert_eq!(refused.message(), "policy usher_threshold: must be 0.1 to 1");
    let shown = api(&cluster).get_policy(Request::new(GetPolicyRequest {})).await;
    let fields = shown.expect("shown").into_inner().fields;
    let set: Vec<_> = fields
        .iter()
        .filter(|field| field.set)
        .map(|field| field.name.as_str())
        .collect();
    assert_eq!(set, ["n_plus_one"]);
    assert!(cluster.scheduler.policy.get().n_plus_one);
    // With one node nothing would be left if it died.
    cluster.report();
    let draft = cluster.draft("a", 64 * MIB);
    let refused = launch::submit(&cluster.scheduler, draft, None).await;
    let text = refused.expect_err("not N+1").to_string();
    assert!(
        text.contains("node1: the cluster would not fit any more if node1 died"),
        "{text}"
    );
}

#[tokio::test]
async fn expelled_vms_leave_and_are_brought_back() {
    let cluster = Cluster::start(2, 1 << 30).await;
    let vm = start(&cluster, "a").await;
    let locked = start(&cluster, "stays").await;
    // What has moved may move again at once.
    let request = SetPolicyRequest {
        values: [("retry_after".to_owned(), "0s".to_owned())].into(),
        reset: Vec::new(),
    };
    api(&cluster)
        .set_policy(Request::new(request))
        .await
        .expect("set");
    let request = UpdateVmRequest {
        vm: "stays".to_owned(),
        locked: Some(true),
        priority: Some(9),
    };
    api(&cluster)
        .update_vm(Request::new(request))
        .await
        .expect("locked");
    let move_vms = |direction: Direction| {
        let request = MoveVmsRequest {
            node: "node1".to_owned(),
            direction: direction.into(),
        };
        let api = api(&cluster);
        async move {
            let answer = api.move_vms(Request::new(request)).await.expect("begun");
            let steps: Vec<_> = answer.into_inner().collect().await;
            steps.into_iter().next_back().expect("a step").expect("good")
        }
    };
    cluster.report();
    let end = move_vms(Direction::Expel).await;
    assert!(end.done && (end.moved, end.remaining) == (1, 1), "{end:?}");
    assert!(end.message.contains("it is locked to its node"), "{end:?}");
    assert_eq!(vm.record().node.as_str(), "node2");
    assert_eq!(locked.record().node.as_str(), "node1");

    let why = api(&cluster)
        .explain_vm(Request::new(ExplainVmRequest {
            vm: "a".to_owned(),
            limit: 0,
        }))
        .await
        .expect("explained")
        .into_inner();
    assert!(
        why.placement
            .starts_with("moved here from node1: expel: node1 expels its VMs"),
        "{why:?}"
    );
    assert!(
        why.verdict.starts_with("stays: ") && why.nodes.len() == 1,
        "{why:?}"
    );

    cluster.report();
    let end = move_vms(Direction::Bring).await;
    assert!(end.done && (end.moved, end.remaining) == (1, 0), "{end:?}");
    assert_eq!(vm.record().node.as_str(), "node1");
    let refused = MoveVmsRequest {
        node: "node1".to_owned(),
        direction: 9,
    };
    assert!(api(&cluster).move_vms(Request::new(refused)).await.is_err());
}

/// As a scheduler leaves it that dies before it has begun.
#[tokio::test]
async fn moves_that_were_asked_for_are_gone_on_with_by_the_next_scheduler() {
    let mut cluster = Cluster::start(2, 1 << 30).await;
    start(&cluster, "a").await;
    start(&cluster, "b").await;
    let order = MoveOrder {
        node: cluster.nodes[0].record.name.clone(),
        direction: moves::Direction::Expel,
    };
    let write = Write::PutMoveOrder(order);
    cluster.scheduler.store.apply(vec![write]).await.expect("stored");
    cluster.restart().await;
    let nodes = |cluster: &Cluster| {
        ["a", "b"].map(|name| {
            let entry = cluster.scheduler.vms.find(name).expect("kept");
            entry.record().node.to_string()
        })
    };
    until("both to be moved", || {
        cluster.report();
        nodes(&cluster) == ["node2", "node2"]
    })
    .await;
    let wait = async {
        while !cluster
            .scheduler
            .store
            .load()
            .await
            .expect("read")
            .orders
            .is_empty()
        {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), wait)
        .await
        .expect("what is done is not done again");
}

#[tokio::test]
async fn what_fits_nowhere_waits_for_its_turn() {
    let cluster = Cluster::start(1, 1 << 30).await;
    start(&cluster, "large").await;
    let request = UpdateNodeRequest {
        node: "node1".to_owned(),
        reserved_memory_bytes: Some(900 * MIB),
        ..Default::default()
    };
    let api = api(&cluster);
    api.update_node(Request::new(request.clone()))
        .await
        .expect("reserved");
    let mut draft = cluster.draft("waits", 256 * MIB);
    draft.wishes.labels = "user=ada".parse().expect("labels");
    cluster.report();
    let waiting = queue::enqueue(&cluster.scheduler, draft, None)
        .await
        .expect("queued");
    assert!(
        waiting
            .message()
            .starts_with("place 1 in the queue: nothing fits: node1: "),
        "{waiting:?}"
    );
    let draft = cluster.draft("waits", 64 * MIB);
    let taken = launch::submit(&cluster.scheduler, draft, None)
        .await
        .expect_err("taken");
    assert!(taken.to_string().contains("a VM named 'waits' exists"), "{taken}");
    cluster.report();
    let second = cluster.draft("second", 512 * MIB);
    queue::enqueue(&cluster.scheduler, second, None)
        .await
        .expect("queued");

    let listed = api
        .list_queue(Request::new(ListQueueRequest {}))
        .await
        .expect("listed");
    let listed = listed.into_inner().vms;
    // Who has no label runs one VM already.
    let names: Vec<_> = listed
        .iter()
        .map(|vm| (vm.place, vm.name.as_str(), vm.user.as_str()))
        .collect();
    assert_eq!(names, [(1, "waits", "ada"), (2, "second", "")]);
    let vms = api
        .list_vms(Request::new(ListVmsRequest {}))
        .await
        .expect("listed")
        .into_inner()
        .vms;
    assert_eq!(vms.iter().filter(|vm| vm.phase() == VmPhase::Pending).count(), 2);
    let stop = StopVmRequest {
        vm: "second".to_owned(),
    };
    let refused = api.stop_vm(Request::new(stop)).await.expect_err("waits");
    assert!(refused.message().contains("waits for room"), "{refused}");
    let remove = RemoveVmRequest {
        vm: "second".to_owned(),
        force: false,
    };
    api.remove_vm(Request::new(remove)).await.expect("taken out");
    assert_eq!(cluster.scheduler.queue.list().len(), 1);

    let free = UpdateNodeRequest {
        reserved_memory_bytes: Some(0),
        ..request
    };
    api.update_node(Request::new(free)).await.expect("free again");
    cluster.report();
    queue::advance(&cluster.scheduler).await;
    assert!(cluster.scheduler.queue.is_empty());
    let started = cluster.scheduler.vms.find("waits").expect("started");
    until("it to run", || {
        started.record().phase == crate::record::Phase::Running
    })
    .await;
    assert_eq!(
        started.record().home.as_ref().map(ToString::to_string).as_deref(),
        Some("node1")
    );
}

#[tokio::test]
async fn a_start_that_fails_goes_to_the_next_best_node_which_is_then_the_first_choice() {
    let cluster = Cluster::start(2, 1 << 30).await;
    let scheduler = &cluster.scheduler;
    cluster.nodes[0].refuse_launches();
    for name in ["one", "two"] {
        let entry = super::run_vm::run_now(scheduler, cluster.draft(name, 64 * MIB), None).await;
        assert_eq!(entry.expect("started").record().node.as_str(), "node2", "{name}");
    }
    let shown = crate::view::nodes(scheduler);
    assert!(
        shown[0].trouble.starts_with("the last start there failed"),
        "{:?}",
        shown[0].trouble
    );
    assert_eq!(shown[1].trouble, "");
    // Who asks for it is told what it says.
    let first = &cluster.nodes[0].record.name;
    let refused =
        super::run_vm::run_now(scheduler, cluster.draft("three", 64 * MIB), Some(first.clone())).await;
    assert!(
        matches!(refused, Err(launch::LaunchError::Failed { .. })),
        "{refused:?}"
    );
    // With nothing else left the reason is that of the node.
    cluster.nodes[1].refuse_launches();
    let refused = super::run_vm::run_now(scheduler, cluster.draft("four", 64 * MIB), None).await;
    let refused = refused.expect_err("no node").to_string();
    assert!(refused.contains("node2 could not start VM four"), "{refused}");
    let refused = super::run_vm::run_now(scheduler, cluster.draft("five", 64 * MIB), None).await;
    let refused = refused.expect_err("no node").to_string();
    assert!(refused.contains("tried again in"), "{refused}");
}
