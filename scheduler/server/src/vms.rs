//! All VMs in memory: a copy of what the store holds, found by id, name and node.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use shoal_plan::Estimate;
use shoal_proto::{NodeName, VmId, VmName, cluster};
use tokio::sync::{OwnedMutexGuard, watch};

use crate::history;
use crate::record::{Phase, VmRecord, now_unix_ms};

/// Migrations remembered for each VM; the history keeps more.
pub const KEPT_MIGRATIONS: usize = 16;

/// Whoever holds it is the only one to change the VM: launch, migrate, stop, reconcile.
pub type VmGuard = OwnedMutexGuard<()>;

/// One VM, also while it waits.
#[derive(Debug)]
pub struct VmEntry {
    /// Its id and name as the planner has them.
    for_planner: (shoal_plan::VmId, Arc<str>),
    record: watch::Sender<Arc<VmRecord>>,
    operation: Arc<tokio::sync::Mutex<()>>,
    migrations: Mutex<VecDeque<cluster::Migration>>,
    dirty_rate: Mutex<Option<u64>>,
    demand: Mutex<Option<Estimate>>,
    console_end: AtomicU64,
}

impl VmEntry {
    /// Of a VM that waits to be started, and is in no table.
    pub fn waiting(record: &VmRecord) -> Arc<Self> {
        let record = VmRecord {
            phase: Phase::Queued,
            ..record.clone()
        };
        Self::new(Arc::new(record))
    }

    /// Tells those who watch it. It is in no table.
    pub fn tell(&self, record: VmRecord) {
        self.record.send_replace(Arc::new(record));
    }

    fn new(record: Arc<VmRecord>) -> Arc<Self> {
        Arc::new(Self {
            for_planner: (
                shoal_plan::VmId::new(&record.id.to_string()),
                Arc::from(record.name.to_string()),
            ),
            record: watch::Sender::new(record),
            operation: Arc::default(),
            migrations: Mutex::default(),
            dirty_rate: Mutex::default(),
            demand: Mutex::default(),
            console_end: AtomicU64::new(0),
        })
    }

    /// Its id and name as the planner has them; cloning them is cheap.
    pub fn for_planner(&self) -> (shoal_plan::VmId, Arc<str>) {
        self.for_planner.clone()
    }

    /// The record as it is stored.
    pub fn record(&self) -> Arc<VmRecord> {
        Arc::clone(&self.record.borrow())
    }

    /// Tells when the record changes; closed when the VM is removed.
    pub fn subscribe(&self) -> watch::Receiver<Arc<VmRecord>> {
        self.record.subscribe()
    }

    /// Waits for the right to change the VM.
    pub async fn lock(&self) -> VmGuard {
        Arc::clone(&self.operation).lock_owned().await
    }

    /// The right to change the VM, if nobody has it.
    pub fn try_lock(&self) -> Option<VmGuard> {
        Arc::clone(&self.operation).try_lock_owned().ok()
    }

    /// Ended migrations, latest last.
    pub fn migrations(&self) -> Vec<cluster::Migration> {
        self.history().iter().cloned().collect()
    }

    /// A migration with this id has ended and was recorded.
    pub fn has_ended_migration(&self, id: &str) -> bool {
        self.history().iter().any(|migration| migration.id == id)
    }

    /// Adds an ended migration.
    pub fn remember_migration(&self, migration: cluster::Migration) {
        let mut history = self.history();
        history.push_back(migration);
        if history.len() > KEPT_MIGRATIONS {
            history.pop_front();
        }
    }

    /// Completes one that is remembered by what the guest missed, in microseconds.
    pub fn set_guest_gap(&self, id: &str, us: u64) {
        let mut history = self.history();
        if let Some(migration) = history.iter_mut().find(|migration| migration.id == id) {
            history::set_guest_gap(migration, us);
        }
    }

    /// Since the last attempt to move it ended.
    pub fn since_last_move(&self) -> Option<std::time::Duration> {
        let history = self.history();
        let last = history.back()?;
        let took_ms = last.report.as_ref().map_or(0, |report| report.total_us / 1000);
        let ended = last.started_unix_ms.saturating_add_unsigned(took_ms);
        let since = now_unix_ms().saturating_sub(ended);
        Some(std::time::Duration::from_millis(
            u64::try_from(since).unwrap_or(0),
        ))
    }

    /// Bytes it dirties a second, as measured by its last migration.
    pub fn dirty_rate(&self) -> Option<u64> {
        *self.dirty_rate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest time that a move of those remembered kept it from running.
    pub fn longest_pause(&self) -> Option<std::time::Duration> {
        let history = self.history();
        let reports = history.iter().filter_map(|migration| migration.report.as_ref());
        let us = reports
            .map(|report| report.downtime_us.max(report.guest_gap_us.unwrap_or(0)))
            .max()?;
        Some(std::time::Duration::from_micros(us))
    }

    /// CPUs that it wants: as seen, or as last seen where it was before. It is the same guest after a move.
    pub fn demand(&self, seen: Option<Estimate>) -> Option<Estimate> {
        let mut known = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        *known = seen.or(*known);
        *known
    }

    /// Keeps what a migration measures.
    pub fn set_dirty_rate(&self, bytes_per_second: u64) {
        *self.dirty_rate.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes_per_second);
    }

    /// Where its console has come to, as far as this scheduler has heard.
    pub fn console_end(&self) -> u64 {
        self.console_end.load(Ordering::Relaxed)
    }

    /// Its console has come so far.
    pub fn console_reached(&self, end: u64) {
        self.console_end.fetch_max(end, Ordering::Relaxed);
    }

