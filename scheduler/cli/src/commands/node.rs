//! `shoal node label|taint|reserve|lost|rm`

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::json;
use shoal_proto::cluster::{
    DeclareNodeLostRequest, ListNodesRequest, ListVmsRequest, Node, NodeState, RemoveNodeRequest,
    UpdateNodeRequest, VmPhase,
};
use tonic::Code;

use super::nodes::node_table;
use crate::client::{Client, Context};
use crate::error::CliError;
use crate::format::parse_size;
use crate::view::NodeView;

/// What can be changed of a node.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Set labels (KEY=VALUE) and remove others (KEY-). Selectors of VMs ask about them.
    Label(ChangeArgs),
    /// Set taints (KEY or KEY=VALUE) and remove others (KEY-). They keep VMs away that do not tolerate them.
    Taint(ChangeArgs),
    /// Keep a part of the node free of VMs.
    Reserve(ReserveArgs),
    /// Say that a node's host is off and stays off, or must not run its VMs again: they have failed then.
    Lost(LostArgs),
    /// Forget nodes that have no VMs and are not connected.
    Rm(RmArgs),
}

/// Arguments of `node lost`.
#[derive(Debug, Args)]
pub struct LostArgs {
    /// Its name.
    node: String,
    /// It is so: nobody can check it for you. Without this, what would follow is said.
    #[arg(long)]
    yes: bool,
}

/// Arguments of `node rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Their names.
    #[arg(required = true, value_name = "NODE")]
    nodes: Vec<String>,
}

/// Arguments of `node label` and `node taint`.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    /// Its name.
    node: String,
    /// KEY=VALUE or KEY to set, KEY- to remove.
    #[arg(required = true, value_name = "CHANGE")]
    changes: Vec<String>,
}

/// Arguments of `node reserve`.
#[derive(Debug, Args)]
pub struct ReserveArgs {
    /// Its name.
    node: String,
    /// So much memory, such as 1GiB; 0: none.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, required_unless_present = "cpus")]
    memory: Option<u64>,
    /// So many CPUs, such as 0.5; 0: none.
    #[arg(long, value_name = "N")]
    cpus: Option<f64>,
}

/// Does it, and shows what has become of the node.
pub async fn run(context: &Context, command: NodeCommand) -> Result<(), CliError> {
    let request = match command {
        NodeCommand::Lost(args) => return lost(context, args).await,
        NodeCommand::Rm(args) => return remove(context, args).await,
        NodeCommand::Label(args) => {
            let (set_labels, remove_labels) = split(args.changes);
            UpdateNodeRequest {
                node: args.node,
                set_labels,
                remove_labels,
                ..UpdateNodeRequest::default()
            }
        }
        NodeCommand::Taint(args) => {
            let (set_taints, remove_taints) = split(args.changes);
            UpdateNodeRequest {
                node: args.node,
                set_taints,
                remove_taints,
                ..UpdateNodeRequest::default()
            }
        }
        NodeCommand::Reserve(args) => UpdateNodeRequest {
            node: args.node,
            reserved_memory_bytes: args.memory,
            reserved_cpus: args.cpus,
            ..UpdateNodeRequest::default()
        },
    };
    let node = context.client().await?.update_node(request).await?.into_inner();
    let view = NodeView::from(&node);
    context
        .output
        .show(&view, |_| node_table(std::slice::from_ref(&view)))
}

/// What became of a node that was declared lost.
#[derive(Debug, Serialize)]
struct LostView {
    node: NodeView,
    /// Names.
    failed_vms: Vec<String>,
    /// Names; something else was done with them, and they follow.
    busy_vms: Vec<String>,
}

async fn lost(context: &Context, args: LostArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let node = args.node;
    if !args.yes {
        check_silent(&mut client, &node).await?;
        let all = client.list_vms(ListVmsRequest {}).await?.into_inner().vms;
        let there = all
            .into_iter()
            .filter(|vm| vm.node == node && !matches!(vm.phase(), VmPhase::Exited | VmPhase::Failed));
        let names: Vec<String> = there.map(|vm| vm.name).collect();
        return Err(CliError::Usage(what_it_means(&node, &names)));
    }
    let answer = client.declare_node_lost(DeclareNodeLostRequest { node }).await?;
    let answer = answer.into_inner();
    let view = LostView {
        node: NodeView::from(&answer.node.unwrap_or_default()),
        failed_vms: answer.failed_vms,
        busy_vms: answer.busy_vms,
    };
    context.output.show(&view, |view| {
        let name = &view.node.name;
        let mut text = match view.failed_vms.as_slice() {
            [] => format!("{name} counts as lost; no VM has failed by that"),
            failed => format!("{name} counts as lost; failed: {}", failed.join(", ")),
        };
        if !view.busy_vms.is_empty() {
            let busy = view.busy_vms.join(", ");
            text = format!("{text}; busy with something else, and to fail when that has ended: {busy}");
        }
        text
    })
}

/// As the scheduler refuses one that reports, before anybody is asked to be sure.
async fn check_silent(client: &mut Client, name: &str) -> Result<(), CliError> {
    let nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
    let node = nodes.iter().find(|node| node.name == name);
    let (code, message) = match node.map(Node::state) {
        None => (
            Code::NotFound,
            format!("node {name} is unknown: `shoal nodes` lists the nodes"),
        ),
        Some(NodeState::Unreachable | NodeState::Lost) => return Ok(()),
        Some(_) => (
            Code::FailedPrecondition,
            format!("node {name} reports, so it is not lost; `shoal drain {name}` moves its VMs away"),
        ),
    };
    Err(CliError::Refused { code, message })
}

fn what_it_means(node: &str, vms: &[String]) -> String {
    let vms = match vms {
        [] => "It has no VMs.".to_owned(),
        vms => format!(
            "Its VMs ({}) have failed then, with all that they had in memory; their names are free once they are removed.",
            vms.join(", ")
        ),
    };
    format!(
        "`shoal node lost {node}` takes your word that the host of {node} is off and stays off, or must not run its VMs again. \
         {vms} Should it come back, they are ended there before it takes others. Nobody can check it for you: if the host still \
         runs, so do they, until then. If it is so, add --yes"
    )
}

async fn remove(context: &Context, args: RmArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    for node in args.nodes {
        client
            .remove_node(RemoveNodeRequest { node: node.clone() })
            .await?;
        context
            .output
            .show_line(&json!({ "removed": node }), |_| format!("{node} removed"))?;
    }
    Ok(())
}

/// What is set, and the keys of what is removed.
fn split(changes: Vec<String>) -> (Vec<String>, Vec<String>) {
    let (remove, set): (Vec<String>, Vec<String>) = changes
        .into_iter()
        .partition(|change| change.ends_with('-') && !change.contains('='));
    let keys = remove
        .into_iter()
        .map(|change| change.trim_end_matches('-').to_owned());
    (set, keys.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hyphen_at_the_end_of_a_key_removes_it() {
        let changes = ["a=1", "b-", "c", "d=x-"].map(str::to_owned).to_vec();
        let (set, removed) = split(changes);
        assert_eq!(
            (set.as_slice(), removed.as_slice()),
            (
                ["a=1", "c", "d=x-"].map(str::to_owned).as_slice(),
                ["b"].map(str::to_owned).as_slice(),
            )
        );
    }
}
