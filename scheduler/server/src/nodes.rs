//! All nodes in memory: what the store knows of them, the connection to their agents, and what they last reported.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use shoal_plan::Bytes;
use shoal_proto::{Epoch, NodeName, VmId, node, vm};
use tokio::sync::mpsc;
use tonic::Status;

use crate::agent::{Agent, Caller};
use crate::cpus::MsrList;
use crate::predictions::Forecast;
use crate::record::{Cordon, Lost, NodeRecord, NodeWishes};

mod observed;

pub use observed::{Heard, HostCpu, Observed, ObservedVm};

/// A node that has not reported for this long is suspect: nothing moves to it or from it. It may be well and cut off:
/// nothing is restarted.
pub const SILENCE: Duration = Duration::from_secs(5);
/// A node that has not reported for this long is lost: what it was like is forgotten. Its VMs still are where they are, until
/// it comes back or an operator says otherwise.
pub const LOST: Duration = Duration::from_secs(30);

/// That of Linux is a UUID.
const LONGEST_BOOT_ID: usize = 64;

/// One end of an agent's Report stream.
pub type ReportSender = mpsc::Sender<Result<node::SchedulerMessage, Status>>;

/// Whether a node reports, from how long it has been silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Liveness {
    /// It has reported lately.
    Live,
    /// Silent for [`SILENCE`].
    Suspect,
    /// Silent for [`LOST`].
    Lost,
}

impl Liveness {
    fn after(silence: Duration) -> Self {
        if silence < SILENCE {
            Self::Live
        } else if silence < LOST {
            Self::Suspect
        } else {
            Self::Lost
        }
    }
}

#[derive(Debug)]
struct Session {
    id: u64,
    begun: Instant,
    sender: ReportSender,
}

#[derive(Debug)]
struct Inner {
    record: NodeRecord,
    agent: Agent,
    caller: Caller,
    /// Why its agent is of no use to this scheduler.
    trouble: Option<String>,
    session: Option<Session>,
    last_report: Option<Instant>,
    /// When this scheduler began to listen for it.
    since: Instant,
    announced: Liveness,
    /// It was lost: what it reported before is no base for what comes.
    forget: bool,
    /// Of one CPU, as measured by its agent.
    cpu_speed: Option<f64>,
    /// What host it is, by the boot id: nodes with the same one share it.
    host: Option<Arc<str>>,
    /// CPUs of that; 0 if not known.
    host_cpus: u32,
    /// CPUs that its VMs get at most together, where a quota limits them.
    cpu_quota: Option<f64>,
    /// MSRs that are saved there, as told by its agent.
    msrs: Option<MsrList>,
    /// What its memory was to become.
    forecast: Option<Forecast>,
    /// Bytes per second that migrations out of it got.
    link_rate: Option<u64>,
    observed: Observed,
    /// All it reported but its VMs.
    figures: node::Heartbeat,
    /// Its VMs, in every state, at every epoch.
    vms: HashMap<(VmId, Epoch), ObservedVm>,
}

/// One node.
#[derive(Debug)]
pub struct NodeEntry {
    inner: Mutex<Inner>,
}

impl NodeEntry {
    fn new(record: NodeRecord, known: bool, caller: Caller) -> Result<Self, InvalidAddress> {
        let agent = Agent::new(&record, &caller)?;
        Ok(Self {
            inner: Mutex::new(Inner {
                record,
                agent,
                caller,
                trouble: None,
                session: None,
                last_report: None,
                since: Instant::now(),
                announced: if known { Liveness::Live } else { Liveness::Suspect },
                forget: false,
                cpu_speed: None,
                host: None,
                forecast: None,
                host_cpus: 0,
                cpu_quota: None,
                msrs: None,
                link_rate: None,
                observed: Observed::default(),
                figures: node::Heartbeat::default(),
                vms: HashMap::new(),
            }),
        })
    }

    /// Its name.
    pub fn name(&self) -> NodeName {
        self.lock().record.name.clone()
    }

    /// The record as it is stored.
    pub fn record(&self) -> NodeRecord {
        self.lock().record.clone()
    }

    /// Its agent.
    pub fn agent(&self) -> Agent {
        self.lock().agent.clone()
    }

    /// It has reported lately, and was not declared lost.
    pub fn is_reachable(&self) -> bool {
        self.lock().is_reachable()
    }

    /// Its agent holds a session, or has reported lately.
    pub fn is_connected(&self) -> bool {
        let inner = self.lock();
        inner.session.is_some() || inner.reports()
    }

    /// Its operator's word that it is off and stays off.
    pub fn lost(&self) -> Option<Lost> {
        self.lock().record.lost.clone()
    }

