//! `shoal migrate VM`

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use shoal_proto::cluster::{MigrateVmRequest, Migration};
use shoal_proto::vm::{MigrationPhase, MigrationPolicy, MigrationProgress};

use crate::client::{Client, Context, until_interrupted};
use crate::commands::migrations::figures;
use crate::error::CliError;
use crate::format;
use crate::page::Page;
use crate::policy_args::PolicyArgs;
use crate::view::{MigrationView, phase};

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Name or id.
    pub vm: String,
    /// To this node; otherwise where it fits best.
    #[arg(long, value_name = "NODE")]
    pub to: Option<String>,
    #[command(flatten)]
    policy: PolicyArgs,
}

/// Moves a running VM and reports how it went. Ctrl-C stops watching, not the migration.
pub async fn run(context: &Context, args: MigrateArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let request = MigrateVmRequest {
        vm: args.vm.clone(),
        to_node: args.to.unwrap_or_default(),
        policy: Some(MigrationPolicy::from(&args.policy)),
    };
    let goes_on = || {
        let vm = &args.vm;
        format!("the migration goes on: `shoal migrations --vm {vm}` tells how it ended")
    };
    let outcome = until_interrupted(watch(context, &mut client, request), goes_on).await?;
    let view = MigrationView {
        vm: args.vm,
        ..MigrationView::from(&outcome)
    };
    context.output.show(&view, report)?;
    if view.result == "completed" {
        Ok(())
    } else {
        let MigrationView {
            vm,
            from,
            to,
            result,
            reason,
            ..
        } = view;
        Err(CliError::Reported(format!(
            "migration of {vm} from {from} to {to} {result}: {reason}"
        )))
    }
}

async fn watch(
    context: &Context,
    client: &mut Client,
    request: MigrateVmRequest,
) -> Result<Migration, CliError> {
    let mut stream = client.migrate_vm(request).await?.into_inner();
    let mut bar = context.output.is_watched().then(Bar::new);
    let (mut outcome, mut waits) = (None, String::new());
    while let Some(message) = stream.message().await? {
        if message.waits != waits {
            waits = message.waits;
            if !waits.is_empty() {
                context.output.note(&format!("waits: {waits}"));
            }
        }
        if let (Some(bar), Some(progress)) = (&mut bar, &message.progress) {
            bar.show(progress);
        }
        outcome = message.outcome.or(outcome);
    }
    if let Some(bar) = bar {
        bar.bar.finish_and_clear();
    }
    outcome.ok_or_else(|| CliError::Lost("the migration's stream ended without an outcome".into()))
}

/// The progress bar: it fills once for each pass over memory.
struct Bar {
    bar: ProgressBar,
    pass: u32,
}

impl Bar {
    fn new() -> Self {
        let style = ProgressStyle::with_template("{prefix:24} [{bar:30}] {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        Self {
            bar: ProgressBar::new(0).with_style(style),
            pass: 0,
        }
    }

    fn show(&mut self, progress: &MigrationProgress) {
        if progress.pass != self.pass {
            self.pass = progress.pass;
            self.bar.set_length(progress.remaining_bytes);
        }
        let length = self.bar.length().unwrap_or(0).max(progress.remaining_bytes);
        self.bar.set_length(length);
        self.bar.set_position(length - progress.remaining_bytes);
        self.bar
            .set_prefix(format!("{} (pass {})", phase(progress.phase()), progress.pass));
        self.bar.set_message(message(progress));
    }
}

fn message(progress: &MigrationProgress) -> String {
    // Rates are measured pass by pass; during the first there is only what was sent so far.
    let average = progress
        .bytes_sent
        .saturating_mul(1000)
        .checked_div(progress.elapsed_ms)
        .unwrap_or(0);
    let rate = match progress.rate_bytes_per_second {
        0 => average,
        measured => measured,
    };
    let mut parts = vec![
        format!("{} sent", format::size(progress.bytes_sent)),
        format!("{} left", format::size(progress.remaining_bytes)),
        format!("{}/s", format::size(rate)),
    ];
    if progress.dirty_rate_bytes_per_second > 0 {
        parts.push(format!(
            "guest dirties {}/s",
            format::size(progress.dirty_rate_bytes_per_second)
        ));
    }
    if progress.predicted_downtime_us > 0 && progress.phase() != MigrationPhase::PostCopy {
        let predicted = format::micros(progress.predicted_downtime_us);
        parts.push(format!("predicted downtime {predicted}"));
    }
    if progress.throttle_percent > 0 {
        parts.push(format!("guest throttled by {} %", progress.throttle_percent));
    }
    if progress.connections > 1 {
        parts.push(format!("{} connections", progress.connections));
    }
    if progress.compression_ratio > 0.0 && progress.compression_ratio < 0.995 {
        parts.push(format!(
            "compressed to {:.0} %",
            progress.compression_ratio * 100.0
        ));
    }
    if progress.faults > 0 {
        let worst = format::micros(progress.worst_fault_us);
        parts.push(format!("{} faults, worst {worst}", progress.faults));
    }
    if progress.link_lost {
        parts.push("LINK LOST, the VM waits".to_owned());
    }
    parts.join(", ")
}

pub(super) fn report(m: &MigrationView) -> Page {
    if m.result != "completed" {
        return format!(
            "{} stays as it was: {} after {:.0} ms",
            m.vm, m.result, m.total_ms
        )
        .into();
    }
    let mut page = Page::from(format!("{} moved from {} to {}", m.vm, m.from, m.to));
    for figure in figures(m) {
        page.line(format!("  {figure}"));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_live_line_says_what_there_is_to_say() {
        let mut progress = MigrationProgress {
            bytes_sent: 64 << 20,
            remaining_bytes: 8 << 20,
            rate_bytes_per_second: 1 << 30,
            compression_ratio: 1.0,
            ..MigrationProgress::default()
        };
        assert_eq!(message(&progress), "64.0 MiB sent, 8.0 MiB left, 1.0 GiB/s");
        progress.phase = MigrationPhase::PostCopy.into();
        progress.dirty_rate_bytes_per_second = 1 << 20;
        progress.predicted_downtime_us = 9;
        progress.throttle_percent = 30;
        progress.connections = 4;
        progress.compression_ratio = 0.45;
        progress.faults = 3;
        progress.worst_fault_us = 900;
        progress.link_lost = true;
        assert_eq!(
            message(&progress),
            "64.0 MiB sent, 8.0 MiB left, 1.0 GiB/s, guest dirties 1.0 MiB/s, guest throttled by 30 %, \
             4 connections, compressed to 45 %, 3 faults, worst 900 us, LINK LOST, the VM waits"
        );
    }
}
