//! Records and reports as users see them.

use std::time::Duration;

use shoal_plan::{KvmKind, Peak, Rules, SoftwareKernel, Term};
use shoal_proto::cluster::{self, NodeState, VmPhase};

use crate::execute::lost;
use crate::nodes::{Liveness, NodeEntry, ObservedVm};
use crate::observe;
use crate::other_load::OtherLoads;
use crate::queue::Waiting;
use crate::record::{Cordon, ImageRecord, NodeRecord, Outcome, Phase, VmRecord};
use crate::scheduler::Scheduler;
use crate::vms::VmEntry;

/// A guest that has written nothing for so long counts as one that has nothing to say.
const BOOT_TIME: Duration = Duration::from_secs(60);

/// A VM, without its migrations.
pub fn vm(scheduler: &Scheduler, entry: &VmEntry) -> cluster::Vm {
    let record = entry.record();
    let node = scheduler.nodes.get(&record.node);
    let seen = node
        .as_ref()
        .and_then(|node| node.observed_vm(record.id, record.epoch));
    // An older record does not say it. Its node does, which is of the same kind.
    let of_node = || node.as_ref().and_then(|node| node.record().kvm);
    let runs_on = record.kvm.or_else(of_node);
    let (phase, mut message) = phase(scheduler, entry);
    let faults = seen
        .as_ref()
        .and_then(|seen| seen.facts.status.as_ref())
        .map_or("", |status| status.faults.as_str());
    if !faults.is_empty() {
        message = format!("FAULTS ARE ARMED in its VMM, for a test ({faults}) {message}");
    }
    let booting =
        phase == VmPhase::Running && !scheduler.schedulers.follows() && is_booting(entry, seen.as_ref());
    let exit_status = match &record.phase {
        Phase::Ending(Outcome::Exited { status, .. }) | Phase::Ended(Outcome::Exited { status, .. }) => {
            *status
        }
        _ => None,
    };
    cluster::Vm {
        id: record.id.to_string(),
        name: record.name.to_string(),
        node: record.node.to_string(),
        phase: phase.into(),
        epoch: record.epoch.0,
        image: record.image.clone(),
        cpus: record.cpus,
        memory_bytes: record.memory_bytes,
        created_unix_ms: record.created_unix_ms,
        message,
        exit_status,
        resident_bytes: seen.as_ref().map_or(0, |seen| seen.facts.resident_bytes),
        cpu_use: seen.as_ref().map_or(0.0, |seen| seen.facts.cpu_use),
        args: record.args.clone(),
        migrations: Vec::new(),
        image_digest: record.image_digest.clone(),
        labels: record.wishes.labels.iter().map(ToString::to_string).collect(),
        rules: record.wishes.rules.as_deref().map(rules),
        locked: record.wishes.locked,
        priority: record.wishes.priority,
        home: record.home.as_ref().map(ToString::to_string).unwrap_or_default(),
        cpu_steal: seen.as_ref().and_then(|seen| seen.facts.cpu_steal),
        dirty_rate_bytes_per_second: seen.as_ref().and_then(|seen| seen.dirty_rate).map(Peak::value),
        working_set_bytes: seen.as_ref().and_then(|seen| seen.working_set).map(Peak::value),
        read_bytes_per_second: seen.as_ref().and_then(|seen| seen.facts.read_bytes_per_second),
        write_bytes_per_second: seen.as_ref().and_then(|seen| seen.facts.write_bytes_per_second),
        suspension: record
            .suspended
            .as_ref()
            .filter(|_| !record.phase.is_over())
            .map(|suspension| cluster::Suspension {
                reason: suspension.reason.clone(),
                since_unix_ms: suspension.since_unix_ms,
            }),
        preemptible: record.wishes.preemptible,
        preempted: preempted(&record),
        kvm: kvm(runs_on).into(),
        ring3_kernel: record.runs_ring3_kernel(),
        booting,
        pinned: record.pinned().map(ToString::to_string).unwrap_or_default(),
    }
}

