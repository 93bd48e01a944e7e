//! `shoal lock VM` and `shoal unlock VM`

use clap::Args;
use shoal_proto::cluster::UpdateVmRequest;

use crate::client::Context;
use crate::error::CliError;
use crate::view::VmView;

/// Arguments of `lock` and `unlock`.
#[derive(Debug, Args)]
pub struct LockArgs {
    /// Name or id.
    pub vm: String,
}

/// Keeps a VM on its node, or lets it be moved. Waits until a migration of it has ended.
pub async fn run(context: &Context, args: LockArgs, locked: bool) -> Result<(), CliError> {
    let request = UpdateVmRequest {
        vm: args.vm,
        locked: Some(locked),
        priority: None,
    };
    let vm = context.client().await?.update_vm(request).await?.into_inner();
    context.output.show(&VmView::from(&vm), |vm| {
        if vm.locked {
            format!("{} stays on {}", vm.name, vm.node)
        } else {
            format!("{} may be moved", vm.name)
        }
    })
}
