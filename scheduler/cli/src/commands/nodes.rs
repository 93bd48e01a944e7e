//! `shoal nodes`

use clap::Args;
use shoal_proto::cluster::ListNodesRequest;

use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use crate::view::NodeView;

/// Arguments of `nodes`.
#[derive(Debug, Args)]
pub struct NodesArgs {}

/// Lists every node that has ever registered.
pub async fn run(context: &Context, _args: NodesArgs) -> Result<(), CliError> {
    let response = context
        .client()
        .await?
        .list_nodes(ListNodesRequest {})
        .await?
        .into_inner();
    let nodes: Vec<NodeView> = response.nodes.iter().map(NodeView::from).collect();
    context.output.show(&nodes, |nodes| node_table(nodes))
}

/// Nodes as a table.
#[must_use]
pub fn node_table(nodes: &[NodeView]) -> String {
    table(
        [
            "NAME",
            "STATE",
            "ADDRESS",
            "VMS",
            "CPUS",
            "LOAD",
            "MEMORY",
            "AVAILABLE",
            "USED",
            "LABELS",
            "TAINTS",
        ],
        nodes.iter().map(|node| {
            [
                node.name.clone(),
                node.state.to_owned(),
                node.address.clone(),
                node.vms.to_string(),
                node.cpus.to_string(),
                format!("{:.2}", node.cpu_load),
                format::size(node.memory_bytes),
                format::size(node.memory_available_bytes),
                format!("{}%", percent_used(node)),
                node.labels.join(","),
                node.taints.join(","),
            ]
        }),
    )
}

fn percent_used(node: &NodeView) -> u64 {
    let used = u128::from(node.memory_bytes.saturating_sub(node.memory_available_bytes));
    let percent = (used * 100)
        .checked_div(u128::from(node.memory_bytes))
        .unwrap_or(0);
    u64::try_from(percent).unwrap_or(u64::MAX)
}