    fn history(&self) -> std::sync::MutexGuard<'_, VecDeque<cluster::Migration>> {
        self.migrations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Another VM has the name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("name: a VM named '{0}' exists; give another name, or remove it with `shoal rm {0}`")]
pub struct NameTaken(pub VmName);

#[derive(Debug, Default)]
struct Index {
    /// Looked into for every VM of every report, so not kept in order.
    by_id: HashMap<VmId, Arc<VmEntry>>,
    by_name: HashMap<VmName, VmId>,
    /// VMs that have not ended.
    by_node: HashMap<NodeName, BTreeSet<VmId>>,
    /// VMs that have, by when they did.
    ended: BTreeSet<(i64, VmId)>,
}

/// All VMs.
#[derive(Debug, Default)]
pub struct VmTable {
    index: RwLock<Index>,
}

impl VmTable {
    /// From what was stored.
    pub fn new(vms: Vec<VmRecord>, migrations: Vec<(VmId, cluster::Migration)>) -> Self {
        let table = Self::default();
        for record in vms {
            table.place(&Arc::new(record));
        }
        for (vm, migration) in migrations {
            if let Some(entry) = table.get(vm) {
                entry.remember_migration(migration);
            }
        }
        table
    }

    /// By id.
    pub fn get(&self, id: VmId) -> Option<Arc<VmEntry>> {
        self.read().by_id.get(&id).cloned()
    }

    /// By id or name, as users write it.
    pub fn find(&self, id_or_name: &str) -> Option<Arc<VmEntry>> {
        let index = self.read();
        // Ids first: a VM of before may have the id of another as its name.
        let by_id = id_or_name.parse().ok().and_then(|id: VmId| index.by_id.get(&id));
        let found = by_id.or_else(|| {
            let name = id_or_name.parse::<VmName>().ok()?;
            index.by_id.get(index.by_name.get(&name)?)
        });
        found.cloned()
    }

    /// Every VM, by id.
    pub fn list(&self) -> Vec<Arc<VmEntry>> {
        let by_id = |(id, entry): (&VmId, &Arc<VmEntry>)| (*id, Arc::clone(entry));
        let mut all: Vec<_> = self.read().by_id.iter().map(by_id).collect();
        all.sort_unstable_by_key(|(id, _)| *id);
        all.into_iter().map(|(_, entry)| entry).collect()
    }

    /// VMs that have not ended and whose owner is this node.
    pub fn on_node(&self, node: &NodeName) -> Vec<Arc<VmEntry>> {
        let index = self.read();
        let ids = index.by_node.get(node);
        ids.into_iter()
            .flatten()
            .filter_map(|id| index.by_id.get(id).cloned())
            .collect()
    }

    /// Their number.
    pub fn count_on_node(&self, node: &NodeName) -> usize {
        self.read().by_node.get(node).map_or(0, BTreeSet::len)
    }

    /// VMs that have ended, but for the latest so many: the first, at most this number.
    pub fn ended_but(&self, kept: usize, most: usize) -> Vec<Arc<VmEntry>> {
        let index = self.read();
        let old = index.ended.len().saturating_sub(kept).min(most);
        let first = index.ended.iter().take(old);
        first.filter_map(|(_, id)| index.by_id.get(id).cloned()).collect()
    }

    /// Whether a name is free.
    pub fn check_name(&self, name: &VmName) -> Result<(), NameTaken> {
        if self.read().by_name.contains_key(name) {
            Err(NameTaken(name.clone()))
        } else {
            Ok(())
        }
    }

    /// Adds a VM whose record has been stored; nobody else can change it before the caller drops its guard.
    pub fn insert(&self, entry: &Arc<VmEntry>, record: &Arc<VmRecord>) {
        self.write().by_id.insert(record.id, Arc::clone(entry));
        self.place(record);
    }

    /// Shows a record that has been stored.
    pub fn publish(&self, record: &Arc<VmRecord>) {
        self.place(record);
    }

    /// Takes a VM out that waits from now on; who watches it is told.
    pub fn set_aside(&self, entry: &VmEntry, record: VmRecord) {
        self.remove(record.id);
        entry.tell(record);
    }

    /// Forgets a VM.
    pub fn remove(&self, id: VmId) {
        let mut index = self.write();
        if let Some(entry) = index.by_id.remove(&id) {
            let record = entry.record();
            index.by_name.remove(&record.name);
            index.leave(&record);
        }
    }

    fn place(&self, record: &Arc<VmRecord>) {
        let mut index = self.write();
        let old = index.by_id.get(&record.id).map(|entry| entry.record());
        if let Some(old) = old {
            index.leave(&old);
        }
        if matches!(record.phase, Phase::Ended(_)) {
            index.ended.insert((ended(record), record.id));
        } else {
            index
                .by_node
                .entry(record.node.clone())
                .or_default()
                .insert(record.id);
        }
        index.by_name.insert(record.name.clone(), record.id);
        match index.by_id.get(&record.id) {
            Some(entry) => {
                entry.record.send_replace(Arc::clone(record));
            }
            None => {
                index.by_id.insert(record.id, VmEntry::new(Arc::clone(record)));
            }
        }
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When a VM that has ended did, as far as is known.
fn ended(record: &VmRecord) -> i64 {
    match record.runs.ended_unix_ms {
        0 => record.created_unix_ms,
        ended => ended,
    }
}

impl Index {
    fn leave(&mut self, record: &VmRecord) {
        self.ended.remove(&(ended(record), record.id));
        if let Some(ids) = self.by_node.get_mut(&record.node) {
            ids.remove(&record.id);
            if ids.is_empty() {
                self.by_node.remove(&record.node);
            }
        }
    }
}
