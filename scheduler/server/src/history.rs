//! Migrations that have ended: all of them light in memory, for lists; whole in the store. Bounded, and independent of
//! the VMs: what was moved stays known when it is gone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shoal_proto::{VmId, cluster};

use crate::store::Write;

/// Migrations kept, of all VMs.
const KEPT: usize = 10_000;
/// Migrations kept of one VM.
const KEPT_PER_VM: usize = 64;
/// Migrations whose samples are kept.
const KEPT_SAMPLES: usize = 1000;
/// Least characters by which an id is recognised.
const LEAST_PREFIX: usize = 4;

/// What is asked of the history.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Id or name of the VM, as it was then.
    pub vm: Option<String>,
    /// From or to this node.
    pub node: Option<String>,
}

impl Filter {
    /// Whether a migration is asked for.
    pub fn matches(&self, migration: &cluster::Migration) -> bool {
        self.vm
            .as_ref()
            .is_none_or(|vm| *vm == migration.vm || *vm == migration.vm_name)
            && self
                .node
                .as_ref()
                .is_none_or(|node| *node == migration.from_node || *node == migration.to_node)
    }
}

/// What a search by id found.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// One; this is its number in the store.
    One(u64),
    /// None.
    None,
    /// Several begin like this.
    Several,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    entries: BTreeMap<u64, Arc<cluster::Migration>>,
    by_vm: HashMap<String, BTreeSet<u64>>,
    by_id: BTreeMap<String, u64>,
    with_samples: BTreeSet<u64>,
}

/// The history.
#[derive(Debug, Default)]
pub struct History {
    inner: Mutex<Inner>,
}

impl History {
    /// From what was stored: migrations by number, and the numbers of those whose samples are there.
    pub fn new(stored: Vec<(u64, cluster::Migration)>, with_samples: Vec<u64>) -> Self {
        let mut inner = Inner {
            with_samples: with_samples.into_iter().collect(),
            ..Inner::default()
        };
        for (number, migration) in stored {
            inner.insert(number, Arc::new(migration));
        }
        Self {
            inner: Mutex::new(inner),
        }
    }

    /// Adds a migration; the writes keep the store in step, those for what has to make room included.
    pub fn add(&self, migration: &cluster::Migration) -> Vec<Write> {
        let mut inner = self.lock();
        let number = inner.next;
        inner.insert(number, Arc::new(light(migration.clone())));
        let mut writes = vec![Write::PutMigration(number, Box::new(migration.clone()))];
        let sampled = migration
            .report
            .as_ref()
            .is_some_and(|report| !report.samples.is_empty());
        if sampled {
            inner.with_samples.insert(number);
        }
        let of_this_vm = inner.by_vm.get(&migration.vm);
        if let Some(numbers) = of_this_vm
            && numbers.len() > KEPT_PER_VM
            && let Some(&oldest) = numbers.first()
        {
            inner.remove(oldest);
            writes.push(Write::DeleteMigration(oldest));
        }
        if inner.entries.len() > KEPT
            && let Some((&oldest, _)) = inner.entries.first_key_value()
        {
            inner.remove(oldest);
            writes.push(Write::DeleteMigration(oldest));
        }
        if inner.with_samples.len() > KEPT_SAMPLES
            && let Some(oldest) = inner.with_samples.pop_first()
        {
            writes.push(Write::DeleteSamples(oldest));
        }
        writes
    }

    /// Completes a migration by what its guest missed; the write keeps the store in step. None if it is kept no more.
    pub fn set_guest_gap(&self, id: &str, us: u64) -> Option<Write> {
        let mut inner = self.lock();
        let number = *inner.by_id.get(id)?;
        let migration = inner.entries.get_mut(&number)?;
        set_guest_gap(Arc::make_mut(migration), us);
        Some(Write::SetGuestGap(number, us))
    }

    /// Latest first.
    pub fn list(&self, filter: &Filter, limit: usize) -> Vec<Arc<cluster::Migration>> {
        let inner = self.lock();
        inner
            .entries
            .values()
            .rev()
            .filter(|migration| filter.matches(migration))
            .take(limit)
            .cloned()
            .collect()
    }

    /// By id, or the beginning of one.
    pub fn find(&self, id: &str) -> Found {
        let inner = self.lock();
        if let Some(&number) = inner.by_id.get(id) {
            return Found::One(number);
        }
        if id.len() < LEAST_PREFIX {
            return Found::None;
        }
        let mut alike = inner
            .by_id
            .range(id.to_owned()..)
            .take_while(|(known, _)| known.starts_with(id));
        match (alike.next(), alike.next()) {
            (None, _) => Found::None,
            (Some((_, &number)), None) => Found::One(number),
            (Some(_), Some(_)) => Found::Several,
        }
    }

    /// One by number, without what only the store has.
    pub fn get(&self, number: u64) -> Option<Arc<cluster::Migration>> {
        self.lock().entries.get(&number).cloned()
    }

