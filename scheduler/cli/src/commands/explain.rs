//! `shoal explain VM`

use clap::Args;
use serde::Serialize;
use shoal_proto::cluster::{AlternativeNode, ExplainVmRequest, Explanation, Outlook};

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
    /// Unset: not known yet.
    cpus: Option<f64>,
    cpus_error: f64,
    memory_bytes: u64,
    growth_bytes_per_second: u64,
    move_ms: u64,
    downtime_us: u64,
    here: OutlookView,
    nodes: Vec<AlternativeView>,
}

#[derive(Debug, Serialize)]
struct AlternativeView {
    node: String,
    fits: bool,
    rejected: String,
    pays_back_ms: Option<u64>,
    outlook: OutlookView,
}

#[derive(Debug, Serialize)]
struct OutlookView {
    slowdown: f64,
    slowdown_then: f64,
    memory_part: f64,
    memory_part_then: f64,
}

impl From<Option<Outlook>> for OutlookView {
    fn from(outlook: Option<Outlook>) -> Self {
        let outlook = outlook.unwrap_or_default();
        Self {
            slowdown: outlook.slowdown,
            slowdown_then: outlook.slowdown_then,
            memory_part: outlook.memory_part,
            memory_part_then: outlook.memory_part_then,
        }
    }
}

impl OutlookView {
    fn slowdowns(&self) -> String {
        format!("{:.1} -> {:.1}", self.slowdown, self.slowdown_then)
    }

    fn memory(&self) -> String {
        format!(
            "{:.0} % -> {:.0} %",
            self.memory_part * 100.0,
            self.memory_part_then * 100.0
        )
    }
}

impl From<AlternativeNode> for AlternativeView {
    fn from(node: AlternativeNode) -> Self {
        Self {
            node: node.node,
            fits: node.rejected.is_empty(),
            rejected: node.rejected,
            pays_back_ms: node.pays_back_ms,
            outlook: node.outlook.into(),
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
            cpus_error: why.cpus_error,
            memory_bytes: why.memory_bytes,
            growth_bytes_per_second: why.growth_bytes_per_second,
            move_ms: why.move_ms,
            downtime_us: why.downtime_us,
            here: why.here.into(),
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
    let cpus = why.cpus.map_or_else(
        || "CPU not known yet".to_owned(),
        |cpus| format!("{cpus:.2} CPUs (+- {:.2})", why.cpus_error),
    );
    let mut page = Page::from_iter([
        format!("{} is on {}: {}", why.vm, why.node, why.placement),
        format!("now:     {}", why.verdict),
        format!(
            "wants:   {cpus}; holds {}, growing {}/s",
            format::size(why.memory_bytes),
            format::size(why.growth_bytes_per_second)
        ),
        format!(
            "moving:  takes about {:.1} s, with a pause of {}",
            std::time::Duration::from_millis(why.move_ms).as_secs_f64(),
            format::micros(why.downtime_us),
        ),
        format!(
            "{} now, and without it: slowdown {}, memory {}",
            why.node,
            why.here.slowdowns(),
            why.here.memory()
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
                node.outlook.slowdowns(),
                node.outlook.memory(),
                pays_back,
                node.rejected.clone(),
            ]
        });
        page.blank();
        page.add(table(
            ["NODE", "FITS", "SLOWDOWN", "MEMORY", "PAYS BACK", "WHY NOT"],
            rows,
        ));
    }
    page
}
