//! `shoal migrations show ID`

use std::path::PathBuf;

use clap::Args;
use shoal_proto::cluster::GetMigrationRequest;

use super::plot;
use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use crate::page::Page;
use crate::view::{MigrationDetails, MigrationView, cap};

/// Arguments of `migrations show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Its id, or the first characters of it.
    id: String,
    /// Draw its life into this SVG file: rates, what remained, throttling, phases and the pause.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// Shows one migration whole; with `--plot` also draws it.
pub async fn run(context: &Context, args: ShowArgs) -> Result<(), CliError> {
    let request = GetMigrationRequest { id: args.id };
    let migration = context.client().await?.get_migration(request).await?.into_inner();
    if let Some(path) = args.plot {
        let svg = plot::svg(&migration).map_err(CliError::Failed)?;
        std::fs::write(&path, svg).map_err(|source| CliError::File {
            path: path.clone(),
            what: "cannot write the plot".into(),
            source,
        })?;
        context.output.note(&format!("drawn into {}", path.display()));
    }
    context.output.show(&MigrationDetails::from(&migration), text)
}

pub(in crate::commands) fn text(details: &MigrationDetails) -> Page {
    let m = &details.migration;
    let mut lines = vec![
        format!("id:          {}", m.id),
        format!("VM:          {} ({})", m.vm, m.vm_id),
        format!("from, to:    {} to {} at epoch {}", m.from, m.to, m.epoch),
        format!("started:     {}", m.started),
        format!("asked for:   {}", m.requested_because),
        format!("result:      {}{}", m.result, why(m)),
    ];
    lines.extend(
        m.policy
            .as_ref()
            .map(|policy| format!("policy:      {}", policy.line())),
    );
    let own = m
        .policy
        .as_ref()
        .and_then(|policy| policy.bandwidth_bytes_per_second);
    lines.extend(
        m.bandwidth_taken_bytes_per_second
            .filter(|taken| Some(*taken) != own)
            .map(|taken| format!("bandwidth:   {}, its share of what several may use", cap(taken))),
    );
    if let Some(progress) = &m.progress {
        lines.push(format!(
            "now:         {} (pass {}), {} sent, {} left, {}/s",
            progress.phase,
            progress.pass,
            format::size(progress.bytes_sent),
            format::size(progress.remaining_bytes),
            format::size(progress.rate_bytes_per_second),
        ));
    } else {
        lines.extend(figures(m));
    }
    if !details.pass_table.is_empty() {
        let rows = details.pass_table.iter().map(|pass| {
            [
                pass.pass.to_string(),
                format!("{:.1} ms", pass.duration_ms),
                pass.pages.to_string(),
                pass.zero_pages.to_string(),
                format::size(pass.bytes),
                pass.dirtied_pages.to_string(),
                format!("{} %", pass.throttle_percent),
            ]
        });
        let header = ["PASS", "TOOK", "PAGES", "ZERO", "SENT", "DIRTIED", "THROTTLE"];
        let mut page: Page = lines.into_iter().collect();
        page.blank();
        page.add(table(header, rows));
        return page;
    }
    lines.into_iter().collect()
}

fn why(m: &MigrationView) -> String {
    let runs = m.progress.is_some() && m.result != "waiting";
    if runs || m.reason == m.requested_because {
        String::new()
    } else {
        format!(": {}", m.reason)
    }
}

/// What a migration cost, line by line; what did not happen is left out.
pub fn figures(m: &MigrationView) -> Vec<String> {
    let ms = |value: f64| format!("{value:.1} ms");
    let mut lines = vec![
        format!("total:       {}", ms(m.total_ms)),
        if m.suspended {
            "downtime:    none: the VM is suspended, and was".to_owned()
        } else {
            format!(
                "downtime:    {} (stop {:.1}, pages {:.1}, state {:.1}, start {:.1})",
                ms(m.downtime_ms),
                m.downtime_stop_ms,
                m.downtime_pages_ms,
                m.downtime_state_ms,
                m.downtime_start_ms,
            )
        },
    ];
    lines.extend(m.guest_gap_ms.map(|gap| format!("guest gap:   {}", ms(gap))));
    let over = match m.connections {
        0 => String::new(),
        1 => " over 1 connection".to_owned(),
        many => format!(" over {many} connections"),
    };
    let tls = if m.tls { ", encrypted" } else { "" };
    lines.push(format!(
        "sent:        {} in {} passes{over}{tls}: {} pages with content, {} zero",
        format::size(m.bytes_sent),
        m.passes,
        m.pages_sent,
        m.zero_pages,
    ));
    if m.handed_over {
        lines.push("memory:      handed over within the host, not copied".to_owned());
    }
    if m.compressed_pages > 0 {
        lines.push(format!(
            "compressed:  {} pages, {} saved",
            m.compressed_pages,
            format::size(m.compression_saved_bytes)
        ));
    }
    if m.delta_pages > 0 {
        lines.push(format!(
            "as delta:    {} pages, {} saved",
            m.delta_pages,
            format::size(m.delta_saved_bytes)
        ));
    }
    if m.resent_pages > 0 {
        lines.push(format!(
            "sent again:  {} pages written while they were sent",
            m.resent_pages
        ));
    }
    if m.max_throttle_percent > 0 {
        lines.push(format!(
            "throttled:   up to {} %, {} of vCPU time",
            m.max_throttle_percent,
            ms(m.throttled_ms)
        ));
    }
    if m.verified != "off" {
        lines.push(format!("verified:    {}, in {}", m.verified, ms(m.verify_ms)));
    }
    if m.post_copy {
        lines.push(format!(
            "post-copy:   {}, {} pages, {} faults (worst {}, mean {}), {} recoveries",
            ms(m.post_copy_ms),
            m.post_copy_pages,
            m.faults,
            ms(m.worst_fault_ms),
            ms(m.mean_fault_ms),
            m.recoveries,
        ));
    }
    lines
}
