//! CancelMigration: asks for it and tells what came of it.

use shoal_proto::cluster::{CancelMigrationRequest, Migration};
use shoal_proto::vm::MigrationResult;
use tonic::Status;

use crate::scheduler::Scheduler;

pub async fn call(scheduler: &Scheduler, request: &CancelMigrationRequest) -> Result<Migration, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    let record = entry.record();
    let open = super::find_open_migration(scheduler, &record)?;
    open.ask(|wish| wish.cancel = true);
    let mut views = open.watch();
    // The sender lives in `open`; the wait ends only with one of these.
    let settled = views
        .wait_for(|view| view.outcome.is_some() || view.post_copy || view.in_doubt.is_some())
        .await;
    let view = settled.map(|view| view.clone()).unwrap_or_default();
    let too_late = |why: &str| Err(Status::failed_precondition(format!("too late to cancel: {why}")));
    let (name, to) = (&record.name, &open.intent.to);
    match view.outcome {
        Some(migration) => {
            let result = migration
                .report
                .as_ref()
                .map(shoal_proto::vm::MigrationReport::result);
            if result == Some(MigrationResult::Completed) {
                too_late(&format!("VM {name} runs on {to}"))
            } else {
                Ok(migration)
            }
        }
        None if view.post_copy => too_late(&format!(
            "VM {name} runs on {to} and fetches the rest of its memory"
        )),
        None => too_late(&format!(
            "VM {name} is in doubt; it goes on when its nodes answer, or decide with `shoal resolve {name}`"
        )),
    }
}