/// It runs, not for long, and its guest has not written anything in this run.
fn is_booting(entry: &VmEntry, seen: Option<&ObservedVm>) -> bool {
    let record = entry.record();
    let reported = seen.and_then(|seen| Some(seen.facts.status.as_ref()?.console_offset));
    record.ran().is_some_and(|ran| ran < BOOT_TIME)
        && entry.console_end().max(reported.unwrap_or(0)) <= record.runs.console_offset
}

fn kvm(kind: Option<KvmKind>) -> cluster::KvmKind {
    match kind {
        None => cluster::KvmKind::Unspecified,
        Some(KvmKind::Hardware) => cluster::KvmKind::Hardware,
        Some(KvmKind::Software) => cluster::KvmKind::Software,
    }
}

/// How often, and for whom the last time, if ever.
pub fn preempted(record: &VmRecord) -> Option<cluster::Preempted> {
    let last = record.runs.last_preempted.as_ref()?;
    Some(cluster::Preempted {
        times: record.runs.preempted,
        by: last.name.clone(),
        by_priority: last.priority,
        unix_ms: last.since_unix_ms,
    })
}

/// A VM that waits for room.
pub fn queued(waiting: &Waiting) -> cluster::Vm {
    let record = &waiting.record.vm;
    cluster::Vm {
        id: record.id.to_string(),
        name: record.name.to_string(),
        phase: VmPhase::Pending.into(),
        image: record.image.clone(),
        image_digest: record.image_digest.clone(),
        cpus: record.cpus,
        memory_bytes: record.memory_bytes,
        created_unix_ms: record.created_unix_ms,
        message: waiting.message(),
        args: record.args.clone(),
        labels: record.wishes.labels.iter().map(ToString::to_string).collect(),
        rules: record.wishes.rules.as_deref().map(rules),
        priority: record.wishes.priority,
        preemptible: record.wishes.preemptible,
        preempted: preempted(record),
        locked: record.wishes.locked,
        pinned: waiting
            .record
            .pinned
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        ..cluster::Vm::default()
    }
}

fn rules(rules: &Rules) -> cluster::Rules {
    let texts = |terms: &[Term]| terms.iter().map(ToString::to_string).collect();
    cluster::Rules {
        selector: texts(&rules.selector),
        tolerations: texts(&rules.tolerations),
        affinity: texts(&rules.affinity),
        anti_affinity: texts(&rules.anti_affinity),
        exclusive: rules.exclusive,
    }
}

/// A VM with its migrations.
pub fn vm_with_history(scheduler: &Scheduler, entry: &VmEntry) -> cluster::Vm {
    cluster::Vm {
        migrations: entry.migrations(),
        ..vm(scheduler, entry)
    }
}

fn phase(scheduler: &Scheduler, entry: &VmEntry) -> (VmPhase, String) {
    let record = entry.record();
    let message = record.message.clone();
    let phase = match &record.phase {
        Phase::Ended(Outcome::Exited { .. }) => return (VmPhase::Exited, message),
        Phase::Ended(Outcome::Failed { .. }) => return (VmPhase::Failed, message),
        Phase::Starting => VmPhase::Starting,
        Phase::Queued => return (VmPhase::Pending, message),
        Phase::Running => VmPhase::Running,
        Phase::Stopping | Phase::Ending(_) => VmPhase::Stopping,
    };
    if let Some(open) = scheduler.migrations.get(record.id) {
        let (view, intent) = (open.view(), &open.intent);
        return match view.in_doubt {
            Some(why) => (VmPhase::InDoubt, why),
            None if view.post_copy && view.link_lost => (
                VmPhase::Migrating,
                format!(
                    "waits for {}, which has memory of it and is not connected",
                    intent.from
                ),
            ),
            None if view.post_copy => (
                VmPhase::Migrating,
                format!("runs here and fetches memory from {}", intent.from),
            ),
            None => {
                let message = match open.waits() {
                    Some(why) => format!("waits to move to {}: {why}", intent.to),
                    None => format!("to {}: {}", intent.to, intent.reason),
                };
                (VmPhase::Migrating, message)
            }
        };
    }
    let node = scheduler.nodes.get(&record.node);
    if !scheduler.schedulers.follows() && !node.as_ref().is_some_and(|node| node.is_reachable()) {
        let why = node.and_then(|node| node.trouble());
        let why = why.unwrap_or_else(|| "does not answer".to_owned());
        return (VmPhase::Unknown, format!("node {}: {why}", record.node));
    }
    match &record.suspended {
        Some(suspension) if record.phase == Phase::Running => (VmPhase::Suspended, suspension.reason.clone()),
        _ => (phase, message),
    }
}

