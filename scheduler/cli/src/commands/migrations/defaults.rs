//! `shoal migrations defaults`

use clap::{Args, Subcommand};
use shoal_proto::cluster::{GetMigrationDefaultsRequest, MigrationDefaults};
use shoal_proto::vm::MigrationPolicy;

use crate::client::Context;
use crate::error::CliError;
use crate::format::parse_rate;
use crate::policy_args::PolicyArgs;
use crate::view::DefaultsView;

/// Arguments of `migrations defaults`.
#[derive(Debug, Args)]
pub struct DefaultsArgs {
    #[command(subcommand)]
    command: Option<DefaultsCommand>,
}

#[derive(Debug, Subcommand)]
enum DefaultsCommand {
    /// Show them.
    Get,
    /// Change what is said, and leave the rest. Migrations under way keep their policy; caps hold at once.
    Set(Box<SetArgs>),
}

#[derive(Debug, Args)]
struct SetArgs {
    #[command(flatten)]
    policy: PolicyArgs,
    /// All migrations together use at most this much of the network per second, at least 1MiB; 0: no cap. Those for which too little
    /// is left wait until others have ended.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    cluster_bandwidth: Option<u64>,
    /// All migrations from and to one node use at most this much per second, at least 1MiB; 0: no cap.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    link_bandwidth: Option<u64>,
    /// Forget first what was set before.
    #[arg(long)]
    reset: bool,
}

/// Shows or changes the cluster's defaults.
pub async fn run(context: &Context, args: DefaultsArgs) -> Result<(), CliError> {
    let defaults = match args.command {
        None | Some(DefaultsCommand::Get) => {
            let request = GetMigrationDefaultsRequest {};
            context.client().await?.get_migration_defaults(request).await?
        }
        Some(DefaultsCommand::Set(args)) => {
            let request = MigrationDefaults {
                policy: Some(MigrationPolicy::from(&args.policy)),
                cluster_bandwidth_bytes_per_second: args.cluster_bandwidth,
                link_bandwidth_bytes_per_second: args.link_bandwidth,
                reset: args.reset,
            };
            let nothing = MigrationDefaults {
                policy: Some(MigrationPolicy::default()),
                ..MigrationDefaults::default()
            };
            if request == nothing {
                return Err(CliError::Usage(
                    "nothing to set: `shoal migrations defaults set --help` lists what there is".into(),
                ));
            }
            context.client().await?.set_migration_defaults(request).await?
        }
    };
    context
        .output
        .show(&DefaultsView::from(&defaults.into_inner()), DefaultsView::text)
}
