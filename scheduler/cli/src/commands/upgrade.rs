//! `shoal upgrade NODE`

use std::sync::Arc;

use clap::Args;
use serde::Serialize;
use shoal_proto::cluster::{ListNodesRequest, ListVmsRequest, MigrateVmRequest, Migration, Vm, VmPhase};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::Code;

use crate::client::{Client, Context, until_interrupted};
use crate::error::CliError;
use crate::page::Page;
use crate::view::{MigrationView, vm_state};

/// Arguments of `upgrade`.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// Its name.
    pub node: String,
    /// So many VMs at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub parallel: u32,
}

#[derive(Debug, Default, Serialize)]
struct UpgradeView {
    node: String,
    upgraded: usize,
    /// VMs that still run in their old VMM, and why.
    left: Vec<LeftView>,
    migrations: Vec<MigrationView>,
}

#[derive(Debug, Serialize)]
struct LeftView {
    vm: String,
    reason: String,
}

/// Moves every VM of a node to a new VMM on the same node: the VMM that is installed there now. Ctrl-C begins no more.
pub async fn run(context: &Context, args: UpgradeArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let vms = vms_on(&mut client, &args.node).await?;
    let goes_on = || {
        let node = &args.node;
        format!("what has begun goes on: `shoal migrations --node {node}` shows it")
    };
    let view = until_interrupted(upgrade(context, client, vms, &args), goes_on).await?;
    context.output.show(&view, text)?;
    if view.left.is_empty() {
        Ok(())
    } else {
        Err(CliError::Reported(format!(
            "{} VMs of {} still run in their old VMM: see above",
            view.left.len(),
            view.node
        )))
    }
}

/// Those that have not ended.
async fn vms_on(client: &mut Client, node: &str) -> Result<Vec<Vm>, CliError> {
    let nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
    if !nodes.iter().any(|known| known.name == node) {
        return Err(CliError::Refused {
            code: Code::NotFound,
            message: format!("node: there is no node '{node}'; `shoal nodes` lists them"),
        });
    }
    let mut vms = client.list_vms(ListVmsRequest {}).await?.into_inner().vms;
    vms.retain(|vm| vm.node == node && !matches!(vm.phase(), VmPhase::Exited | VmPhase::Failed));
    Ok(vms)
}

async fn upgrade(
    context: &Context,
    client: Client,
    vms: Vec<Vm>,
    args: &UpgradeArgs,
) -> Result<UpgradeView, CliError> {
    let total = vms.len();
    let turns = Arc::new(Semaphore::new(usize::try_from(args.parallel).unwrap_or(1)));
    let mut moves = JoinSet::new();
    for vm in vms {
        let (client, node, turns) = (client.clone(), args.node.clone(), Arc::clone(&turns));
        moves.spawn(async move {
            // It is never closed.
            let _turn = turns.acquire_owned().await;
            let outcome = move_one(client, &vm, &node).await;
            (vm.name, outcome)
        });
    }
    let mut view = UpgradeView {
        node: args.node.clone(),
        ..UpgradeView::default()
    };
    let mut done = 0;
    while let Some(joined) = moves.join_next().await {
        let (vm, outcome) = joined.map_err(|error| CliError::Failed(error.to_string()))?;
        done += 1;
        let migration = outcome.map(|migration| MigrationView::from(&migration));
        let note = match &migration {
            Ok(m) if m.result == "completed" => format!("downtime {:.1} ms", m.downtime_ms),
            Ok(m) => format!("{}: {}", m.result, m.reason),
            Err(error) => error.to_string(),
        };
        context.output.note(&format!("{done}/{total} {vm}: {note}"));
        match migration {
            Ok(m) if m.result == "completed" => {
                view.upgraded += 1;
                view.migrations.push(m);
            }
            Ok(m) => {
                let reason = m.reason.clone();
                view.left.push(LeftView { vm, reason });
                view.migrations.push(m);
            }
            Err(error) => view.left.push(LeftView {
                vm,
                reason: error.to_string(),
            }),
        }
    }
    Ok(view)
}

async fn move_one(mut client: Client, vm: &Vm, node: &str) -> Result<Migration, CliError> {
    if !matches!(vm.phase(), VmPhase::Running | VmPhase::Suspended) {
        return Err(CliError::Failed(format!("it is {}", vm_state(vm.phase()))));
    }
    let request = MigrateVmRequest {
        vm: vm.id.clone(),
        to_node: node.to_owned(),
        policy: None,
    };
    let mut stream = client.migrate_vm(request).await?.into_inner();
    let mut outcome = None;
    while let Some(message) = stream.message().await? {
        outcome = message.outcome.or(outcome);
    }
    outcome.ok_or_else(|| CliError::Lost("the migration's stream ended without an outcome".into()))
}

fn text(view: &UpgradeView) -> Page {
    let mut page = Page::from(format!("{}: {} VMs run in new VMMs", view.node, view.upgraded));
    for left in &view.left {
        page.line(format!("  {} stays as it was: {}", left.vm, left.reason));
    }
    page
}
