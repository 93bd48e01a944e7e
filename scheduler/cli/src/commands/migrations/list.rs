//! `shoal migrations`

use clap::Args;
use shoal_proto::cluster::ListMigrationsRequest;

use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use crate::page::Page;
use crate::view::MigrationView;

/// As much of an id as tells migrations apart.
const ID_LENGTH: usize = 8;

/// Arguments of `migrations`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Of this VM only: its name, as it was then, or its id.
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
    /// From or to this node only.
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Only those under way.
    #[arg(long)]
    running: bool,
    /// At most so many, the latest.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
}

/// Lists migrations, latest first.
pub async fn run(context: &Context, args: ListArgs) -> Result<(), CliError> {
    let request = ListMigrationsRequest {
        vm: args.vm.unwrap_or_default(),
        node: args.node.unwrap_or_default(),
        limit: args.limit,
        running_only: args.running,
    };
    let response = context
        .client()
        .await?
        .list_migrations(request)
        .await?
        .into_inner();
    let migrations: Vec<MigrationView> = response.migrations.iter().map(MigrationView::from).collect();
    context.output.show(&migrations, |migrations| text(migrations))
}

pub(in crate::commands) fn text(migrations: &[MigrationView]) -> Page {
    let header = [
        "ID", "STARTED", "VM", "FROM", "TO", "RESULT", "DOWNTIME", "TOTAL", "SENT", "REASON",
    ];
    table(
        header,
        migrations.iter().map(|m| {
            let ended = !matches!(m.result, "running" | "waiting");
            let (result, total, sent) = match &m.progress {
                None => (m.result.to_owned(), m.total_ms, m.bytes_sent),
                Some(progress) => {
                    let elapsed = std::time::Duration::from_millis(progress.elapsed_ms);
                    (
                        progress.phase.to_owned(),
                        elapsed.as_secs_f64() * 1e3,
                        progress.bytes_sent,
                    )
                }
            };
            [
                m.id.chars().take(ID_LENGTH).collect(),
                m.started.clone(),
                m.vm.clone(),
                m.from.clone(),
                m.to.clone(),
                result,
                if ended {
                    format!("{:.1} ms", m.downtime_ms)
                } else {
                    String::new()
                },
                format!("{total:.0} ms"),
                format::size(sent),
                m.reason.clone(),
            ]
        }),
    )
}
