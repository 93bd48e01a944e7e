//! ExplainVm.

use std::sync::Arc;

use shoal_plan::{Alternative, explain};
use shoal_proto::cluster::{AlternativeNode, ExplainVmRequest, Explanation, Outlook};
use tonic::Status;

use crate::observe;
use crate::record::VmRecord;
use crate::scheduler::{Scheduler, Shared};
use crate::vms::VmEntry;

/// Nodes shown unless more are asked for.
const LIMIT: usize = 20;

pub async fn call(scheduler: &Shared, request: &ExplainVmRequest) -> Result<Explanation, Status> {
    if let Some(waiting) = scheduler.queue.find(&request.vm) {
        return Ok(Explanation {
            vm: waiting.record.vm.name.to_string(),
            verdict: format!("waits: {}", waiting.message()),
            ..Explanation::default()
        });
    }
    let entry = super::find_vm(scheduler, &request.vm)?;
    let record = entry.record();
    let id = shoal_plan::VmId::new(&record.id.to_string());
    let shared = Arc::clone(scheduler);
    let explained = scheduler
        .questions
        .run(move || explain(&observe::snapshot(&shared), &shared.policy.get(), &id));
    let Some(why) = explained.await.map_err(super::ended)? else {
        let name = &record.name;
        return Err(Status::failed_precondition(format!(
            "VM {name} has ended: `shoal inspect {name}` shows how"
        )));
    };
    let limit = usize::try_from(request.limit).unwrap_or(usize::MAX);
    let limit = if limit == 0 { LIMIT } else { limit };
    Ok(Explanation {
        vm: why.name,
        node: why.node.to_string(),
        placement: placement(&entry, &record),
        verdict: verdict(scheduler, &record, why.verdict),
        cpus: why.cpus.map(|cpus| cpus.mean),
        cpus_error: why.cpus.map_or(0.0, |cpus| cpus.error),
        here: Some(outlook(why.slowdown, why.memory_part)),
        memory_bytes: why.memory.0,
        growth_bytes_per_second: why.growth.0,
        move_ms: millis(why.move_time),
        downtime_us: u64::try_from(why.downtime.as_micros()).unwrap_or(u64::MAX),
        nodes: why.nodes.iter().take(limit).map(node).collect(),
    })
}

/// What is to become of it, after what holds of it now.
fn verdict(scheduler: &Scheduler, record: &VmRecord, planned: String) -> String {
    let open = scheduler.migrations.get(record.id);
    if let Some((to, why)) = open.and_then(|open| Some((open.intent.to.clone(), open.waits()?))) {
        return format!("waits to move to {to}: {why}");
    }
    match &record.suspended {
        Some(suspension) => format!("suspended ({}); {planned}", suspension.reason),
        None => planned,
    }
}

/// Why it is where it is: its last move there, or its start.
fn placement(entry: &VmEntry, record: &VmRecord) -> String {
    let here = entry.migrations().into_iter().rev();
    let mut moves = here
        .filter(|migration| migration.to_node == record.node.as_str() && migration.epoch == record.epoch.0);
    match moves.next() {
        Some(migration) => format!("moved here from {}: {}", migration.from_node, migration.reason),
        None if record.placement.is_empty() => "started here".to_owned(),
        None => format!("started here: {}", record.placement),
    }
}

fn node(alternative: &Alternative) -> AlternativeNode {
    AlternativeNode {
        node: alternative.node.to_string(),
        rejected: alternative
            .rejected
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        pays_back_ms: alternative.pays_back_after.map(millis),
        outlook: Some(outlook(alternative.slowdown, alternative.memory_part)),
    }
}

fn outlook(slowdown: (f64, f64), memory_part: (f64, f64)) -> Outlook {
    Outlook {
        slowdown: slowdown.0,
        slowdown_then: slowdown.1,
        memory_part: memory_part.0,
        memory_part_then: memory_part.1,
    }
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
