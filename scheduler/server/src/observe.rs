//! What agents report becomes what the planner sees, and what does not agree with the records is handed to
//! [`crate::reconcile`]. A report costs what is in it, never a look at the whole cluster.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use shoal_plan::{Bytes, BytesPerSecond, CannotMove, ClusterSnapshot, InFlight, NodeState, NodeView, VmView};
use shoal_proto::{Epoch, NodeName, VmId, node, vm};
use shoal_report::Report;

use crate::cpus::{Kinds, MsrList};
use crate::events::{Kind, NewEvent};
use crate::nodes::{LOST, Liveness, NodeEntry, ObservedVm, SILENCE};
use crate::other_load::OtherLoads;
use crate::queue;
use crate::reconcile::Subject;
use crate::record::{Cordon, Intent, NodeRecord, Phase};
use crate::scheduler::Scheduler;
use crate::vms::VmEntry;

/// From so many VMs on they are looked at by several threads, at most so many.
const WORTH_THREADS: usize = 10_000;
const MOST_THREADS: usize = 4;

/// Takes a node's report, which lists every VM of the node.
pub fn report(scheduler: &Scheduler, name: &NodeName, entry: &NodeEntry, report: &Report) {
    let vms: Vec<_> = report
        .vms
        .values()
        .filter_map(|facts| key(facts).map(|key| (key, Arc::clone(facts))))
        .collect();
    let listed: HashSet<(VmId, Epoch)> = vms.iter().map(|(key, _)| *key).collect();
    let subjects: Vec<Subject> = vms
        .iter()
        .filter_map(|(key, facts)| disagreement(scheduler, name, *key, facts))
        .collect();
    if let Some(heard) = entry.heartbeat(&report.node, vms) {
        scheduler.predictions.reported(heard.after, heard.grown);
    }
    if entry.is_lost() {
        return scheduler.reconcile.push(Subject::Returned(name.clone()));
    }
    for subject in subjects {
        scheduler.reconcile.push(subject);
    }
    for owned in scheduler.vms.on_node(name) {
        let record = owned.record();
        if !listed.contains(&(record.id, record.epoch)) {
            scheduler.reconcile.push(Subject::Vm(record.id));
        }
    }
}

/// Takes news of one VM.
pub fn vm_changed(scheduler: &Scheduler, name: &NodeName, entry: &NodeEntry, facts: node::VmFacts) {
    let Some(key) = key(&facts) else { return };
    let subject = disagreement(scheduler, name, key, &facts);
    entry.vm_changed(key, facts);
    if let Some(subject) = subject.filter(|_| !entry.is_lost()) {
        scheduler.reconcile.push(subject);
    }
}

/// Whether a node may add to a VM's console log: the owner, and both ends of an open migration.
pub fn may_write_console(scheduler: &Scheduler, name: &NodeName, vm: VmId, epoch: Epoch) -> bool {
    let Some(entry) = scheduler.vms.get(vm) else {
        return false;
    };
    let record = entry.record();
    let owner = record.node == *name && record.epoch == epoch;
    owner
        || scheduler
            .migrations
            .get(vm)
            .is_some_and(|migration| is_party(&migration.intent, name, epoch))
}

/// Whether a node at an epoch is one of the two ends of a migration.
fn is_party(intent: &Intent, node: &NodeName, epoch: Epoch) -> bool {
    (intent.from == *node && intent.from_epoch == epoch) || (intent.to == *node && intent.epoch == epoch)
}

/// Announces that a node has begun or ceased to report, if it has.
pub fn announce_liveness(scheduler: &Scheduler, entry: &NodeEntry) {
    let Some(liveness) = entry.liveness_change() else {
        return;
    };
    let node = entry.record();
    let silent = |kind, limit: Duration, then: &str| {
        let vms = scheduler.vms.count_on_node(&node.name);
        let seconds = limit.as_secs();
        let name = &node.name;
        NewEvent::new(
            kind,
            format!(
                "{name} has not reported for {seconds} s; its {vms} VMs are unknown, not restarted{then}"
            ),
        )
    };
    let event = match liveness {
        Liveness::Live => NewEvent::new(
            Kind::NodeReady,
            format!("{} answers at {}", node.name, node.address),
        ),
        Liveness::Suspect => silent(Kind::NodeUnreachable, SILENCE, ""),
        Liveness::Lost => silent(Kind::NodeLost, LOST, ": it counts as lost until it reports"),
    };
    scheduler.events.publish(event.node(&node.name));
}

