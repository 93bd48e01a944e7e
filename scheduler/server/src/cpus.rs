//! The CPUs of nodes and VMs by their features, the MSRs that nodes save, and the baseline that new VMs get. Equal ones are kept
//! once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use shoal_cpuid::{Table, missing_msrs};
use shoal_plan::{CpuClass, CpuLacks};
use shoal_proto::cluster::{CpuBaseline, NodeCpu};

use crate::scheduler::Scheduler;
use crate::store::{StoreError, Write};

/// Kinds of CPUs, as many as a cluster can have seen. What comes after is not known by its features.
const MAX_KINDS: usize = 1024;
/// Lists of MSRs that nodes save, as many as are told apart. What is on others is not known.
const MAX_LISTS: usize = 1024;
/// Features named where a node lacks more.
const NAMED: usize = 8;

/// A set of CPU features, by the SHA-256 of its table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CpuDigest(pub String);

impl CpuDigest {
    fn of(features: &Table) -> Self {
        let digest = Sha256::digest(features.to_bytes());
        Self(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// For the planner: VMs of this kind on a node that saves such MSRs, where that makes a difference.
    pub fn class(&self, msrs: Option<MsrList>) -> CpuClass {
        match msrs {
            None => CpuClass::new(&self.0),
            Some(MsrList(number)) => CpuClass::new(&format!("{}.{number}", self.0)),
        }
    }
}

/// The MSRs that a node's KVM saves: equal lists have the same number, for as long as this scheduler runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MsrList(usize);

/// Kinds of VMs, by the MSRs that are saved where they are.
pub type Kinds = BTreeMap<Option<MsrList>, BTreeSet<CpuDigest>>;

/// A CPU, and what is saved of it.
type Place = (CpuDigest, Option<MsrList>);

/// What of this was stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredCpus {
    /// Tables, features only.
    pub tables: Vec<Table>,
    /// The baseline in force.
    pub baseline: Option<CpuDigest>,
}

/// Why there is no baseline.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// No node has said what it has.
    #[error("no node has reported its CPU: start agents of this version, then apply again")]
    NoNodes,
    /// AMD and Intel have no baseline.
    #[error(
        "nodes {one} and {other} have CPUs of different vendors ({vendors}): VMs cannot move between them"
    )]
    Vendors {
        /// A node.
        one: String,
        /// Another.
        other: String,
        /// Theirs.
        vendors: String,
    },
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Debug, Default)]
struct Inner {
    tables: HashMap<CpuDigest, Arc<Table>>,
    baseline: Option<CpuDigest>,
    /// By their numbers.
    msrs: Vec<Arc<[u32]>>,
    /// What VMs of the first lack on nodes of the second.
    lacking: HashMap<(Place, Place), Option<Arc<str>>>,
}

impl Inner {
    fn find_lacking(&self, ((vm, here), (node, there)): &(Place, Place)) -> Option<Arc<str>> {
        let (vm, node) = (self.tables.get(vm)?, self.tables.get(node)?);
        let mut missing = vm.missing_on(node);
        if let Some((here, there)) = here.zip(*there) {
            let msrs = missing_msrs(vm, &self.msrs[here.0], &self.msrs[there.0]);
            missing.extend(msrs.iter().map(ToString::to_string));
        }
        words(&missing)
    }
}

/// All kinds of CPUs that nodes and VMs have.
#[derive(Debug)]
pub struct Cpus(Mutex<Inner>);

impl Cpus {
    /// As stored.
    pub fn new(stored: StoredCpus) -> Self {
        let tables = stored.tables.into_iter();
        Self(Mutex::new(Inner {
            tables: tables
                .map(|table| (CpuDigest::of(&table), Arc::new(table)))
                .collect(),
            baseline: stored.baseline,
            ..Inner::default()
        }))
    }

    /// The kind of a CPU, and what has to be stored before it is used if it is new. None if there are too many.
    pub fn kind(&self, table: &Table) -> Option<(CpuDigest, Option<Write>)> {
        let features = table.features_only();
        let digest = CpuDigest::of(&features);
        let inner = self.lock();
        if inner.tables.contains_key(&digest) {
            return Some((digest, None));
        }
        (inner.tables.len() < MAX_KINDS).then(|| (digest.clone(), Some(Write::PutCpu(digest, features))))
    }

    /// Takes what has been stored.
    pub fn add(&self, digest: CpuDigest, features: Table) {
        self.lock().tables.insert(digest, Arc::new(features));
    }

    /// The baseline that new VMs get.
    pub fn baseline(&self) -> Option<CpuDigest> {
        self.lock().baseline.clone()
    }

    /// Its features.
    pub fn table(&self, digest: &CpuDigest) -> Option<Arc<Table>> {
        self.lock().tables.get(digest).cloned()
    }

