//! `shoal stop VM`

use clap::Args;
use shoal_proto::cluster::StopVmRequest;

use crate::client::Context;
use crate::error::CliError;
use crate::view::VmView;

/// Arguments of `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Name or id.
    pub vm: String,
}

/// Powers a VM off and waits until it is.
pub async fn run(context: &Context, args: StopArgs) -> Result<(), CliError> {
    let vm = context
        .client()
        .await?
        .stop_vm(StopVmRequest { vm: args.vm })
        .await?
        .into_inner();
    context
        .output
        .show(&VmView::from(&vm), |vm| format!("{} is {}", vm.name, vm.state))
}