/// All nodes, by name.
pub fn nodes(scheduler: &Scheduler) -> Vec<cluster::Node> {
    let entries = scheduler.nodes.list();
    let typical = observe::typical_speed(&entries);
    let others = OtherLoads::of(&entries);
    let view = |entry| node_with(scheduler, entry, typical, &others);
    entries.iter().map(|entry| view(entry)).collect()
}

/// A node.
pub fn node(scheduler: &Scheduler, entry: &NodeEntry) -> cluster::Node {
    let entries = scheduler.nodes.list();
    let typical = observe::typical_speed(&entries);
    node_with(scheduler, entry, typical, &OtherLoads::of(&entries))
}

fn node_with(
    scheduler: &Scheduler,
    entry: &NodeEntry,
    typical_speed: Option<f64>,
    others: &OtherLoads,
) -> cluster::Node {
    let record = entry.record();
    let (observed, reachable) = entry.observed();
    let figures = entry.figures();
    let follows = scheduler.schedulers.follows();
    let state = match record.cordon {
        _ if record.lost.is_some() && (follows || entry.liveness() != Liveness::Live) => NodeState::Lost,
        _ if record.lost.is_some() => NodeState::NotReady,
        Cordon::Open if follows => NodeState::Unspecified,
        _ if !reachable && !follows => NodeState::Unreachable,
        Cordon::Open if record.kvm_is_unusable() => NodeState::NotReady,
        Cordon::Open => NodeState::Ready,
        Cordon::Draining => NodeState::Draining,
        Cordon::Cordoned => NodeState::Cordoned,
    };
    let vms = scheduler.vms.count_on_node(&record.name);
    let trouble = trouble(scheduler, entry, &record);
    cluster::Node {
        name: record.name.to_string(),
        address: record.address,
        state: state.into(),
        cpus: record.cpus,
        memory_bytes: record.memory_bytes,
        memory_available_bytes: observed.memory_available,
        cpu_load: others.on(entry).0.mean + entry.wanted_cpus(),
        vms: u32::try_from(vms).unwrap_or(u32::MAX),
        pressure_memory: observed.pressure.memory.unwrap_or(0.0),
        pressure_cpu: observed.pressure.cpu.unwrap_or(0.0),
        labels: record.wishes.labels.iter().map(ToString::to_string).collect(),
        taints: record.wishes.taints.iter().map(ToString::to_string).collect(),
        reserved_memory_bytes: record.wishes.reserved_memory_bytes,
        reserved_cpus: f64::from(record.wishes.reserved_millicpus) / 1e3,
        liveness: liveness(entry).into(),
        silent_ms: entry
            .silent_for()
            .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        cpu_use: figures.cpu_use,
        run_queue: figures.run_queue,
        cpu_model: record.cpu_model,
        cpu_speed: observe::relative_speed(entry, typical_speed),
        cpu_quota: entry.cpu_quota(),
        psi_cpu: observed.pressure.cpu,
        psi_memory: observed.pressure.memory,
        psi_io: observed.pressure.io,
        swap_in_bytes_per_second: figures.swap_in_bytes_per_second,
        swap_out_bytes_per_second: figures.swap_out_bytes_per_second,
        network_receive_bytes_per_second: figures.network_receive_bytes_per_second,
        network_transmit_bytes_per_second: figures.network_transmit_bytes_per_second,
        numa: figures.numa.iter().map(numa).collect(),
        kvm: kvm(record.kvm).into(),
        kvm_trouble: record.kvm_trouble,
        trouble,
    }
}

