//! ListMigrations: those under way, then those that have ended, latest first.

use std::collections::HashSet;

use shoal_proto::cluster::{ListMigrationsRequest, ListMigrationsResponse, Migration};
use tonic::Status;

use crate::history::Filter;
use crate::scheduler::Scheduler;

const DEFAULT_LIMIT: usize = 50;
const MOST: usize = 1000;

pub fn call(
    scheduler: &Scheduler,
    request: &ListMigrationsRequest,
) -> Result<ListMigrationsResponse, Status> {
    let limit = match usize::try_from(request.limit) {
        Ok(0) => DEFAULT_LIMIT,
        Ok(limit) if limit <= MOST => limit,
        _ => {
            return Err(Status::invalid_argument(format!(
                "limit: '{}' is not 0 to {MOST}",
                request.limit
            )));
        }
    };
    let filter = Filter {
        vm: (!request.vm.is_empty()).then(|| request.vm.clone()),
        node: (!request.node.is_empty()).then(|| request.node.clone()),
    };
    if filter.node.is_some() {
        super::find_node(scheduler, &request.node)?;
    }
    // Those that end in between are in both: the history is looked at later.
    let running = running(scheduler)
        .into_iter()
        .filter(|migration| filter.matches(migration));
    let ended = if request.running_only {
        Vec::new()
    } else {
        scheduler.history.list(&filter, limit)
    };
    let over: HashSet<&str> = ended.iter().map(|migration| migration.id.as_str()).collect();
    let mut migrations: Vec<Migration> = running
        .filter(|migration| !over.contains(migration.id.as_str()))
        .collect();
    migrations.extend(ended.iter().map(|migration| migration.as_ref().clone()));
    migrations.truncate(limit);
    if migrations.is_empty() && filter.vm.is_some() && scheduler.history.list(&filter, 1).is_empty() {
        // Says so if there is no such VM.
        super::find_vm(scheduler, &request.vm)?;
    }
    Ok(ListMigrationsResponse { migrations })
}

/// Those under way, latest first.
pub fn running(scheduler: &Scheduler) -> Vec<Migration> {
    let name = |vm| {
        let entry = scheduler.vms.get(vm);
        entry.map_or_else(String::new, |entry| entry.record().name.to_string())
    };
    let open = scheduler.migrations.list();
    open.iter()
        .map(|open| open.to_wire(&name(open.intent.vm)))
        .collect()
}