/// Nodes by name with what the planner calls them, for one look at all VMs: to find each VM's node in the table would take
/// longer than all the rest.
struct Hosts(HashMap<NodeName, Host>);

struct Host {
    entry: Arc<NodeEntry>,
    name: shoal_plan::NodeName,
    /// Known, and not the same on all nodes.
    msrs: Option<MsrList>,
}

impl Hosts {
    fn new(nodes: &[Arc<NodeEntry>]) -> Self {
        let mut named: HashMap<NodeName, Host> = HashMap::with_capacity(nodes.len());
        for entry in nodes {
            let name = entry.name();
            let host = Host {
                entry: Arc::clone(entry),
                name: shoal_plan::NodeName::new(name.as_str()),
                msrs: entry.msrs(),
            };
            named.insert(name, host);
        }
        let lists: HashSet<MsrList> = named.values().filter_map(|host| host.msrs).collect();
        if lists.len() < 2 {
            named.values_mut().for_each(|host| host.msrs = None);
        }
        Self(named)
    }

    fn msrs(&self, node: &NodeName) -> Option<MsrList> {
        self.0.get(node).and_then(|host| host.msrs)
    }

    fn seen(&self, node: &NodeName, vm: VmId, epoch: Epoch) -> Option<ObservedVm> {
        self.0
            .get(node)
            .and_then(|host| host.entry.observed_vm(vm, epoch))
    }

    fn name(&self, node: &NodeName) -> shoal_plan::NodeName {
        let known = self.0.get(node).map(|host| host.name.clone());
        known.unwrap_or_else(|| shoal_plan::NodeName::new(node.as_str()))
    }
}

/// The cluster as the planner is told of it.
pub fn snapshot(scheduler: &Scheduler) -> ClusterSnapshot {
    let all = scheduler.nodes.list();
    let hosts = Hosts::new(&all);
    let entries = scheduler.vms.list();
    let threads = match entries.len() {
        ..WORTH_THREADS => 1,
        _ => std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(MOST_THREADS),
    };
    let vms = vm_views(scheduler, &hosts, &entries, threads);
    let mut kinds = Kinds::new();
    kinds.insert(None, scheduler.cpus.baseline().into_iter().collect());
    for entry in &entries {
        let record = entry.record();
        let kinds = kinds.entry(hosts.msrs(&record.node)).or_default();
        if let Some(cpu) = record.cpu.as_ref().filter(|cpu| !kinds.contains(*cpu)) {
            kinds.insert(cpu.clone());
        }
    }
    let mut lacks = HashMap::new();
    let mut nodes: Vec<NodeView> = vec![];
    let typical = typical_speed(&all);
    let others = OtherLoads::of(&all);
    for entry in all {
        let record = entry.record();
        let cpu = record.cpu.clone();
        let failing = scheduler.failures.of(&record.name);
        let mut view = node_view(&entry, record);
        view.failing = failing;
        (view.other, view.pressure_memory) = others.on(&entry);
        view.speed = relative_speed(&entry, typical);
        if let Some(cpu) = cpu {
            let msrs = hosts.msrs(&entry.name());
            let of_kind = lacks
                .entry((cpu.clone(), msrs))
                .or_insert_with(|| scheduler.cpus.lacks(&kinds, &cpu, msrs));
            view.cpu_lacks = Arc::clone(of_kind);
        }
        nodes.push(view);
    }
    ClusterSnapshot {
        nodes,
        vms,
        held: queue::held(scheduler),
        margins: scheduler.predictions.margins(),
    }
}

/// The median of what is known of the nodes' CPUs.
pub fn typical_speed(nodes: &[Arc<NodeEntry>]) -> Option<f64> {
    let mut speeds: Vec<f64> = nodes.iter().filter_map(|node| node.cpu_speed()).collect();
    let middle = speeds.len() / 2;
    (!speeds.is_empty()).then(|| *speeds.select_nth_unstable_by(middle, f64::total_cmp).1)
}

/// Speed of a node's CPUs by that of the typical node; 1 where either is not known, or they hardly differ: two measurements of
/// one CPU differ a little, too.
pub fn relative_speed(node: &NodeEntry, typical: Option<f64>) -> f64 {
    const SAME: std::ops::RangeInclusive<f64> = 0.9..=1.1;
    let known = node.cpu_speed().zip(typical);
    let relative = known.map_or(1.0, |(speed, typical)| (speed / typical).clamp(0.1, 10.0));
    if SAME.contains(&relative) { 1.0 } else { relative }
}