    /// Whether there is such a word.
    pub fn is_lost(&self) -> bool {
        self.lock().record.lost.is_some()
    }

    /// Changes it; the caller has stored it.
    pub fn set_lost(&self, lost: Option<Lost>) {
        self.lock().record.lost = lost;
    }

    /// What it reported, and whether lately.
    pub fn observed(&self) -> (Observed, bool) {
        let inner = self.lock();
        (inner.observed, inner.is_reachable())
    }

    /// How long it has been silent; none if it has not reported since this scheduler started.
    pub fn silent_for(&self) -> Option<Duration> {
        self.lock().last_report.map(|last| last.elapsed())
    }

    /// Whether it reports.
    pub fn liveness(&self) -> Liveness {
        self.lock().liveness()
    }

    /// What it last reported, but its VMs.
    pub fn figures(&self) -> node::Heartbeat {
        self.lock().figures.clone()
    }

    /// Speed of one of its CPUs, in a unit that all agents share; none where it was not measured.
    pub fn cpu_speed(&self) -> Option<f64> {
        self.lock().cpu_speed
    }

    /// Keeps what its agent measured; 0 stands for nothing.
    pub fn set_cpu_speed(&self, speed: f64) {
        self.lock().cpu_speed = (speed.is_finite() && speed > 0.0).then_some(speed);
    }

    /// CPUs that its VMs get at most together; none where no quota limits them.
    pub fn cpu_quota(&self) -> Option<f64> {
        self.lock().cpu_quota
    }

    /// Keeps what its agent read; nonsense stands for no limit.
    pub fn set_cpu_quota(&self, cpus: Option<f64>) {
        self.lock().cpu_quota = cpus.filter(|cpus| cpus.is_finite() && *cpus > 0.0);
    }

    /// The MSRs that are saved and restored there; none where that is not known.
    pub fn msrs(&self) -> Option<MsrList> {
        self.lock().msrs
    }

    /// Keeps what its agent told of the host: its boot id, and how many CPUs it has.
    pub fn set_host(&self, boot_id: &str, cpus: u32) {
        let mut inner = self.lock();
        inner.host = (!boot_id.is_empty() && boot_id.len() <= LONGEST_BOOT_ID).then(|| Arc::from(boot_id));
        inner.host_cpus = cpus;
    }

    /// What it told of the use of its host's CPUs; none if it does not.
    pub fn host_cpu(&self) -> Option<HostCpu> {
        let inner = self.lock();
        HostCpu::told(
            &inner.figures,
            inner.host.clone(),
            inner.host_cpus,
            inner.record.cpus,
        )
    }

    /// CPUs that its VMs want, as far as its agent knows already, or use.
    pub fn wanted_cpus(&self) -> f64 {
        let inner = self.lock();
        let of = |seen: &ObservedVm| seen.demand().map_or(seen.facts.cpu_use, |demand| demand.mean);
        inner.vms.values().map(of).sum()
    }

    /// Keeps what its agent told.
    pub fn set_msrs(&self, msrs: Option<MsrList>) {
        self.lock().msrs = msrs;
    }

    /// A report has come that says nothing.
    pub fn touch(&self) {
        self.lock().last_report = Some(Instant::now());
    }

    /// Has the agent send a whole report; false if that cannot be asked for now.
    pub fn want_whole_report(&self) -> bool {
        let message = node::SchedulerMessage {
            message: Some(node::scheduler_message::Message::WholeReportWanted(
                node::WholeReportWanted {},
            )),
        };
        let inner = self.lock();
        inner
            .session
            .as_ref()
            .is_some_and(|session| session.sender.try_send(Ok(message)).is_ok())
    }

    /// It has reported since this scheduler started.
    pub fn has_reported(&self) -> bool {
        self.lock().last_report.is_some()
    }

    /// Epochs of a VM that it last reported.
    pub fn epochs_of(&self, vm: VmId) -> Vec<Epoch> {
        let inner = self.lock();
        inner
            .vms
            .keys()
            .filter(|(id, _)| *id == vm)
            .map(|(_, epoch)| *epoch)
            .collect()
    }

    /// What it last reported of a VM.
    pub fn observed_vm(&self, vm: VmId, epoch: Epoch) -> Option<ObservedVm> {
        self.lock().vms.get(&(vm, epoch)).cloned()
    }

    /// Changes the operator's will; the caller has stored it.
    pub fn set_cordon(&self, cordon: Cordon) {
        self.lock().record.cordon = cordon;
    }

