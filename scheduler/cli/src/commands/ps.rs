//! `shoal ps`

use clap::Args;
use shoal_proto::cluster::{ListVmsRequest, Vm, VmPhase};

use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use crate::page::Page;
use crate::view::VmView;

/// Arguments of `ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Also those that have ended and were not removed.
    #[arg(long, short)]
    pub all: bool,
}

/// Lists the VMs that have not ended; with `--all` every one that has not been removed.
pub async fn run(context: &Context, args: PsArgs) -> Result<(), CliError> {
    let response = context
        .client()
        .await?
        .list_vms(ListVmsRequest {})
        .await?
        .into_inner();
    let has_ended = |vm: &Vm| matches!(vm.phase(), VmPhase::Exited | VmPhase::Failed);
    let shown = response.vms.iter().filter(|vm| args.all || !has_ended(vm));
    let vms: Vec<VmView> = shown.map(VmView::from).collect();
    let wide = context.output.is_wide();
    let shown = |vms: &Vec<VmView>| if wide { wide_table(vms) } else { vm_table(vms) };
    context.output.show(&vms, shown)
}

/// VMs as a table.
#[must_use]
pub fn vm_table(vms: &[VmView]) -> Page {
    let header = [
        "NAME", "STATE", "NODE", "IMAGE", "CPUS", "MEMORY", "RESIDENT", "CPU USE", "EPOCH", "AGE", "MESSAGE",
    ];
    table(
        header,
        vms.iter().map(|vm| {
            [
                vm.name.clone(),
                state(vm),
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

/// With the exit status, if it has ended with one.
fn state(vm: &VmView) -> String {
    match vm.exit_status {
        Some(status) => format!("{} ({status})", vm.state),
        None => vm.state.to_owned(),
    }
}

/// What their nodes measure of VMs, as a table.
#[must_use]
pub fn wide_table(vms: &[VmView]) -> Page {
    let header = [
        "NAME",
        "STATE",
        "NODE",
        "CPUS",
        "CPU USE",
        "STOLEN",
        "MEMORY",
        "RESIDENT",
        "WORKING SET",
        "DIRTIES",
        "READS/WRITES",
        "PRIORITY",
        "LOCKED",
        "MESSAGE",
    ];
    let cpus = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
    let io = |vm: &VmView| {
        let (reads, writes) = (vm.read_bytes_per_second, vm.write_bytes_per_second);
        format!("{}/{}", format::known_rate(reads), format::known_rate(writes))
    };
    table(
        header,
        vms.iter().map(|vm| {
            [
                vm.name.clone(),
                state(vm),
                vm.node.clone(),
                vm.cpus.to_string(),
                format!("{:.2}", vm.cpu_use),
                cpus(vm.cpu_steal),
                format::size(vm.memory_bytes),
                format::size(vm.resident_bytes),
                vm.working_set_bytes.map_or("-".to_owned(), format::size),
                format::known_rate(vm.dirty_rate_bytes_per_second),
                io(vm),
                vm.priority.to_string(),
                if vm.locked { "yes" } else { "no" }.to_owned(),
                vm.message.clone(),
            ]
        }),
    )
}
