//! `shoal rm VM`

use clap::Args;
use serde_json::json;
use shoal_proto::cluster::RemoveVmRequest;

use crate::client::Context;
use crate::error::CliError;

/// Arguments of `rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Name or id.
    pub vm: String,
    /// Stop it first if it runs.
    #[arg(long, short)]
    pub force: bool,
}

/// Removes an ended VM and its logs.
pub async fn run(context: &Context, args: RmArgs) -> Result<(), CliError> {
    let request = RemoveVmRequest {
        vm: args.vm.clone(),
        force: args.force,
    };
    context.client().await?.remove_vm(request).await?;
    context
        .output
        .show(&json!({ "removed": args.vm }), |_| format!("{} removed", args.vm))
}