/// Why a node takes no VMs, or not all, although nobody has said that it should not.
fn trouble(scheduler: &Scheduler, entry: &NodeEntry, record: &NodeRecord) -> String {
    let kvm = record
        .kvm_is_unusable()
        .then(|| format!("KVM cannot be used there: {}", record.kvm_trouble));
    let lost = record
        .lost
        .as_ref()
        .map(|lost| lost::in_words(&record.name, lost, entry.liveness()));
    let failing = scheduler.failures.of(&record.name);
    let failing = failing.iter().map(|(_, why)| why.to_string());
    let own = entry.trouble().into_iter().chain(lost).chain(kvm);
    let all: Vec<String> = own.chain(failing).collect();
    all.join("; ")
}

fn liveness(entry: &NodeEntry) -> cluster::Liveness {
    match entry.liveness() {
        Liveness::Live => cluster::Liveness::Live,
        Liveness::Suspect => cluster::Liveness::Suspect,
        Liveness::Lost => cluster::Liveness::Lost,
    }
}

fn numa(node: &shoal_proto::node::NumaNode) -> cluster::NumaNode {
    cluster::NumaNode {
        id: node.id,
        cpus: node.cpus,
        memory_bytes: node.memory_bytes,
        memory_available_bytes: node.memory_available_bytes,
    }
}

/// An image.
pub fn image(record: &ImageRecord) -> cluster::Image {
    let kernels = record.kernels();
    let hardware = kernels.hardware.then_some(cluster::KvmKind::Hardware);
    let software = kernels.software.map(|_| cluster::KvmKind::Software);
    cluster::Image {
        name: record.name.clone(),
        digest: record.digest.clone(),
        size_bytes: record.blobs().map(|blob| blob.size_bytes).sum(),
        cpus: record.cpus,
        memory_bytes: record.memory_bytes,
        cmdline: record.cmdline.clone(),
        created_unix_ms: record.created_unix_ms,
        kvm: hardware.into_iter().chain(software).map(i32::from).collect(),
        ring3_kernel: kernels.software == Some(SoftwareKernel::Ring3),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::execute::launch;
    use crate::record::{Runs, now_unix_ms};
    use crate::testing::Cluster;

    async fn started(cluster: &Cluster, name: &str) -> Arc<VmEntry> {
        let draft = cluster.draft(name, 64 << 20);
        let (entry, guard) = launch::submit(&cluster.scheduler, draft, None)
            .await
            .expect("placed");
        launch::start(&cluster.scheduler, &entry, &guard)
            .await
            .expect("started");
        cluster.report();
        entry
    }

    async fn change(cluster: &Cluster, entry: &VmEntry, runs: Runs) {
        let record = VmRecord {
            runs,
            ..entry.record().as_ref().clone()
        };
        let saved = cluster.scheduler.save_vm(record, Vec::new()).await;
        saved.expect("stored");
    }

    #[tokio::test]
    async fn a_vm_is_booting_until_its_guest_has_written_or_a_minute_has_passed() {
        let cluster = Cluster::start(1, 1 << 30).await;
        let seen = |entry: &VmEntry| {
            let vm = vm(&cluster.scheduler, entry);
            assert_eq!(
                vm.phase(),
                VmPhase::Running,
                "whoever does not know of it sees it run"
            );
            vm.booting
        };
        let talks = started(&cluster, "talks").await;
        assert!(seen(&talks));
        talks.console_reached(1);
        assert!(!seen(&talks));

        let silent = started(&cluster, "silent").await;
        let long_ago = Runs {
            started_unix_ms: now_unix_ms() - 61_000,
            ..Runs::default()
        };
        change(&cluster, &silent, long_ago).await;
        assert!(!seen(&silent));

        // What an earlier run wrote is no sign of life.
        let again = started(&cluster, "again").await;
        let second = Runs {
            started_unix_ms: now_unix_ms(),
            console_offset: 100,
            ..Runs::default()
        };
        change(&cluster, &again, second).await;
        again.console_reached(100);
        assert!(seen(&again));
        again.console_reached(101);
        assert!(!seen(&again));
    }
}
