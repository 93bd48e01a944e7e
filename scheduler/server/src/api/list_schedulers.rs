//! ListSchedulers: by address.

use shoal_proto::cluster::ListSchedulersResponse;
use tonic::Status;

use super::{Role, errors};

pub async fn call(role: &Role) -> Result<ListSchedulersResponse, Status> {
    let (schedulers, term) = match role {
        Role::Leader(scheduler) => (&scheduler.schedulers, scheduler.store.term().0),
        Role::Follower(follower) => (follower.schedulers(), 0),
    };
    let store = schedulers.store();
    let schedulers = schedulers.list(term).await;
    Ok(ListSchedulersResponse {
        schedulers: schedulers.map_err(|error| errors::store(&error))?,
        store,
    })
}
