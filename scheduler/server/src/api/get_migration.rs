//! GetMigration: one, under way or ended, with all that is kept of it.

use shoal_proto::cluster::{GetMigrationRequest, Migration};
use tonic::Status;

use super::{errors, list_migrations};
use crate::history::Found;
use crate::limits::shorten;
use crate::scheduler::Scheduler;

pub async fn call(scheduler: &Scheduler, request: &GetMigrationRequest) -> Result<Migration, Status> {
    let id = request.id.as_str();
    if id.is_empty() {
        return Err(Status::invalid_argument(
            "id: is empty; `shoal migrations` lists them",
        ));
    }
    let mut running = list_migrations::running(scheduler);
    running.retain(|migration| migration.id.starts_with(id));
    let found = scheduler.history.find(id);
    match (running.len(), found) {
        (1, Found::None) => Ok(running.remove(0)),
        // It may have ended between the two looks.
        (_, Found::One(number))
            if running
                .iter()
                .all(|migration| is_ended(scheduler, number, &migration.id)) =>
        {
            match scheduler.store.migration(number).await {
                Ok(Some(migration)) => Ok(migration),
                Ok(None) => Err(unknown(id)),
                Err(error) => Err(errors::store(&error)),
            }
        }
        (0, Found::None) => Err(unknown(id)),
        _ => Err(Status::invalid_argument(format!(
            "id: several migrations begin with '{}'; give more of it",
            shorten(id)
        ))),
    }
}

fn is_ended(scheduler: &Scheduler, number: u64, id: &str) -> bool {
    scheduler
        .history
        .get(number)
        .is_some_and(|migration| migration.id == id)
}

fn unknown(id: &str) -> Status {
    Status::not_found(format!(
        "id: there is no migration '{}'; `shoal migrations` lists those that are kept",
        shorten(id)
    ))
}
