//! SetMigrationDefaults: they hold for migrations that begin from now on; the caps at once.

use std::sync::Arc;

use shoal_proto::cluster::MigrationDefaults;
use tonic::Status;

use super::errors;
use crate::policy;
use crate::scheduler::Shared;
use crate::store::Write;

pub async fn call(scheduler: &Shared, request: MigrationDefaults) -> Result<MigrationDefaults, Status> {
    let shared = Arc::clone(scheduler);
    // On its own task: what is stored is also shown if the caller goes away.
    tokio::spawn(async move {
        let _changing = shared.defaults.changing.lock().await;
        let defaults =
            policy::change(&shared.defaults.set(), &request).map_err(|error| errors::field(&error))?;
        let write = Write::PutMigrationDefaults(Box::new(defaults));
        shared
            .store
            .apply(vec![write])
            .await
            .map_err(|error| errors::store(&error))?;
        shared.defaults.replace(defaults);
        shared.share_bandwidth();
        Ok(policy::whole(&defaults))
    })
    .await
    .map_err(super::ended)?
}
