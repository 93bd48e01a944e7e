//! `shoal migrate VM`

use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use shoal_proto::cluster::{MigrateVmRequest, Migration};
use shoal_proto::vm::{MigrationPhase, MigrationProgress};

use crate::client::{Client, Context, until_interrupted};
use crate::error::CliError;
use crate::format;
use crate::format::{millis, parse_duration};
use crate::view::MigrationView;

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Name or id.
    pub vm: String,
    /// To this node; otherwise where it fits best.
    #[arg(long, value_name = "NODE")]
    pub to: Option<String>,
    /// The longest pause to accept, such as 50ms.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub max_downtime: Option<Duration>,
    /// Give up after this long, such as 2m.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
}

/// Moves a running VM and reports how it went. Ctrl-C stops watching, not the migration.
pub async fn run(context: &Context, args: MigrateArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let request = MigrateVmRequest {
        vm: args.vm.clone(),
        to_node: args.to.unwrap_or_default(),
        max_downtime_ms: millis(args.max_downtime),
        timeout_ms: millis(args.timeout),
    };
    let Some(outcome) = until_interrupted(watch(context, &mut client, request)).await? else {
        context.output.note(&format!(
            "\nthe migration goes on: `shoal inspect {}` tells how it ended",
            args.vm
        ));
        return Ok(());
    };
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
    let mut outcome = None;
    while let Some(message) = stream.message().await? {
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
    let rate = if progress.rate_bytes_per_second > 0 {
        progress.rate_bytes_per_second
    } else {
        average
    };
    let sent = format!(
        "{} sent, {}/s",
        format::size(progress.bytes_sent),
        format::size(rate)
    );
    if progress.predicted_downtime_us == 0 {
        return sent;
    }
    format!(
        "{sent}, guest dirties {}/s, predicted downtime {}",
        format::size(progress.dirty_rate_bytes_per_second),
        format::micros(progress.predicted_downtime_us),
    )
}

fn phase(phase: MigrationPhase) -> &'static str {
    match phase {
        MigrationPhase::Unspecified | MigrationPhase::Negotiate => "negotiate",
        MigrationPhase::PreCopy => "pre-copy",
        MigrationPhase::Pause => "pause",
        MigrationPhase::FinalPages => "final pages",
        MigrationPhase::State => "state",
        MigrationPhase::Commit => "commit",
        MigrationPhase::Done => "done",
    }
}

fn report(m: &MigrationView) -> String {
    if m.result != "completed" {
        return format!(
            "{} stays as it was: {} after {:.0} ms",
            m.vm, m.result, m.total_ms
        );
    }
    format!(
        "{} moved from {} to {} in {:.0} ms\n  \
         downtime  {:.1} ms (stop {:.1}, pages {:.1}, state {:.1}, start {:.1})\n  \
         sent      {} in {} passes: {} pages with content, {} zero",
        m.vm,
        m.from,
        m.to,
        m.total_ms,
        m.downtime_ms,
        m.downtime_stop_ms,
        m.downtime_pages_ms,
        m.downtime_state_ms,
        m.downtime_start_ms,
        format::size(m.bytes_sent),
        m.passes,
        m.pages_sent,
        m.zero_pages,
    )
}
