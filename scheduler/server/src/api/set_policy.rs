//! SetPolicy: it holds for what is planned from now on.

use std::sync::Arc;

use shoal_proto::cluster::{SchedulingPolicy, SetPolicyRequest};
use tonic::Status;

use super::errors;
use crate::events::{Kind, NewEvent};
use crate::scheduler::Shared;
use crate::store::Write;

pub async fn call(scheduler: &Shared, request: SetPolicyRequest) -> Result<SchedulingPolicy, Status> {
    let shared = Arc::clone(scheduler);
    // On its own task: what is stored is also shown if the caller goes away.
    tokio::spawn(async move {
        let _changing = shared.policy.changing.lock().await;
        let changed = shared
            .policy
            .change(request)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        if !shared.policy.differs(&changed) {
            return Ok(shared.policy.view());
        }
        let write = Write::PutSchedulingPolicy(changed.set.clone());
        let stored = shared.store.apply(vec![write]).await;
        stored.map_err(|error| errors::store(&error))?;
        let set: Vec<String> = changed
            .set
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let message = if set.is_empty() {
            "nothing is set: all as at the start".to_owned()
        } else {
            format!("set: {}", set.join(" "))
        };
        shared.policy.replace(changed);
        shared.events.publish(NewEvent::new(Kind::PolicyChanged, message));
        Ok(shared.policy.view())
    })
    .await
    .map_err(super::ended)?
}