    /// Bytes per second that migrations out of it got lately, if one was large enough to tell.
    pub fn link_rate(&self) -> Option<u64> {
        self.lock().link_rate
    }

    /// Keeps what a migration out of it got: the mean of that and what was known.
    pub fn measured_link(&self, bytes_per_second: u64) {
        let mut inner = self.lock();
        let known = inner.link_rate.unwrap_or(bytes_per_second);
        inner.link_rate = Some(known.midpoint(bytes_per_second));
    }

    /// Changes more of the operator's will; the caller has stored it.
    pub fn set_wishes(&self, wishes: NodeWishes) {
        self.lock().record.wishes = wishes;
    }

    /// Begins a session; the caller has stored the record. It counts as a report only when one comes: an agent may register
    /// and then find that it cannot obey.
    pub fn begin_session(
        &self,
        record: NodeRecord,
        id: u64,
        sender: ReportSender,
    ) -> Result<(), InvalidAddress> {
        let mut inner = self.lock();
        if inner.record.address != record.address {
            inner.agent = Agent::new(&record, &inner.caller)?;
        }
        inner.record = NodeRecord {
            lost: inner.record.lost.take(),
            ..record
        };
        inner.forget |= inner.liveness() == Liveness::Lost;
        inner.trouble = None;
        inner.session = Some(Session {
            id,
            begun: Instant::now(),
            sender,
        });
        Ok(())
    }

    /// Another agent than one at this address holds a session that is alive.
    pub fn is_taken_by_other(&self, address: &str) -> bool {
        let inner = self.lock();
        let begun = inner.session.as_ref().map(|session| session.begun.elapsed());
        let lives = begun.is_some_and(|begun| begun < SILENCE || inner.reports());
        lives && inner.record.address != address
    }

    /// Why its agent is of no use to this scheduler, until it registers.
    pub fn trouble(&self) -> Option<String> {
        self.lock().trouble.clone()
    }

    /// Says so.
    pub fn set_trouble(&self, why: String) {
        self.lock().trouble = Some(why);
    }

    /// Ends a session, unless a newer one has begun.
    pub fn end_session(&self, id: u64) {
        let mut inner = self.lock();
        if inner.session.as_ref().is_some_and(|session| session.id == id) {
            inner.session = None;
        }
    }

    /// Tells the agent that console bytes are stored. A message that cannot be sent now is made up for by the next.
    pub fn acknowledge_console(&self, vm: VmId, offset: u64) {
        let ack = node::ConsoleAck {
            vm_id: vm.to_string(),
            offset,
        };
        let message = node::SchedulerMessage {
            message: Some(node::scheduler_message::Message::ConsoleAck(ack)),
        };
        if let Some(session) = &self.lock().session {
            let _ = session.sender.try_send(Ok(message));
        }
    }

    /// Takes a report: all there is to know of the node. Answers what it says of the one before, if there was one.
    pub fn heartbeat(
        &self,
        heartbeat: &node::Heartbeat,
        vms: Vec<((VmId, Epoch), Arc<node::VmFacts>)>,
    ) -> Option<Heard> {
        let now = Instant::now();
        let mut inner = self.lock();
        let lost = std::mem::take(&mut inner.forget) || inner.liveness() == Liveness::Lost;
        if lost {
            inner.observed = Observed::default();
            inner.vms.clear();
            inner.forecast = None;
        }
        let after = inner.last_report.replace(now).map(|last| now - last);
        inner.figures.clone_from(heartbeat);
        let memory = inner.record.memory_bytes;
        let observed = &mut inner.observed;
        observed.memory_available = heartbeat.memory_available_bytes.min(memory);
        observed.pressure = heartbeat.pressure.unwrap_or_default();
        let resident: u64 = vms
            .iter()
            .fold(0, |sum, (_, facts)| sum.saturating_add(facts.resident_bytes));
        let other = (memory - observed.memory_available).saturating_sub(resident);
        let elapsed = observed
            .sampled
            .replace(now)
            .map_or(Duration::ZERO, |last| now - last);
        observed.other_growth.update(Bytes(other), elapsed);
        let mut previous = std::mem::take(&mut inner.vms);
        let mut steady = previous.len() == vms.len();
        inner.vms = vms
            .into_iter()
            .map(|(key, facts)| {
                let seen = previous.remove(&key);
                steady &= seen
                    .as_ref()
                    .is_some_and(|seen| seen.state() == vm::VmState::Running);
                (key, ObservedVm::next(seen, facts, now, true))
            })
            .collect();
        let rate = inner
            .vms
            .values()
            .fold(0_u64, |sum, vm| sum.saturating_add(vm.growth.value().0));
        let grown = Forecast::next(&mut inner.forecast, now, resident, rate, steady);
        after.map(|after| Heard { after, grown })
    }

