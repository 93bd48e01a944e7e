//! `shoal migrations cancel VM`

use clap::Args;
use shoal_proto::cluster::CancelMigrationRequest;

use crate::client::Context;
use crate::error::CliError;
use crate::view::MigrationView;

/// Arguments of `migrations cancel`.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// Name or id.
    vm: String,
}

/// Cancels a VM's migration and waits until that is done. Too late is an error.
pub async fn run(context: &Context, args: CancelArgs) -> Result<(), CliError> {
    let request = CancelMigrationRequest { vm: args.vm };
    let ended = context
        .client()
        .await?
        .cancel_migration(request)
        .await?
        .into_inner();
    context.output.show(&MigrationView::from(&ended), |m| {
        format!("{} stays on {}: {}", m.vm, m.from, m.reason)
    })
}
