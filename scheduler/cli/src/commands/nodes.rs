//! `shoal nodes`

use clap::Args;
use shoal_proto::cluster::ListNodesRequest;

use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use crate::page::Page;
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
    let wide = context.output.is_wide();
    let shown = |nodes: &Vec<NodeView>| {
        if wide {
            wide_table(nodes)
        } else {
            node_table(nodes)
        }
    };
    context.output.show(&nodes, shown)
}

/// Nodes as a table, and below it what is wrong with some.
#[must_use]
pub fn node_table(nodes: &[NodeView]) -> Page {
    let mut page = table(
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
    );
    for node in nodes.iter().filter(|node| !node.trouble.is_empty()) {
        page.line(format!("{}: {}", node.name, node.trouble));
    }
    page
}

/// What nodes measure, as a table.
#[must_use]
pub fn wide_table(nodes: &[NodeView]) -> Page {
    let header = [
        "NAME",
        "STATE",
        "LIVENESS",
        "VMS",
        "CPUS",
        "SPEED",
        "LOAD",
        "CPU USE",
        "RUN QUEUE",
        "PSI CPU",
        "PSI MEM",
        "PSI IO",
        "MEMORY",
        "AVAILABLE",
        "SWAP IN/OUT",
        "NET IN/OUT",
        "NUMA",
        "KVM",
        "CPU MODEL",
    ];
    let percent = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}%"));
    table(
        header,
        nodes.iter().map(|node| {
            [
                node.name.clone(),
                node.state.to_owned(),
                node.liveness.to_owned(),
                node.vms.to_string(),
                cpus(node),
                format!("{:.2}", node.cpu_speed),
                format!("{:.2}", node.cpu_load),
                format!("{:.2}", node.cpu_use),
                format!("{:.0}", node.run_queue),
                percent(node.psi_cpu),
                percent(node.psi_memory),
                percent(node.psi_io),
                format::size(node.memory_bytes),
                format::size(node.memory_available_bytes),
                both(node.swap_in_bytes_per_second, node.swap_out_bytes_per_second),
                both(
                    node.network_receive_bytes_per_second,
                    node.network_transmit_bytes_per_second,
                ),
                node.numa.len().to_string(),
                kvm(node),
                node.cpu_model.clone(),
            ]
        }),
    )
}

/// All, or what a quota leaves of them.
fn cpus(node: &NodeView) -> String {
    match node.cpu_quota {
        Some(quota) => format!("{quota:.2} of {}", node.cpus),
        None => node.cpus.to_string(),
    }
}

/// The kind, and what is wrong, in a word or two; `-o json` has the words.
fn kvm(node: &NodeView) -> String {
    match (node.kvm, node.kvm_trouble.is_empty()) {
        (Some(kind), true) => kind.to_owned(),
        (Some(kind), false) => format!("{kind}, not ring 3"),
        (None, true) => "-".to_owned(),
        (None, false) => "unusable".to_owned(),
    }
}

fn both(into: Option<u64>, out: Option<u64>) -> String {
    format!("{}/{}", format::known_rate(into), format::known_rate(out))
}

fn percent_used(node: &NodeView) -> u64 {
    let used = u128::from(node.memory_bytes.saturating_sub(node.memory_available_bytes));
    let percent = (used * 100)
        .checked_div(u128::from(node.memory_bytes))
        .unwrap_or(0);
    u64::try_from(percent).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use shoal_proto::cluster::{KvmKind, Node};

    use super::*;

    #[test]
    fn what_is_wrong_with_a_node_is_below_the_table() {
        let node = NodeView::from(&Node {
            name: "node1".to_owned(),
            trouble: "its agent obeys another".to_owned(),
            ..Node::default()
        });
        let text = node_table(&[node]).to_string();
        assert!(text.ends_with("\nnode1: its agent obeys another"), "{text}");
    }

    #[test]
    fn the_wide_table_shows_the_kind_of_kvm_and_that_something_is_wrong() {
        for (kind, trouble, shown) in [
            (KvmKind::Hardware, "", "hardware"),
            (KvmKind::Software, "", "software"),
            (
                KvmKind::Software,
                "interrupts do not arrive",
                "software, not ring 3",
            ),
            (KvmKind::Unspecified, "no /dev/kvm", "unusable"),
            (KvmKind::Unspecified, "", "-"),
        ] {
            let node = NodeView::from(&Node {
                kvm: kind.into(),
                kvm_trouble: trouble.to_owned(),
                ..Node::default()
            });
            assert_eq!(kvm(&node), shown);
            assert!(wide_table(&[node]).to_string().contains(shown));
        }
    }
}