    /// Takes news of one VM between heartbeats.
    pub fn vm_changed(&self, key: (VmId, Epoch), facts: node::VmFacts) {
        let now = Instant::now();
        let mut inner = self.lock();
        inner.last_report = Some(now);
        let seen = inner.vms.remove(&key);
        inner
            .vms
            .insert(key, ObservedVm::next(seen, Arc::new(facts), now, false));
    }

    /// A VM has left: until the next heartbeat its memory counts as free.
    pub fn forget_vm(&self, vm: VmId, epoch: Epoch) {
        let mut inner = self.lock();
        if let Some(gone) = inner.vms.remove(&(vm, epoch)) {
            let available = inner
                .observed
                .memory_available
                .saturating_add(gone.facts.resident_bytes);
            inner.observed.memory_available = available.min(inner.record.memory_bytes);
        }
    }

    /// How the node reports, if that has changed since the last call.
    pub fn liveness_change(&self) -> Option<Liveness> {
        let mut inner = self.lock();
        let liveness = inner.liveness();
        let had_no_chance = inner.last_report.is_none() && liveness == Liveness::Live;
        if inner.announced == liveness || had_no_chance {
            return None;
        }
        inner.announced = liveness;
        Some(liveness)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn is_reachable(&self) -> bool {
        self.record.lost.is_none() && self.reports()
    }

    fn reports(&self) -> bool {
        self.last_report.is_some() && self.liveness() == Liveness::Live
    }

    /// A node that has not reported to this scheduler has been silent since that began to listen.
    fn liveness(&self) -> Liveness {
        Liveness::after(self.last_report.unwrap_or(self.since).elapsed())
    }
}

/// An agent's address is not "IP:PORT".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("address: '{0}' is not IP:PORT")]
pub struct InvalidAddress(pub String);

/// All nodes that have ever registered, and were not removed.
#[derive(Debug)]
pub struct NodeTable {
    caller: Caller,
    nodes: RwLock<BTreeMap<NodeName, Arc<NodeEntry>>>,
    /// What must not run on nodes that were declared lost and removed, should they come back.
    removed: Mutex<BTreeMap<NodeName, Lost>>,
}

impl NodeTable {
    /// From what was stored; agents are called so.
    pub fn new(records: Vec<NodeRecord>, caller: Caller) -> Result<Self, InvalidAddress> {
        let (gone, present): (Vec<_>, Vec<_>) = records.into_iter().partition(|record| record.removed);
        let mut nodes = BTreeMap::new();
        for record in present {
            nodes.insert(
                record.name.clone(),
                Arc::new(NodeEntry::new(record, true, caller.clone())?),
            );
        }
        let lost = |record: NodeRecord| Some((record.name, record.lost?));
        Ok(Self {
            caller,
            nodes: RwLock::new(nodes),
            removed: Mutex::new(gone.into_iter().filter_map(lost).collect()),
        })
    }

    /// Whether its operator has said that it is off and stays off.
    pub fn is_lost(&self, name: &NodeName) -> bool {
        self.get(name).is_some_and(|entry| entry.is_lost())
    }

    /// The same of a node that was removed, if it was lost.
    pub fn removed(&self, name: &NodeName) -> Option<Lost> {
        self.lock_removed().get(name).cloned()
    }

    /// Forgets a node, but for what must not run there; the caller has stored that.
    pub fn remove(&self, name: &NodeName) {
        let entry = self
            .nodes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        if let Some(lost) = entry.and_then(|entry| entry.lost()) {
            self.lock_removed().insert(name.clone(), lost);
        }
    }

    fn lock_removed(&self) -> MutexGuard<'_, BTreeMap<NodeName, Lost>> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As whom agents are called.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// By name.
    pub fn get(&self, name: &NodeName) -> Option<Arc<NodeEntry>> {
        self.nodes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// By name, made from the record if it is new.
    pub fn get_or_insert(&self, record: NodeRecord) -> Result<Arc<NodeEntry>, InvalidAddress> {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = nodes.get(&record.name) {
            return Ok(Arc::clone(entry));
        }
        let name = record.name.clone();
        let entry = Arc::new(NodeEntry::new(record, false, self.caller.clone())?);
        self.lock_removed().remove(&name);
        nodes.insert(name, Arc::clone(&entry));
        Ok(entry)
    }

    /// All by name.
    pub fn list(&self) -> Vec<Arc<NodeEntry>> {
        self.nodes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests;
