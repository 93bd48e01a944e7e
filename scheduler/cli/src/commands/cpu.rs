//! `shoal cpu`

use clap::Subcommand;
use serde::Serialize;
use shoal_proto::cluster::{CpuBaseline, GetCpuBaselineRequest, SetCpuBaselineRequest};

use crate::client::Context;
use crate::error::CliError;
use crate::output::table;
use crate::page::Page;

/// Commands on CPUs.
#[derive(Debug, Subcommand)]
pub enum CpuCommand {
    /// What CPU features new VMs get, so that they can run on every node.
    Baseline {
        /// What to do; without it, show.
        #[command(subcommand)]
        action: Option<BaselineAction>,
    },
}

/// What to do with the baseline.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum BaselineAction {
    /// Show it, or what it would be, and how nodes differ from it.
    Show,
    /// Give new VMs what all nodes of now have in common. VMs that run keep what they have.
    Apply,
    /// Give new VMs all that their node has.
    Clear,
}

/// What `cpu baseline` shows.
#[derive(Debug, Serialize)]
pub(super) struct BaselineView {
    applied: bool,
    features: Vec<String>,
    nodes: Vec<NodeCpuView>,
}

#[derive(Debug, Serialize)]
struct NodeCpuView {
    node: String,
    model: Option<String>,
    extra_features: Vec<String>,
    missing_features: Vec<String>,
}

impl From<CpuBaseline> for BaselineView {
    fn from(baseline: CpuBaseline) -> Self {
        let nodes = baseline.nodes.into_iter().map(|node| NodeCpuView {
            node: node.node,
            model: Some(node.model).filter(|model| !model.is_empty()),
            extra_features: node.extra_features,
            missing_features: node.missing_features,
        });
        Self {
            applied: baseline.applied,
            features: baseline.features,
            nodes: nodes.collect(),
        }
    }
}

/// Shows or changes the baseline.
pub async fn run(context: &Context, command: CpuCommand) -> Result<(), CliError> {
    let CpuCommand::Baseline { action } = command;
    let mut client = context.client().await?;
    let set = |clear| SetCpuBaselineRequest { clear };
    let baseline = match action.unwrap_or(BaselineAction::Show) {
        BaselineAction::Show => client.get_cpu_baseline(GetCpuBaselineRequest {}).await?,
        BaselineAction::Apply => client.set_cpu_baseline(set(false)).await?,
        BaselineAction::Clear => client.set_cpu_baseline(set(true)).await?,
    };
    let view = BaselineView::from(baseline.into_inner());
    context.output.show(&view, text)
}

pub(super) fn text(baseline: &BaselineView) -> Page {
    let count = baseline.features.len();
    let head = if baseline.applied {
        format!("applied: new VMs get these {count} features and no others")
    } else {
        format!("not applied: new VMs get all that their node has; all nodes have these {count} features")
    };
    let nodes = table(
        ["NODE", "CPU", "EXTRA", "MISSING"],
        baseline.nodes.iter().map(|node| {
            [
                node.node.clone(),
                node.model.clone().unwrap_or_else(|| "not known".to_owned()),
                some(&node.extra_features),
                some(&node.missing_features),
            ]
        }),
    );
    let mut page = Page::from_iter([format!("{head}:"), baseline.features.join(" ")]);
    page.blank();
    page.add(nodes);
    page
}

/// As many as fit a table; all are in the JSON.
fn some(features: &[String]) -> String {
    const SHOWN: usize = 4;
    match features.len() {
        0 => "-".to_owned(),
        1..=SHOWN => features.join(" "),
        more => format!("{} and {} more", features[..SHOWN].join(" "), more - SHOWN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_cut_and_absence_is_said() {
        let names = |count: usize| (0..count).map(|i| format!("F{i}")).collect::<Vec<_>>();
        assert_eq!(some(&names(0)), "-");
        assert_eq!(some(&names(4)), "F0 F1 F2 F3");
        assert_eq!(some(&names(6)), "F0 F1 F2 F3 and 2 more");
    }
}
