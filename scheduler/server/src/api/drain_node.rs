//! DrainNode: orders the drain, then tells how it goes. The control loop does the work, also when nobody watches.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use shoal_proto::cluster::{DrainNodeRequest, DrainNodeResponse};
use tonic::Status;

use super::{AnswerStream, errors};
use crate::drain::{self, Progress};
use crate::events::{Kind, NewEvent};
use crate::record::Cordon;
use crate::scheduler::Shared;

/// How often the caller is told.
const INTERVAL: Duration = Duration::from_millis(500);

pub async fn call(
    scheduler: &Shared,
    request: &DrainNodeRequest,
) -> Result<AnswerStream<DrainNodeResponse>, Status> {
    let entry = super::find_node(scheduler, &request.node)?;
    let name = entry.record().name;
    let is_drained = entry.record().cordon == Cordon::Cordoned && drain::is_empty(scheduler, &name);
    if entry.record().cordon != Cordon::Draining && !is_drained {
        let event = NewEvent::new(Kind::NodeDraining, format!("VMs are moved off {name}")).node(&name);
        let set = drain::set_cordon(scheduler, &entry, Cordon::Draining, event).await;
        set.map_err(|error| errors::store(&error))?;
    }
    let scheduler = Arc::clone(scheduler);
    Ok(super::stream(move |sender| async move {
        let before: BTreeSet<String> = names(&scheduler.vms.on_node(&name));
        let mut left = before.clone();
        let mut said = None;
        loop {
            if entry.record().cordon == Cordon::Open {
                let end = given_back(name.as_str(), &names(&scheduler.vms.on_node(&name)));
                let _ = sender.send(Err(end)).await;
                return;
            }
            let progress = drain::progress(&scheduler, &entry).await;
            let now = names(&scheduler.vms.on_node(&name));
            let gone: Vec<&str> = left.difference(&now).map(String::as_str).collect();
            let message = match &progress {
                _ if !gone.is_empty() => format!("gone: {}", gone.join(", ")),
                Progress::Moving => format!("{} to move", now.len()),
                Progress::Empty => {
                    format!("{name} is empty and takes no VMs; undo with `shoal uncordon {name}`")
                }
                Progress::Stuck(why) => why.clone(),
            };
            let done = gone.is_empty() && progress != Progress::Moving;
            let response = DrainNodeResponse {
                moved: count(before.difference(&now).count()),
                remaining: count(now.len()),
                message,
                done,
            };
            if said.as_ref() != Some(&response) && sender.send(Ok(response.clone())).await.is_err() {
                return;
            }
            if done {
                return;
            }
            let at_once = !gone.is_empty();
            said = Some(response);
            left = now;
            if !at_once {
                tokio::select! {
                    () = tokio::time::sleep(INTERVAL) => {}
                    () = sender.closed() => return,
                }
            }
        }
    }))
}

/// The node was uncordoned meanwhile, so nothing moves off it any more.
fn given_back(node: &str, stay: &BTreeSet<String>) -> Status {
    let stay = match stay.len() {
        0 => "no VM is on it now".to_owned(),
        _ => format!(
            "on it stay {}",
            stay.iter().cloned().collect::<Vec<_>>().join(", ")
        ),
    };
    Status::aborted(format!(
        "{node} is not drained any more: it was uncordoned; {stay}"
    ))
}

fn names(vms: &[Arc<crate::vms::VmEntry>]) -> BTreeSet<String> {
    vms.iter().map(|entry| entry.record().name.to_string()).collect()
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