fn key(facts: &node::VmFacts) -> Option<(VmId, Epoch)> {
    let status = facts.status.as_ref()?;
    let id = status
        .vm_id
        .parse()
        .map_err(|error| tracing::warn!(%error, "a report names a VM that cannot be"))
        .ok()?;
    let epoch = Epoch::from_wire(status.epoch)
        .map_err(|error| tracing::warn!(%error, "a report names an epoch that cannot be"))
        .ok()?;
    Some((id, epoch))
}

/// What has to be looked at because a report and the records do not say the same.
fn disagreement(
    scheduler: &Scheduler,
    name: &NodeName,
    (vm, epoch): (VmId, Epoch),
    facts: &node::VmFacts,
) -> Option<Subject> {
    let stray = Subject::Stray {
        node: name.clone(),
        vm,
        epoch,
    };
    let Some(entry) = scheduler.vms.get(vm) else {
        return Some(stray);
    };
    let record = entry.record();
    let owner = record.node == *name && record.epoch == epoch;
    if let Some(migration) = scheduler.migrations.get(vm) {
        let party = owner || is_party(&migration.intent, name, epoch);
        return if party { None } else { Some(stray) };
    }
    if !owner {
        return Some(stray);
    }
    let state = facts
        .status
        .as_ref()
        .map_or(vm::VmState::Unspecified, vm::VmStatus::state);
    let wanted = match record.suspended {
        Some(_) => vm::VmState::Paused,
        None => vm::VmState::Running,
    };
    let agrees = record.phase == Phase::Running && facts.vmm_alive && state == wanted;
    if agrees { None } else { Some(Subject::Vm(vm)) }
}

fn node_view(entry: &NodeEntry, record: NodeRecord) -> NodeView {
    let (observed, reachable) = entry.observed();
    let state = match record.cordon {
        _ if !reachable => NodeState::Unreachable,
        Cordon::Open => NodeState::Ready,
        Cordon::Draining => NodeState::Draining,
        Cordon::Cordoned => NodeState::Cordoned,
    };
    NodeView {
        state,
        memory_available: Bytes(observed.memory_available),
        other_growth: observed.other_growth.value(),
        pressure_cpu: observed.pressure.cpu.unwrap_or(0.0),
        migration_tls: record.migration_tls,
        kvm: record.kvm,
        kvm_trouble: (!record.kvm_trouble.is_empty()).then(|| record.kvm_trouble.into()),
        labels: record.wishes.labels,
        taints: record.wishes.taints,
        reserved_memory: Bytes(record.wishes.reserved_memory_bytes),
        reserved_cpus: f64::from(record.wishes.reserved_millicpus) / 1e3,
        link_rate: entry.link_rate().map(BytesPerSecond),
        report_age: entry.silent_for().unwrap_or_default(),
        cpu_limit: entry.cpu_quota(),
        ..NodeView::new(record.name.as_str(), record.cpus, Bytes(record.memory_bytes))
    }
}

/// What a VM dirties in a second: as its node samples it, or else as its latest migration measured it. One under way knows
/// better than samples, which end with its start.
fn dirty_rate(entry: &VmEntry, seen: Option<&ObservedVm>, migrates: bool) -> Option<u64> {
    let sampled = seen.and_then(|seen| seen.dirty_rate).map(shoal_plan::Peak::value);
    let migration = entry.dirty_rate();
    if migrates {
        migration.or(sampled)
    } else {
        sampled.or(migration)
    }
}

/// All VMs, in the order of the entries. In a large cluster that is mostly waiting for memory, which threads do at once. They
/// allocate next to nothing: what each thread's allocator keeps would add up.
fn vm_views(scheduler: &Scheduler, hosts: &Hosts, entries: &[Arc<VmEntry>], threads: usize) -> Vec<VmView> {
    let look = |entries: &[Arc<VmEntry>], views: &mut [Option<VmView>]| {
        for (entry, view) in entries.iter().zip(views) {
            *view = vm_view(scheduler, hosts, entry);
        }
    };
    let mut views: Vec<Option<VmView>> = Vec::new();
    views.resize_with(entries.len(), || None);
    let part = entries.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let mut parts = entries.chunks(part).zip(views.chunks_mut(part));
        let own = parts.next();
        for (entries, views) in parts {
            scope.spawn(move || look(entries, views));
        }
        own.into_iter().for_each(|(entries, views)| look(entries, views));
    });
    views.into_iter().flatten().collect()
}