    /// The latest of each VM, oldest first, at most so many of one.
    pub fn by_vm(&self, most: usize) -> Vec<(VmId, cluster::Migration)> {
        let inner = self.lock();
        let mut found = Vec::new();
        for (vm, numbers) in &inner.by_vm {
            let Ok(vm) = vm.parse() else { continue };
            let skip = numbers.len().saturating_sub(most);
            let latest = numbers
                .iter()
                .skip(skip)
                .filter_map(|number| inner.entries.get(number));
            found.extend(latest.map(|migration| (vm, migration.as_ref().clone())));
        }
        found
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn insert(&mut self, number: u64, migration: Arc<cluster::Migration>) {
        self.next = self.next.max(number.saturating_add(1));
        self.by_vm.entry(migration.vm.clone()).or_default().insert(number);
        self.by_id.insert(migration.id.clone(), number);
        self.entries.insert(number, migration);
    }

    fn remove(&mut self, number: u64) {
        let Some(migration) = self.entries.remove(&number) else {
            return;
        };
        self.by_id.remove(&migration.id);
        self.with_samples.remove(&number);
        if let Some(numbers) = self.by_vm.get_mut(&migration.vm) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_vm.remove(&migration.vm);
            }
        }
    }
}

/// Puts into a report what the guest missed.
pub fn set_guest_gap(migration: &mut cluster::Migration, us: u64) {
    if let Some(report) = &mut migration.report {
        report.guest_gap_us = Some(us);
    }
}

/// Without what makes a report big.
pub fn light(mut migration: cluster::Migration) -> cluster::Migration {
    if let Some(report) = &mut migration.report {
        report.pass_table = Vec::new();
        report.samples = Vec::new();
    }
    migration
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_proto::MigrationId;
    use shoal_proto::vm::{MigrationPass, MigrationReport, MigrationSample};

    fn migration(vm: &str, name: &str) -> cluster::Migration {
        let report = MigrationReport {
            samples: vec![MigrationSample::default()],
            pass_table: vec![MigrationPass::default()],
            ..Default::default()
        };
        cluster::Migration {
            id: MigrationId::new().to_string(),
            vm: vm.to_owned(),
            vm_name: name.to_owned(),
            from_node: "node1".to_owned(),
            to_node: "node2".to_owned(),
            report: Some(report),
            ..Default::default()
        }
    }

    #[test]
    fn one_vm_keeps_64_all_keep_10_000_and_the_last_1000_their_samples() {
        let history = History::default();
        let busy = VmId::new().to_string();
        let (mut deleted, mut thinned) = (0, 0);
        for _ in 0..70 {
            deleted += history.add(&migration(&busy, "busy")).len() - 1;
        }
        let of_busy = Filter {
            vm: Some("busy".to_owned()),
            ..Filter::default()
        };
        assert_eq!((history.list(&of_busy, 1000).len(), deleted), (64, 6));
        for number in 0..10_000 {
            for write in history.add(&migration(&format!("vm{}", number % 1000), "")) {
                thinned += usize::from(matches!(write, Write::DeleteSamples(_)));
            }
        }
        assert_eq!(history.list(&Filter::default(), usize::MAX).len(), KEPT);
        assert_eq!(history.list(&of_busy, 1000).len(), 0, "the oldest made room");
        assert_eq!(history.lock().with_samples.len(), KEPT_SAMPLES);
        assert!(thinned > 8000);
        let listed = history.list(&Filter::default(), 1);
        let report = listed[0].report.as_ref().expect("a report");
        assert!(
            report.samples.is_empty() && report.pass_table.is_empty(),
            "memory holds no big parts"
        );
    }

    #[test]
    fn what_a_guest_missed_is_added_later() {
        let history = History::default();
        let migration = migration("a", "web");
        history.add(&migration);
        let write = history.set_guest_gap(&migration.id, 1500);
        assert!(matches!(write, Some(Write::SetGuestGap(0, 1500))), "{write:?}");
        let listed = history.list(&Filter::default(), 1);
        let report = listed[0].report.as_ref().expect("a report");
        assert_eq!(report.guest_gap_us, Some(1500));
        assert!(history.set_guest_gap("no such", 1).is_none());
    }

    #[test]
    fn it_is_searched_by_vm_node_and_id() {
        let history = History::default();
        let first = migration("a", "web");
        history.add(&first);
        history.add(&migration("b", "db"));
        let vm = |vm: &str| Filter {
            vm: Some(vm.to_owned()),
            ..Filter::default()
        };
        let node = |node: &str| Filter {
            node: Some(node.to_owned()),
            ..Filter::default()
        };
        for (filter, count) in [
            (vm("a"), 1),
            (vm("web"), 1),
            (vm("x"), 0),
            (node("node2"), 2),
            (node("node3"), 0),
        ] {
            assert_eq!(history.list(&filter, 10).len(), count, "{filter:?}");
        }
        assert_eq!(history.list(&Filter::default(), 1)[0].vm, "b", "latest first");
        assert_eq!(history.find(&first.id), Found::One(0));
        assert_eq!(history.find(&first.id[..8]), Found::One(0));
        assert_eq!(history.find(&first.id[..3]), Found::None);
        assert_eq!(history.find("no such"), Found::None);
    }
}
