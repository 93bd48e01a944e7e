//! UpdateNode: what an operator wishes for a node. It holds for what is placed and planned from now on.

use std::sync::Arc;

use shoal_proto::cluster::{Node, UpdateNodeRequest};
use tonic::Status;

use super::{errors, labels};
use crate::events::{Kind, NewEvent};
use crate::limits::FieldError;
use crate::nodes::NodeEntry;
use crate::record::{NodeRecord, NodeWishes};
use crate::scheduler::Shared;
use crate::store::Write;
use crate::view;

pub async fn call(scheduler: &Shared, request: UpdateNodeRequest) -> Result<Node, Status> {
    let entry = super::find_node(scheduler, &request.node)?;
    let shared = Arc::clone(scheduler);
    // On its own task: what is stored is also shown if the caller goes away.
    tokio::spawn(async move { update(&shared, &entry, &request).await })
        .await
        .map_err(super::ended)?
}

async fn update(scheduler: &Shared, entry: &NodeEntry, request: &UpdateNodeRequest) -> Result<Node, Status> {
    let _planning = scheduler.planning.lock().await;
    let record = entry.record();
    let wishes = changed(&record, request)?;
    if wishes != record.wishes {
        let name = record.name.clone();
        let message = format!(
            "{name}: labels {}, taints {}, reserved {} bytes and {} thousandths of CPUs",
            or_none(&wishes.labels),
            or_none(&wishes.taints),
            wishes.reserved_memory_bytes,
            wishes.reserved_millicpus
        );
        let record = NodeRecord {
            wishes: wishes.clone(),
            ..record
        };
        let stored = scheduler.store.apply(vec![Write::PutNode(record)]).await;
        stored.map_err(|error| errors::store(&error))?;
        entry.set_wishes(wishes);
        scheduler
            .events
            .publish(NewEvent::new(Kind::NodeUpdated, message).node(&name));
    }
    Ok(view::node(scheduler, entry))
}

fn changed(record: &NodeRecord, request: &UpdateNodeRequest) -> Result<NodeWishes, Status> {
    let now = &record.wishes;
    let reserved_memory_bytes = request.reserved_memory_bytes.unwrap_or(now.reserved_memory_bytes);
    if reserved_memory_bytes > record.memory_bytes {
        let expected = format!("at most the {} that the node lends", record.memory_bytes);
        let error = FieldError::new(
            "reserved_memory_bytes",
            &reserved_memory_bytes.to_string(),
            &expected,
        );
        return Err(errors::field(&error));
    }
    Ok(NodeWishes {
        labels: labels::changed("labels", &now.labels, &request.set_labels, &request.remove_labels)?,
        taints: labels::changed("taints", &now.taints, &request.set_taints, &request.remove_taints)?,
        reserved_memory_bytes,
        reserved_millicpus: match request.reserved_cpus {
            Some(cpus) => millicpus(cpus, record.cpus)?,
            None => now.reserved_millicpus,
        },
    })
}

fn millicpus(cpus: f64, of: u32) -> Result<u32, Status> {
    if !(0.0..=f64::from(of)).contains(&cpus) {
        let expected = format!("0 to the {of} CPUs that the node lends");
        let error = FieldError::new("reserved_cpus", &cpus.to_string(), &expected);
        return Err(errors::field(&error));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    // float casts saturate, and it is in range
    let thousandths = (cpus * 1e3).round() as u32;
    Ok(thousandths)
}

fn or_none(labels: &shoal_plan::Labels) -> String {
    if labels.is_empty() {
        "none".to_owned()
    } else {
        labels.to_string()
    }
}
