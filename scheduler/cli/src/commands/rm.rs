//! `shoal rm VM…`

use clap::Args;
use serde_json::json;
use shoal_proto::cluster::RemoveVmRequest;

use crate::client::Context;
use crate::error::CliError;

/// Arguments of `rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Names or ids.
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
    /// Stop it first if it runs.
    #[arg(long, short)]
    pub force: bool,
}

/// Removes ended VMs and their logs, one after the other; the first that cannot be removed ends it.
pub async fn run(context: &Context, args: RmArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    for vm in args.vms {
        let request = RemoveVmRequest {
            vm: vm.clone(),
            force: args.force,
        };
        client.remove_vm(request).await?;
        context
            .output
            .show_line(&json!({ "removed": vm }), |_| format!("{vm} removed"))?;
    }
    Ok(())
}
