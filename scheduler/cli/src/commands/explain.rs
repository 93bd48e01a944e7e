//! `shoal explain VM`

use clap::Args;
use serde::Serialize;
use shoal_proto::cluster::{AlternativeNode, ExplainVmRequest, Explanation};

use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use crate::page::Page;

/// Arguments of `explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// Name or id.
    vm: String,
    /// Show so many other nodes.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    nodes: u32,
}

/// What `explain` shows.
#[derive(Debug, Serialize)]
pub(super) struct ExplanationView {
    vm: String,
    node: String,
    placement: String,
    verdict: String,
    cpus: f64,
    memory_bytes: u64,
    growth_bytes_per_second: u64,
    move_ms: u64,
    downtime_us: u64,
    cost: f64,
    saving: f64,
    min_gain: Option<f64>,
    nodes: Vec<AlternativeView>,
}

#[derive(Debug, Serialize)]
struct AlternativeView {
    node: String,
    fits: bool,
    rejected: String,
    charge: f64,
    gain: f64,
    pays_back_ms: Option<u64>,
}

impl From<AlternativeNode> for AlternativeView {
    fn from(node: AlternativeNode) -> Self {
        Self {
            node: node.node,
            fits: node.rejected.is_empty(),
            rejected: node.rejected,
            charge: node.charge,
            gain: node.gain,
            pays_back_ms: node.pays_back_ms,
        }
    }
}

impl From<Explanation> for ExplanationView {
    fn from(why: Explanation) -> Self {
        Self {
            vm: why.vm,
            node: why.node,
            placement: why.placement,
            verdict: why.verdict,
            cpus: why.cpus,
            memory_bytes: why.memory_bytes,
            growth_bytes_per_second: why.growth_bytes_per_second,
            move_ms: why.move_ms,
            downtime_us: why.downtime_us,
            cost: why.cost,
            saving: why.saving,
            min_gain: why.min_gain,
            nodes: why.nodes.into_iter().map(AlternativeView::from).collect(),
        }
    }
}

/// Says why a VM is where it is, what moving it would cost and gain, and why it does or does not move.
pub async fn run(context: &Context, args: ExplainArgs) -> Result<(), CliError> {
    let request = ExplainVmRequest {
        vm: args.vm,
        limit: args.nodes,
    };
    let why = context.client().await?.explain_vm(request).await?.into_inner();
    context.output.show(&ExplanationView::from(why), text)
}

pub(super) fn text(why: &ExplanationView) -> Page {
    if why.node.is_empty() {
        return format!("{} {}", why.vm, why.verdict).into();
    }
    let min_gain = why
        .min_gain
        .map_or("none at this aggressiveness".to_owned(), |gain| {
            format!("{gain:.2}")
        });
    let mut page = Page::from_iter([
        format!("{} is on {}: {}", why.vm, why.node, why.placement),
        format!("now:     {}", why.verdict),
        format!(
            "use:     {:.2} CPUs, {} and {}/s more",
            why.cpus,
            format::size(why.memory_bytes),
            format::size(why.growth_bytes_per_second)
        ),
        format!(
            "moving:  about {:.1} s with a pause of {}, which costs {:.2} score seconds",
            std::time::Duration::from_millis(why.move_ms).as_secs_f64(),
            format::micros(why.downtime_us),
            why.cost
        ),
        format!(
            "balance: {} would save {:.2} without it; least gain worth a move: {min_gain}",
            why.node, why.saving
        ),
    ]);
    if !why.nodes.is_empty() {
        let rows = why.nodes.iter().map(|node| {
            let pays_back = node.pays_back_ms.map_or_else(
                || "never".to_owned(),
                |ms| format!("{:.1} s", std::time::Duration::from_millis(ms).as_secs_f64()),
            );
            [
                node.node.clone(),
                if node.fits { "yes" } else { "no" }.to_owned(),
                format!("{:.2}", node.charge),
                format!("{:.2}", node.gain),
                pays_back,
                node.rejected.clone(),
            ]
        });
        page.blank();
        page.add(table(
            ["NODE", "FITS", "CHARGE", "GAIN", "PAYS BACK", "WHY NOT"],
            rows,
        ));
    }
    page
}
