//! `shoal ps`

use clap::Args;
use shoal_proto::cluster::ListVmsRequest;

use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use crate::view::VmView;

/// Arguments of `ps`.
#[derive(Debug, Args)]
pub struct PsArgs {}

/// Lists every VM that has not been removed.
pub async fn run(context: &Context, _args: PsArgs) -> Result<(), CliError> {
    let response = context
        .client()
        .await?
        .list_vms(ListVmsRequest {})
        .await?
        .into_inner();
    let vms: Vec<VmView> = response.vms.iter().map(VmView::from).collect();
    context.output.show(&vms, |vms| vm_table(vms))
}

/// VMs as a table.
#[must_use]
pub fn vm_table(vms: &[VmView]) -> String {
    let header = [
        "NAME", "STATE", "NODE", "IMAGE", "CPUS", "MEMORY", "RESIDENT", "CPU USE", "EPOCH", "AGE", "MESSAGE",
    ];
    table(
        header,
        vms.iter().map(|vm| {
            [
                vm.name.clone(),
                vm.state.to_owned(),
                vm.node.clone(),
                vm.image.clone(),
                vm.cpus.to_string(),
                format::size(vm.memory_bytes),
                format::size(vm.resident_bytes),
                format!("{:.2}", vm.cpu_use),
                vm.epoch.to_string(),
                format::age(vm.age_seconds),
                vm.message.clone(),
            ]
        }),
    )
}
