//! `shoal migrations set VM`

use clap::Args;
use shoal_proto::cluster::SetMigrationRequest;
use shoal_proto::vm::MigrationPolicy;

use crate::client::Context;
use crate::error::CliError;
use crate::policy_args::ChangeArgs;
use crate::view::PolicyView;

/// Arguments of `migrations set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// Name or id.
    vm: String,
    #[command(flatten)]
    change: ChangeArgs,
}

/// Changes what is said and leaves the rest; shows the policy that now holds.
pub async fn run(context: &Context, args: SetArgs) -> Result<(), CliError> {
    let policy = MigrationPolicy::from(&args.change);
    if policy == MigrationPolicy::default() {
        return Err(CliError::Usage(
            "nothing to set: give --bandwidth, --max-downtime, --timeout, --on-stall or --priority".into(),
        ));
    }
    let request = SetMigrationRequest {
        vm: args.vm,
        policy: Some(policy),
    };
    let now = context.client().await?.set_migration(request).await?.into_inner();
    context.output.show(&PolicyView::from(&now), PolicyView::line)
}
