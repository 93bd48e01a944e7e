//! Rebalance: the same round as the control loop's, shown and, unless it is a dry run, done.

use std::sync::Arc;

use shoal_plan::{Hold, NodeName, Plan, Policy};
use shoal_proto::cluster::{Migration, PlannedHold, PlannedMove, RebalanceRequest, RebalanceResponse};
use tonic::Status;

use super::errors;
use crate::control::{self, Wanted};
use crate::limits::FieldError;
use crate::migrations::OpenMigration;
use crate::scheduler::{Scheduler, Shared};

pub async fn call(scheduler: &Shared, request: &RebalanceRequest) -> Result<RebalanceResponse, Status> {
    let policy = policy(scheduler, &request.mode)?;
    if request.dry_run {
        let plan = control::plan_with(scheduler, Wanted::All, policy).await;
        return Ok(response(scheduler, &plan, Vec::new()));
    }
    let shared = Arc::clone(scheduler);
    let (plan, begun) = tokio::spawn(async move { control::round_with(&shared, Wanted::All, policy).await })
        .await
        .map_err(super::ended)?;
    let mut results = Vec::new();
    for migration in begun {
        results.extend(outcome(&migration).await);
    }
    Ok(response(scheduler, &plan, results))
}

/// The policy, with the mode asked for.
fn policy(scheduler: &Scheduler, mode: &str) -> Result<Arc<Policy>, Status> {
    let policy = scheduler.policy.get();
    if mode.is_empty() {
        return Ok(policy);
    }
    let mode = mode
        .parse()
        .map_err(|()| errors::field(&FieldError::new("mode", mode, "spread or pack")))?;
    Ok(Arc::new(Policy {
        mode,
        ..Policy::clone(&policy)
    }))
}

async fn outcome(migration: &OpenMigration) -> Option<Migration> {
    let mut views = migration.watch();
    let view = views.wait_for(|view| view.outcome.is_some()).await.ok()?;
    view.outcome.clone()
}

fn response(scheduler: &Scheduler, plan: &Plan, results: Vec<Migration>) -> RebalanceResponse {
    let name = |id: &shoal_plan::VmId| {
        let entry = id.as_str().parse().ok().and_then(|id| scheduler.vms.get(id));
        entry.map_or_else(|| id.to_string(), |entry| entry.record().name.to_string())
    };
    let moves: Vec<PlannedMove> = plan
        .actions
        .iter()
        .map(|action| PlannedMove {
            vm: name(&action.vm),
            from_node: action.from.to_string(),
            to_node: action.to.to_string(),
            reason: action.reason.clone(),
            kind: action.kind.to_string(),
            details: action.details.clone(),
        })
        .collect();
    let hold = |action: &str, hold: &Hold| PlannedHold {
        vm: name(&hold.vm),
        node: hold.node.to_string(),
        action: action.to_owned(),
        reason: hold.reason.clone(),
    };
    let suspend = plan.suspend.iter().map(|vm| hold("suspend", vm));
    let resume = plan.resume.iter().map(|vm| hold("resume", vm));
    let notes: Vec<&str> = plan.notes.iter().map(|note| note.text.as_str()).collect();
    let mut summary = match moves.len() {
        0 => "nothing to move".to_owned(),
        1 => "1 move".to_owned(),
        many => format!("{many} moves"),
    };
    for (count, what) in [
        (plan.suspend.len(), "to suspend"),
        (plan.resume.len(), "to resume"),
    ] {
        if count > 0 {
            summary = format!("{summary}; {count} {what}");
        }
    }
    if !plan.empty_nodes.is_empty() {
        let names: Vec<&str> = plan.empty_nodes.iter().map(NodeName::as_str).collect();
        summary = format!("{summary}; empty then: {}", names.join(", "));
    }
    if !notes.is_empty() {
        summary = format!("{summary}; {}", notes.join("; "));
    }
    RebalanceResponse {
        moves,
        summary,
        results,
        holds: suspend.chain(resume).collect(),
        slowdown_before: plan.slowdown_before,
        slowdown_after: plan.slowdown_after,
        empty_nodes: plan.empty_nodes.iter().map(ToString::to_string).collect(),
    }
}
