//! `shoal resolve VM --keep NODE`

use clap::Args;
use shoal_proto::cluster::ResolveVmRequest;

use crate::client::Context;
use crate::error::CliError;
use crate::view::VmView;

/// Arguments of `resolve`.
#[derive(Debug, Args)]
pub struct ResolveArgs {
    /// Name or id.
    pub vm: String,
    /// The node whose copy lives on. The other copy must be known to be gone: nobody can check it for you.
    #[arg(long, value_name = "NODE")]
    pub keep: String,
}

/// Ends a migration in doubt by an operator's decision.
pub async fn run(context: &Context, args: ResolveArgs) -> Result<(), CliError> {
    let request = ResolveVmRequest {
        vm: args.vm,
        keep_node: args.keep,
    };
    let vm = context.client().await?.resolve_vm(request).await?.into_inner();
    context.output.show(&VmView::from(&vm), |vm| {
        format!("{} is {} on {} at epoch {}", vm.name, vm.state, vm.node, vm.epoch)
    })
}
