//! What a guest itself missed of a migration. It tells its VMM, in the moments after as well as before; so the
//! destination is asked a while after the end, and the history completed.

use std::sync::Arc;
use std::time::Duration;

use crate::record::Intent;
use crate::scheduler::{Scheduler, Shared};

/// How long after a migration what the guest misses still counts as its doing.
const AFTERMATH: Duration = Duration::from_secs(2);

/// Has it noted, once it is known. If nobody answers then, or the guest says nothing, nothing is.
pub fn note_later(scheduler: &Shared, intent: Arc<Intent>) {
    let scheduler = Arc::clone(scheduler);
    tokio::spawn(async move {
        tokio::time::sleep(AFTERMATH).await;
        if let Some(us) = ask(&scheduler, &intent).await {
            note(&scheduler, &intent, us).await;
        }
    });
}

async fn ask(scheduler: &Scheduler, intent: &Intent) -> Option<u64> {
    let agent = scheduler.agent(&intent.to).ok()?;
    let facts = agent.describe(intent.vm, intent.epoch).await.ok()?;
    let status = facts.status?;
    // With its next migration a VM begins to count again.
    if !status.outgoing_migration_id.is_empty() {
        return None;
    }
    status.guest_gap_us.map(u64::from)
}

async fn note(scheduler: &Scheduler, intent: &Intent, us: u64) {
    let id = intent.migration.to_string();
    let Some(write) = scheduler.history.set_guest_gap(&id, us) else {
        return;
    };
    if let Some(entry) = scheduler.vms.get(intent.vm) {
        entry.set_guest_gap(&id, us);
    }
    scheduler.metrics.count_guest_gap(us);
    if let Err(error) = scheduler.store.apply(vec![write]).await {
        tracing::error!(error = &error as &dyn std::error::Error, migration = %id, "guest gap cannot be stored");
    }
}