fn vm_view(scheduler: &Scheduler, hosts: &Hosts, entry: &VmEntry) -> Option<VmView> {
    let record = entry.record();
    let migration = scheduler.migrations.get(record.id);
    let cannot_move = match &record.phase {
        Phase::Ended(_) | Phase::Queued => return None,
        Phase::Starting => Some(CannotMove::Starting),
        Phase::Stopping => Some(CannotMove::Stopping),
        Phase::Ending(_) => Some(CannotMove::NotRunning),
        Phase::Running
            if migration
                .as_ref()
                .is_some_and(|open| open.view().in_doubt.is_some()) =>
        {
            Some(CannotMove::InDoubt)
        }
        Phase::Running
            if migration
                .as_ref()
                .is_some_and(|open| open.intent.to == record.node) =>
        {
            Some(CannotMove::Settling)
        }
        Phase::Running if record.pinned().is_some() => Some(CannotMove::Pinned),
        Phase::Running if record.wishes.locked => Some(CannotMove::Locked),
        Phase::Running => None,
    };
    let seen = hosts.seen(&record.node, record.id, record.epoch);
    let leaving = migration.filter(|open| open.intent.to != record.node);
    let in_flight = leaving.map(|open| {
        let intent = &open.intent;
        let there = hosts.seen(&intent.to, intent.vm, intent.epoch);
        InFlight {
            to: hosts.name(&intent.to),
            received: Bytes(there.map_or(0, |seen| seen.facts.resident_bytes)),
        }
    });
    let (id, name) = entry.for_planner();
    Some(VmView {
        id,
        node: hosts.name(&record.node),
        cpus: record.cpus,
        declared: Bytes(record.memory_bytes),
        name,
        resident: seen.as_ref().map(|seen| Bytes(seen.facts.resident_bytes)),
        cpu: entry.demand(seen.as_ref().and_then(ObservedVm::demand)),
        growth: seen
            .as_ref()
            // The smoothed growth of one whose vCPUs are stopped is that of a while ago.
            .filter(|_| record.suspended.is_none())
            .map_or(BytesPerSecond(0), |seen| seen.growth.value()),
        dirty_rate: dirty_rate(entry, seen.as_ref(), in_flight.is_some()).map(BytesPerSecond),
        working_set: seen
            .as_ref()
            .and_then(|seen| seen.working_set)
            .map(|set| Bytes(set.value())),
        cannot_move,
        in_flight,
        since_last_move: entry.since_last_move(),
        cpu_class: record.cpu.as_ref().map(|cpu| cpu.class(hosts.msrs(&record.node))),
        kvm: record.kvm,
        ring3: record.runs_ring3_kernel(),
        labels: record.wishes.labels.clone(),
        rules: record.wishes.rules.clone(),
        priority: record.wishes.priority,
        suspended: record.suspended.is_some(),
        preemptible: record.wishes.preemptible,
        ran: record.ran(),
        longest_pause: entry.longest_pause(),
        gives_way_to: record
            .giving_way
            .as_ref()
            .map(|giving_way| shoal_plan::VmId::new(&giving_way.to.to_string())),
        suspended_growth: record
            .suspended
            .as_ref()
            .and_then(|suspension| suspension.planned_growth.map(BytesPerSecond)),
        home: record.home.as_ref().map(|home| hosts.name(home)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::execute::launch;
    use crate::testing::Cluster;

    #[tokio::test]
    async fn several_threads_see_what_one_sees_in_the_same_order() {
        let cluster = Cluster::start(2, 1 << 30).await;
        for number in 0..5 {
            let draft = cluster.draft(&format!("vm{number}"), 64 << 20);
            let submitted = launch::submit(&cluster.scheduler, draft, None).await;
            submitted.expect("placed");
        }
        let scheduler = &cluster.scheduler;
        let hosts = Hosts::new(&scheduler.nodes.list());
        let entries = scheduler.vms.list();
        let one = vm_views(scheduler, &hosts, &entries, 1);
        assert_eq!(one.len(), 5);
        for threads in [2, 3, 4, 7] {
            assert_eq!(vm_views(scheduler, &hosts, &entries, threads), one, "{threads}");
        }
        assert!(vm_views(scheduler, &hosts, &[], 4).is_empty());
    }
}
