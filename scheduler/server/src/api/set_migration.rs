//! SetMigration: changes the policy of a migration while it runs.

use std::sync::Arc;

use shoal_proto::cluster::SetMigrationRequest;
use shoal_proto::vm::MigrationPolicy;
use tonic::Status;

use super::errors;
use crate::migrations::OpenMigration;
use crate::policy;
use crate::record::Intent;
use crate::scheduler::{Scheduler, Shared};
use crate::store::Write;

pub async fn call(scheduler: &Shared, request: &SetMigrationRequest) -> Result<MigrationPolicy, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    let change = request.policy.unwrap_or_default();
    check(&change)?;
    let open = super::find_open_migration(scheduler, &entry.record())?;
    let shared = Arc::clone(scheduler);
    // On its own task: what the source was told is also recorded if the caller goes away.
    tokio::spawn(async move { set(&shared, &open, change).await })
        .await
        .map_err(super::ended)?
}

fn check(change: &MigrationPolicy) -> Result<(), Status> {
    policy::check(change).map_err(|error| errors::field(&error))?;
    for (field, is_set) in [
        ("connections", change.connections.is_some()),
        ("compression", change.compression != 0),
        ("verify", change.verify != 0),
    ] {
        if is_set {
            return Err(Status::invalid_argument(format!(
                "{field}: cannot change while a migration runs; it holds from its start"
            )));
        }
    }
    if *change == MigrationPolicy::default() {
        return Err(Status::invalid_argument("policy: nothing is set in it"));
    }
    Ok(())
}

async fn set(
    scheduler: &Scheduler,
    open: &OpenMigration,
    change: MigrationPolicy,
) -> Result<MigrationPolicy, Status> {
    let intent = &open.intent;
    // What it may use of shared caps is told to it apart from this, once the new cap is known.
    let told = MigrationPolicy {
        bandwidth_bytes_per_second: None,
        ..change
    };
    let was = open.policy();
    let now = policy::merge(&change, &was);
    {
        let mut last_told = open.told.lock().await;
        let waited = open.waits().is_some();
        let told = MigrationPolicy {
            bandwidth_bytes_per_second: share_with(scheduler, open, now, was),
            ..told
        };
        if waited {
            // The source hears of it when it begins.
            return store(scheduler, open, now).await;
        }
        let agent = scheduler.agent(&intent.from).map_err(errors::agent)?;
        let set = agent.set_migration(intent.vm, intent.from_epoch, intent.migration, told);
        match set.await {
            Ok(_) => {
                if told.bandwidth_bytes_per_second.is_some() {
                    *last_told = told.bandwidth_bytes_per_second;
                }
            }
            Err(error) => {
                open.set_policy(was);
                scheduler.share_bandwidth();
                return Err(errors::agent(error));
            }
        }
    }
    store(scheduler, open, now).await
}

async fn store(
    scheduler: &Scheduler,
    open: &OpenMigration,
    now: MigrationPolicy,
) -> Result<MigrationPolicy, Status> {
    if open.view().outcome.is_none() {
        let intent = Arc::new(Intent {
            policy: now,
            ..open.intent.as_ref().clone()
        });
        let stored = scheduler.store.apply(vec![Write::ReplaceIntent(intent)]).await;
        stored.map_err(|error| errors::store(&error))?;
    }
    Ok(now)
}

/// Shows the new policy and shares the network by it; answers the migration's own share if that is another now.
fn share_with(
    scheduler: &Scheduler,
    open: &OpenMigration,
    now: MigrationPolicy,
    was: MigrationPolicy,
) -> Option<u64> {
    let before = open.rate();
    open.set_policy(now);
    scheduler.share_bandwidth();
    let share = open.rate();
    let asked = now.bandwidth_bytes_per_second != was.bandwidth_bytes_per_second;
    share.filter(|_| asked || share != before)
}
