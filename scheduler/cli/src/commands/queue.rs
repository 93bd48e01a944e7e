//! `shoal queue`

use clap::Args;
use serde::Serialize;
use shoal_proto::cluster::{ListQueueRequest, QueuedVm};

use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use crate::view::PreemptedView;

/// Arguments of `queue`.
#[derive(Debug, Args)]
pub struct QueueArgs {}

#[derive(Debug, Serialize)]
struct QueuedView {
    place: u32,
    name: String,
    user: String,
    priority: u32,
    cpus: u32,
    memory_bytes: u64,
    waiting_seconds: u64,
    reason: String,
    /// How often it was stopped for others; null if it has not run yet.
    preempted: Option<PreemptedView>,
}

impl From<QueuedVm> for QueuedView {
    fn from(vm: QueuedVm) -> Self {
        Self {
            place: vm.place,
            name: vm.name,
            user: vm.user,
            priority: vm.priority,
            cpus: vm.cpus,
            memory_bytes: vm.memory_bytes,
            waiting_seconds: format::seconds_since(vm.since_unix_ms),
            preempted: vm.preempted.as_ref().map(PreemptedView::from),
            reason: vm.reason,
        }
    }
}

/// Lists the VMs that wait, in the order in which they are to start. `rm` takes one out.
pub async fn run(context: &Context, _args: QueueArgs) -> Result<(), CliError> {
    let response = context.client().await?.list_queue(ListQueueRequest {}).await?;
    let vms: Vec<QueuedView> = response
        .into_inner()
        .vms
        .into_iter()
        .map(QueuedView::from)
        .collect();
    context.output.show(&vms, |vms| {
        let header = [
            "PLACE", "NAME", "USER", "PRIORITY", "CPUS", "MEMORY", "WAITS", "REASON",
        ];
        let rows = vms.iter().map(|vm| {
            [
                vm.place.to_string(),
                vm.name.clone(),
                vm.user.clone(),
                vm.priority.to_string(),
                vm.cpus.to_string(),
                format::size(vm.memory_bytes),
                format::age(vm.waiting_seconds),
                vm.reason.clone(),
            ]
        });
        table(header, rows)
    })
}
