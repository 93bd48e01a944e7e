//! `shoal inspect VM`

use clap::Args;
use serde::Serialize;
use shoal_proto::cluster::{GetVmRequest, Vm};

use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use crate::page::Page;
use crate::view::{MigrationView, VmView};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Name or id.
    pub vm: String,
}

/// What `inspect` shows.
#[derive(Debug, Serialize)]
pub(super) struct Inspection {
    #[serde(flatten)]
    vm: VmView,
    image_digest: String,
    created: String,
    migrations: Vec<MigrationView>,
}

/// Shows all that is known of a VM.
pub async fn run(context: &Context, args: InspectArgs) -> Result<(), CliError> {
    let vm = context
        .client()
        .await?
        .get_vm(GetVmRequest { vm: args.vm })
        .await?
        .into_inner();
    context.output.show(&inspection(&vm), text)
}

pub(super) fn inspection(vm: &Vm) -> Inspection {
    Inspection {
        vm: VmView::from(vm),
        image_digest: vm.image_digest.clone(),
        created: format::time(vm.created_unix_ms),
        migrations: vm.migrations.iter().map(MigrationView::from).collect(),
    }
}

pub(super) fn text(inspection: &Inspection) -> Page {
    let vm = &inspection.vm;
    let mut page = Page::from_iter([
        format!("name:        {}", vm.name),
        format!("id:          {}", vm.id),
        format!("state:       {}", vm.state),
        format!("node:        {}", vm.node),
        format!("epoch:       {}", vm.epoch),
        format!("image:       {} ({})", vm.image, inspection.image_digest),
        format!("arguments:   {}", format::words(&vm.args)),
        format!("cpus:        {} ({:.2} in use)", vm.cpus, vm.cpu_use),
        format!(
            "memory:      {} ({} resident)",
            format::size(vm.memory_bytes),
            format::size(vm.resident_bytes)
        ),
        format!(
            "created:     {} ({} ago)",
            inspection.created,
            format::age(vm.age_seconds)
        ),
    ]);
    if let Some(kvm) = vm.kvm {
        let isolation = match (vm.kernel, vm.guest_kernel_isolation) {
            (_, Some(true) | None) => "",
            (Some("ring3"), _) => ", ring-3 kernel: no isolation inside the guest",
            _ => ", kernel mode emulated: no isolation inside the guest to rely on",
        };
        page.line(format!("kvm:         {kvm}{isolation}"));
    }
    if let Some(steal) = vm.cpu_steal {
        page.line(format!("stolen:      {steal:.2} CPUs"));
    }
    if let Some(set) = vm.working_set_bytes {
        let rate = format::known_rate(vm.dirty_rate_bytes_per_second);
        page.line(format!(
            "writes:      {} again and again, {rate} dirtied",
            format::size(set)
        ));
    }
    let gives_way = if vm.preemptible {
        ", gives way to higher ones"
    } else {
        ""
    };
    page.line(format!("priority:    {}{gives_way}", vm.priority));
    if let Some(preempted) = &vm.preempted {
        page.line(format!(
            "stopped:     {} x for others, the last time {} ago for {} (priority {})",
            preempted.times,
            format::age(preempted.seconds),
            preempted.by,
            preempted.by_priority
        ));
    }
    if !vm.home.is_empty() {
        page.line(format!("home:        {}", vm.home));
    }
    for (name, texts) in [
        ("labels:      ", &vm.labels),
        ("selector:    ", &vm.rules.selector),
        ("tolerates:   ", &vm.rules.tolerations),
        ("affinity:    ", &vm.rules.affinity),
        ("anti-affin.: ", &vm.rules.anti_affinity),
    ] {
        if !texts.is_empty() {
            page.line(format!("{name}{}", texts.join(", ")));
        }
    }
    if vm.rules.exclusive {
        page.line("exclusive:   it has its node for itself");
    }
    if !vm.pinned.is_empty() {
        page.line(format!(
            "locked:      to {}, by --node: `shoal unlock {}` lifts that",
            vm.pinned, vm.name
        ));
    } else if vm.locked {
        page.line("locked:      to its node");
    }
    if let Some(suspended) = &vm.suspended {
        page.line(format!(
            "suspended:   for {}: {}",
            format::age(suspended.seconds),
            suspended.reason
        ));
    }
    if let Some(status) = vm.exit_status {
        page.line(format!("exit status: {status}"));
    }
    if !vm.message.is_empty() {
        page.line(format!("message:     {}", vm.message));
    }
    if !inspection.migrations.is_empty() {
        page.blank();
        page.add(migration_table(&inspection.migrations));
    }
    page
}

/// Migrations as a table.
#[must_use]
pub fn migration_table(migrations: &[MigrationView]) -> Page {
    let header = [
        "STARTED", "VM", "FROM", "TO", "EPOCH", "RESULT", "DOWNTIME", "TOTAL", "PASSES", "SENT", "REASON",
    ];
    table(
        header,
        migrations.iter().map(|m| {
            [
                m.started.clone(),
                m.vm.clone(),
                m.from.clone(),
                m.to.clone(),
                m.epoch.to_string(),
                m.result.to_owned(),
                format!("{:.1} ms", m.downtime_ms),
                format!("{:.0} ms", m.total_ms),
                m.passes.to_string(),
                format::size(m.bytes_sent),
                m.reason.clone(),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use shoal_proto::cluster::KvmKind;

    use super::*;

    fn inspected(kvm: KvmKind, ring3_kernel: bool) -> (String, serde_json::Value) {
        let inspection = inspection(&Vm {
            kvm: kvm.into(),
            ring3_kernel,
            ..Vm::default()
        });
        let json = serde_json::to_value(&inspection).expect("JSON");
        (text(&inspection).to_string(), json)
    }

    #[test]
    fn where_nothing_isolates_the_guests_kernel_is_said() {
        let (text, json) = inspected(KvmKind::Software, true);
        let line = "kvm:         software, ring-3 kernel: no isolation inside the guest\n";
        assert!(text.contains(line), "{text}");
        assert_eq!(
            (&json["kvm"], &json["kernel"]),
            (&"software".into(), &"ring3".into())
        );
        assert_eq!(json["guest_kernel_isolation"], false);

        let (text, json) = inspected(KvmKind::Software, false);
        let line = "kvm:         software, kernel mode emulated: no isolation inside the guest to rely on\n";
        assert!(text.contains(line), "{text}");
        assert_eq!(
            (&json["kernel"], &json["guest_kernel_isolation"]),
            (&"plain".into(), &false.into())
        );
        let (text, json) = inspected(KvmKind::Hardware, false);
        assert!(text.contains("kvm:         hardware\n"), "{text}");
        assert_eq!(json["guest_kernel_isolation"], true);
        let (text, json) = inspected(KvmKind::Unspecified, false);
        assert!(!text.contains("kvm:"), "{text}");
        assert!(
            json["kvm"].is_null() && json["kernel"].is_null() && json["guest_kernel_isolation"].is_null()
        );
    }
}