    /// A node's MSRs; none if they are not known, or there are too many lists.
    pub fn msr_list(&self, msrs: &[u32]) -> Option<MsrList> {
        let mut sorted = msrs.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.is_empty() {
            return None;
        }
        let known = &mut self.lock().msrs;
        let number = known.iter().position(|list| **list == *sorted);
        number
            .or_else(|| {
                (known.len() < MAX_LISTS).then(|| {
                    known.push(sorted.into());
                    known.len() - 1
                })
            })
            .map(MsrList)
    }

    /// Which of these kinds of VMs lack features or MSRs on a kind of node, and which.
    pub fn lacks(&self, vms: &Kinds, node: &CpuDigest, there: Option<MsrList>) -> CpuLacks {
        let inner = &mut *self.lock();
        let mut lacks = vec![];
        for (&here, kinds) in vms {
            for vm in kinds {
                let key = ((vm.clone(), here), (node.clone(), there));
                let lacking = match inner.lacking.get(&key) {
                    Some(known) => known.clone(),
                    None => {
                        let found = inner.find_lacking(&key);
                        inner.lacking.insert(key, found.clone());
                        found
                    }
                };
                lacks.extend(lacking.map(|lacking| (vm.class(here), lacking)));
            }
        }
        lacks.into()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn words(missing: &[String]) -> Option<Arc<str>> {
    match missing.len() {
        0 => None,
        1..=NAMED => Some(missing.join(", ").into()),
        more => Some(format!("{} and {} more", missing[..NAMED].join(", "), more - NAMED).into()),
    }
}

/// Names, each once.
fn names(features: impl Iterator<Item = shoal_cpuid::Feature>) -> Vec<String> {
    let names: BTreeSet<String> = features.map(|feature| feature.to_string()).collect();
    names.into_iter().collect()
}

/// Makes what all nodes have the baseline for new VMs.
///
/// # Errors
/// If there is no such thing, or it cannot be stored.
pub async fn apply_baseline(scheduler: &Scheduler) -> Result<(), BaselineError> {
    // Against nodes that register and VMs that are placed meanwhile.
    let _planning = scheduler.planning.lock().await;
    let baseline = common(scheduler)?;
    let digest = CpuDigest::of(&baseline);
    let writes = vec![
        Write::PutCpu(digest.clone(), baseline.clone()),
        Write::SetCpuBaseline(Some(digest.clone())),
    ];
    scheduler.store.apply(writes).await?;
    scheduler.cpus.add(digest.clone(), baseline);
    scheduler.cpus.lock().baseline = Some(digest);
    Ok(())
}

/// New VMs get all that their node has, again.
///
/// # Errors
/// If it cannot be stored.
pub async fn clear_baseline(scheduler: &Scheduler) -> Result<(), BaselineError> {
    let _planning = scheduler.planning.lock().await;
    scheduler.store.apply(vec![Write::SetCpuBaseline(None)]).await?;
    scheduler.cpus.lock().baseline = None;
    Ok(())
}

/// Nodes whose CPU is known, and it.
fn known(scheduler: &Scheduler) -> Vec<(String, Arc<Table>)> {
    let nodes = scheduler.nodes.list();
    let records = nodes.iter().map(|entry| entry.record());
    let cpu = |digest: Option<CpuDigest>| digest.and_then(|digest| scheduler.cpus.table(&digest));
    records
        .filter_map(|record| Some((record.name.to_string(), cpu(record.cpu)?)))
        .collect()
}

/// What all nodes have in common.
fn common(scheduler: &Scheduler) -> Result<Table, BaselineError> {
    let nodes = known(scheduler);
    let [(first, table), rest @ ..] = nodes.as_slice() else {
        return Err(BaselineError::NoNodes);
    };
    let mut common = table.as_ref().clone();
    for (name, table) in rest {
        if table.vendor() != common.vendor() {
            return Err(BaselineError::Vendors {
                one: first.clone(),
                other: name.clone(),
                vendors: format!("{}, {}", common.vendor(), table.vendor()),
            });
        }
        common = common.restricted_to(table);
    }
    Ok(common.features_only())
}

/// The baseline as it is shown: the one in force, or the one that could be.
pub fn view(scheduler: &Scheduler) -> CpuBaseline {
    let applied = scheduler
        .cpus
        .baseline()
        .and_then(|digest| scheduler.cpus.table(&digest));
    let shown = match &applied {
        Some(table) => table.as_ref().clone(),
        None => common(scheduler).unwrap_or_default(),
    };
    let nodes = scheduler.nodes.list();
    let nodes = nodes.iter().map(|entry| {
        let record = entry.record();
        let table = record.cpu.and_then(|digest| scheduler.cpus.table(&digest));
        let extra = table.as_ref().map(|table| names(table.features_without(&shown)));
        let missing = table.as_ref().map(|table| shown.missing_on(table));
        NodeCpu {
            node: record.name.to_string(),
            model: record.cpu_model,
            extra_features: extra.unwrap_or_default(),
            missing_features: missing.filter(|_| applied.is_some()).unwrap_or_default(),
        }
    });
    CpuBaseline {
        applied: applied.is_some(),
        features: names(shown.features()),
        nodes: nodes.collect(),
    }
}

#[cfg(test)]
mod tests;
