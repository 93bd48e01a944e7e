//! `shoal migrations`: those under way and past ones, and what they are to do.

mod cancel;
mod defaults;
pub(super) mod list;
mod plot;
mod set;
pub(super) mod show;

pub use show::figures;

use clap::{Args, Subcommand};

use crate::client::Context;
use crate::error::CliError;

/// Arguments of `migrations`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct MigrationsArgs {
    #[command(subcommand)]
    command: Option<MigrationsCommand>,
    #[command(flatten)]
    list: list::ListArgs,
}

#[derive(Debug, Subcommand)]
enum MigrationsCommand {
    /// Show one, with all that is kept of it, or draw its life.
    Show(show::ShowArgs),
    /// Cancel the migration of a VM; the VM stays where it is.
    Cancel(cancel::CancelArgs),
    /// Change the policy of a VM's migration while it runs.
    Set(set::SetArgs),
    /// What migrations do unless a request says otherwise, and the caps that they share.
    Defaults(defaults::DefaultsArgs),
}

/// Lists migrations, or does what is said to them.
pub async fn run(context: &Context, args: MigrationsArgs) -> Result<(), CliError> {
    match args.command {
        None => list::run(context, args.list).await,
        Some(MigrationsCommand::Show(args)) => show::run(context, args).await,
        Some(MigrationsCommand::Cancel(args)) => cancel::run(context, args).await,
        Some(MigrationsCommand::Set(args)) => set::run(context, args).await,
        Some(MigrationsCommand::Defaults(args)) => defaults::run(context, args).await,
    }
}
