//! `shoal node label|taint|reserve`

use clap::{Args, Subcommand};
use shoal_proto::cluster::UpdateNodeRequest;

use super::nodes::node_table;
use crate::client::Context;
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

/// Changes a node and shows it.
pub async fn run(context: &Context, command: NodeCommand) -> Result<(), CliError> {
    let request = match command {
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
