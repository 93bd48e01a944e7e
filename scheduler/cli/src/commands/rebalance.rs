//! `shoal rebalance`

use clap::Args;
use serde::Serialize;
use shoal_proto::cluster::{RebalanceRequest, RebalanceResponse};

use crate::client::Context;
use crate::commands::inspect::migration_table;
use crate::error::CliError;
use crate::output::table;
use crate::page::Page;
use crate::view::MigrationView;

/// Arguments of `rebalance`.
#[derive(Debug, Args)]
pub struct RebalanceArgs {
    /// Show what would be done, and why, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Balance for equal use of all nodes, or for as few nodes as possible; otherwise as the policy says.
    #[arg(long, value_name = "MODE", value_parser = ["spread", "pack"])]
    pub mode: Option<String>,
}

/// What `rebalance` shows.
#[derive(Debug, Serialize)]
pub(super) struct RebalanceView {
    dry_run: bool,
    moves: Vec<MoveView>,
    holds: Vec<HoldView>,
    slowdown_before: f64,
    slowdown_after: f64,
    summary: String,
    results: Vec<MigrationView>,
    empty_nodes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct MoveView {
    vm: String,
    from: String,
    to: String,
    kind: String,
    reason: String,
    details: String,
}

#[derive(Debug, Serialize)]
struct HoldView {
    vm: String,
    node: String,
    action: String,
    reason: String,
}

/// Plans now and shows the plan; unless `--dry-run`, waits for the moves and shows how they went.
pub async fn run(context: &Context, args: RebalanceArgs) -> Result<(), CliError> {
    let request = RebalanceRequest {
        dry_run: args.dry_run,
        mode: args.mode.unwrap_or_default(),
    };
    let response = context.client().await?.rebalance(request).await?.into_inner();
    let view = view(response, args.dry_run);
    context.output.show(&view, text)?;
    let failed = view.results.iter().filter(|m| m.result != "completed").count();
    if failed == 0 {
        Ok(())
    } else {
        Err(CliError::Reported(format!(
            "{failed} of {} moves did not complete: see the reasons above",
            view.results.len()
        )))
    }
}

pub(super) fn view(response: RebalanceResponse, dry_run: bool) -> RebalanceView {
    let moves = response.moves.into_iter().map(|m| MoveView {
        vm: m.vm,
        from: m.from_node,
        to: m.to_node,
        kind: m.kind,
        reason: m.reason,
        details: m.details,
    });
    let holds = response.holds.into_iter().map(|hold| HoldView {
        vm: hold.vm,
        node: hold.node,
        action: hold.action,
        reason: hold.reason,
    });
    RebalanceView {
        dry_run,
        moves: moves.collect(),
        holds: holds.collect(),
        slowdown_before: response.slowdown_before,
        slowdown_after: response.slowdown_after,
        summary: response.summary,
        results: response.results.iter().map(MigrationView::from).collect(),
        empty_nodes: response.empty_nodes,
    }
}

pub(super) fn text(view: &RebalanceView) -> Page {
    let mut page = Page::default();
    if !view.moves.is_empty() {
        let rows = view
            .moves
            .iter()
            .map(|m| [&m.kind, &m.vm, &m.from, &m.to, &m.reason].map(Clone::clone));
        page.add(table(["WHY", "VM", "FROM", "TO", "REASON"], rows));
        page.blank();
        let detailed = view.moves.iter().filter(|m| !m.details.is_empty());
        detailed.for_each(|m| page.line(format!("{}: {}", m.vm, m.details)));
        page.blank();
    }
    if !view.holds.is_empty() {
        let rows = view
            .holds
            .iter()
            .map(|hold| [&hold.action, &hold.vm, &hold.node, &hold.reason].map(Clone::clone));
        page.add(table(["ACTION", "VM", "NODE", "REASON"], rows));
        page.blank();
    }
    if !view.results.is_empty() {
        page.add(migration_table(&view.results));
        page.blank();
    }
    page.line(format!(
        "{} (slowdown of the VMs' work {:.2}, then {:.2})",
        view.summary, view.slowdown_before, view.slowdown_after
    ));
    page
}
