//! `shoal suspend VM…` and `shoal resume VM…`

use clap::Args;
use shoal_proto::cluster::{ResumeVmRequest, SuspendVmRequest};

use crate::client::Context;
use crate::error::CliError;
use crate::page::Page;
use crate::view::VmView;

/// Arguments of `suspend`.
#[derive(Debug, Args)]
pub struct SuspendArgs {
    /// Names or ids.
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
    /// Why, for whoever asks later.
    #[arg(long, default_value = "")]
    pub reason: String,
}

/// Arguments of `resume`.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// Names or ids.
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}

/// Stops the vCPUs of VMs, one after the other; the first that cannot be suspended ends it.
pub async fn suspend(context: &Context, args: SuspendArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let mut done = vec![];
    for vm in args.vms {
        let reason = args.reason.clone();
        let vm = client.suspend_vm(SuspendVmRequest { vm, reason }).await?;
        done.push(VmView::from(&vm.into_inner()));
    }
    context.output.show(&done, |vms| text(vms))
}

/// Lets VMs run on, one after the other; the first that cannot be resumed ends it.
pub async fn resume(context: &Context, args: ResumeArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let mut done = vec![];
    for vm in args.vms {
        let vm = client.resume_vm(ResumeVmRequest { vm }).await?;
        done.push(VmView::from(&vm.into_inner()));
    }
    context.output.show(&done, |vms| text(vms))
}

pub(super) fn text(vms: &[VmView]) -> Page {
    let lines = vms.iter().map(|vm| format!("{} is {}", vm.name, vm.state));
    lines.collect()
}
