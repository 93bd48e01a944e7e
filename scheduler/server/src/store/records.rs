//! What the bytes of a store are: how changes are encoded, and how all is read. The same whatever keeps the bytes.

use prost::Message as _;
use serde::de::DeserializeOwned;
use shoal_cpuid::Table as CpuTable;
use shoal_proto::{cluster, vm};

use super::backend::{Backend, Change, Snapshot, Table};
use super::{Contents, StoreError, Write};
use crate::cpus::CpuDigest;
use crate::history;
use crate::moves::MoveOrder;
use crate::record::{ImageRecord, Intent, NodeRecord, QueuedRecord, VmRecord};

pub const MIGRATION_DEFAULTS: &[u8] = b"migration-defaults";
pub const SCHEDULING_POLICY: &[u8] = b"scheduling-policy";
const BASELINE: &[u8] = b"baseline";

/// Adds a change, as bytes. What depends on what is stored is read; nobody may change that meanwhile.
pub async fn encode(
    backend: &dyn Backend,
    write: Write,
    changes: &mut Vec<Change>,
) -> Result<(), StoreError> {
    let put = |table, key: &[u8], value| Change::Put(table, key.to_vec(), value);
    let delete = |table, key: &[u8]| Change::Delete(table, key.to_vec());
    let change = match write {
        Write::PutVm(vm) => put(Table::Vms, vm.id.as_bytes(), serde_json::to_vec(vm.as_ref())?),
        Write::DeleteVm(id) => delete(Table::Vms, id.as_bytes()),
        Write::PutIntent(intent) => put_intent(&intent)?,
        Write::ReplaceIntent(intent) => {
            let stored = stored(backend, changes, Table::Intents, intent.vm.as_bytes()).await?;
            let open = stored.and_then(|open| serde_json::from_slice::<Intent>(&open).ok());
            if open.is_none_or(|open| open.migration != intent.migration) {
                return Ok(());
            }
            put_intent(&intent)?
        }
        Write::DeleteIntent(vm) => delete(Table::Intents, vm.as_bytes()),
        Write::PutMigration(number, migration) => return put_migration(number, *migration, changes),
        Write::SetGuestGap(number, us) => {
            let key = number.to_be_bytes();
            let stored = stored(backend, changes, Table::History, &key).await?;
            let Some(mut migration) = stored.and_then(|it| cluster::Migration::decode(it.as_slice()).ok())
            else {
                return Ok(());
            };
            history::set_guest_gap(&mut migration, us);
            put(Table::History, &key, migration.encode_to_vec())
        }
        Write::DeleteMigration(number) => {
            changes.push(delete(Table::History, &number.to_be_bytes()));
            delete(Table::Samples, &number.to_be_bytes())
        }
        Write::DeleteSamples(number) => delete(Table::Samples, &number.to_be_bytes()),
        Write::PutMigrationDefaults(defaults) => {
            put(Table::Settings, MIGRATION_DEFAULTS, defaults.encode_to_vec())
        }
        Write::PutSchedulingPolicy(fields) => {
            put(Table::Settings, SCHEDULING_POLICY, serde_json::to_vec(&fields)?)
        }
        Write::PutQueued(queued) => put(
            Table::Queue,
            &queued.sequence.to_be_bytes(),
            serde_json::to_vec(queued.as_ref())?,
        ),
        Write::DeleteQueued(number) => delete(Table::Queue, &number.to_be_bytes()),
        Write::PutMoveOrder(order) => put(Table::Orders, &order_key(&order), serde_json::to_vec(&order)?),
        Write::DeleteMoveOrder(order) => delete(Table::Orders, &order_key(&order)),
        Write::PutNode(node) => put(
            Table::Nodes,
            node.name.as_str().as_bytes(),
            serde_json::to_vec(&node)?,
        ),
        Write::DeleteNode(name) => delete(Table::Nodes, name.as_str().as_bytes()),
        Write::PutCpu(digest, table) => put(Table::Cpus, digest.0.as_bytes(), table.to_bytes()),
        Write::SetCpuBaseline(Some(digest)) => put(Table::Cpus, BASELINE, digest.0.into_bytes()),
        Write::SetCpuBaseline(None) => delete(Table::Cpus, BASELINE),
        Write::PutImage(image) => put(
            Table::Images,
            image.name.as_bytes(),
            serde_json::to_vec(image.as_ref())?,
        ),
        Write::PutEvent(event) => put(
            Table::Events,
            &event.sequence.to_be_bytes(),
            event.encode_to_vec(),
        ),
        Write::TrimEvents(through) => Change::DeleteThrough(
            Table::Events,
            0u64.to_be_bytes().to_vec(),
            through.to_be_bytes().to_vec(),
        ),
    };
    changes.push(change);
    Ok(())
}

/// A value as it is once these changes are made.
async fn stored(
    backend: &dyn Backend,
    changes: &[Change],
    table: Table,
    key: &[u8],
) -> Result<Option<Vec<u8>>, StoreError> {
    for change in changes.iter().rev() {
        match change {
            Change::Put(of, at, value) if *of == table && at == key => return Ok(Some(value.clone())),
            Change::Delete(of, at) if *of == table && at == key => return Ok(None),
            Change::DeleteThrough(of, from, through)
                if *of == table && from.as_slice() <= key && key <= through.as_slice() =>
            {
                return Ok(None);
            }
            _ => {}
        }
    }
    backend.get(table, key).await
}

fn order_key(order: &MoveOrder) -> Vec<u8> {
    format!("{:?}/{}", order.direction, order.node).into_bytes()
}

fn put_intent(intent: &Intent) -> Result<Change, StoreError> {
    let value = serde_json::to_vec(intent)?;
    Ok(Change::Put(Table::Intents, intent.vm.as_bytes().to_vec(), value))
}

/// The samples, which are big and seldom looked at, apart from the rest.
fn put_migration(
    number: u64,
    mut migration: cluster::Migration,
    changes: &mut Vec<Change>,
) -> Result<(), StoreError> {
    let key = number.to_be_bytes().to_vec();
    let samples = migration
        .report
        .as_mut()
        .map(|report| std::mem::take(&mut report.samples))
        .unwrap_or_default();
    changes.push(Change::Put(
        Table::History,
        key.clone(),
        migration.encode_to_vec(),
    ));
    if !samples.is_empty() {
        let samples = vm::MigrationReport {
            samples,
            ..Default::default()
        };
        changes.push(Change::Put(Table::Samples, key, samples.encode_to_vec()));
    }
    Ok(())
}

/// Reads all of a store.
pub async fn load(backend: &dyn Backend) -> Result<Contents, StoreError> {
    let snapshot = backend.snapshot().await?;
    let reader = Reader {
        name: backend.name(),
        snapshot: snapshot.as_ref(),
    };
    let mut contents = Contents {
        vms: reader.scan(Table::Vms, json).await?,
        intents: reader.scan(Table::Intents, json).await?,
        history: reader.scan(Table::History, migration).await?,
        sampled: reader.keys(Table::Samples).await?,
        queue: reader.scan(Table::Queue, json).await?,
        orders: reader.scan(Table::Orders, json).await?,
        nodes: reader.scan(Table::Nodes, json).await?,
        images: reader.scan(Table::Images, json).await?,
        events: reader
            .scan(Table::Events, |_, value| cluster::Event::decode(value).ok())
            .await?,
        ..Contents::default()
    };
    for (baseline, table) in reader.scan(Table::Cpus, cpu).await? {
        contents.cpus.baseline = contents.cpus.baseline.or(baseline);
        contents.cpus.tables.extend(table);
    }
    for setting in reader.scan(Table::Settings, setting).await? {
        match setting {
            Setting::MigrationDefaults(defaults) => contents.migration_defaults = *defaults,
            Setting::SchedulingPolicy(policy) => contents.scheduling_policy = policy,
            Setting::Other => {}
        }
    }
    Ok(contents)
}

/// Reads the images alone.
pub async fn images(backend: &dyn Backend) -> Result<Vec<ImageRecord>, StoreError> {
    let snapshot = backend.snapshot().await?;
    let reader = Reader {
        name: backend.name(),
        snapshot: snapshot.as_ref(),
    };
    reader.scan(Table::Images, json).await
}

/// Whether a record can be read.
pub fn check(table: Table, key: &[u8], value: &[u8]) -> bool {
    match table {
        Table::Vms => json::<VmRecord>(key, value).is_some_and(|vm| vm.id.as_bytes() == key),
        Table::Intents => json::<Intent>(key, value).is_some(),
        Table::History => migration(key, value).is_some(),
        Table::Samples => number(key).is_some() && vm::MigrationReport::decode(value).is_ok(),
        Table::Settings => setting(key, value).is_some(),
        Table::Cpus => cpu(key, value).is_some(),
        Table::Queue => json::<QueuedRecord>(key, value).is_some(),
        Table::Orders => json::<MoveOrder>(key, value).is_some(),
        Table::Nodes => json::<NodeRecord>(key, value).is_some(),
        Table::Images => json::<ImageRecord>(key, value).is_some(),
        Table::Events => number(key).is_some() && cluster::Event::decode(value).is_ok(),
    }
}

struct Reader<'a> {
    name: &'a str,
    snapshot: &'a dyn Snapshot,
}

impl Reader<'_> {
    async fn scan<T>(
        &self,
        table: Table,
        decode: impl Fn(&[u8], &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, StoreError> {
        let mut found = Vec::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.snapshot.page(table, after.as_deref(), false).await?;
            let Some((last, _)) = page.last() else {
                return Ok(found);
            };
            after = Some(last.clone());
            for (key, value) in page {
                let record = decode(&key, &value).ok_or_else(|| {
                    let what = format!("record {} of table '{}'", found.len(), table.name());
                    StoreError::corrupt(self.name, what)
                })?;
                found.push(record);
            }
        }
    }

    async fn keys(&self, table: Table) -> Result<Vec<u64>, StoreError> {
        let mut found = Vec::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.snapshot.page(table, after.as_deref(), true).await?;
            let Some((last, _)) = page.last() else {
                return Ok(found);
            };
            after = Some(last.clone());
            for (key, _) in page {
                let key = number(&key).ok_or_else(|| {
                    let what = format!("key {} of table '{}'", found.len(), table.name());
                    StoreError::corrupt(self.name, what)
                })?;
                found.push(key);
            }
        }
    }
}

enum Setting {
    MigrationDefaults(Box<cluster::MigrationDefaults>),
    SchedulingPolicy(std::collections::BTreeMap<String, String>),
    /// One that this version does not know.
    Other,
}

fn setting(key: &[u8], value: &[u8]) -> Option<Setting> {
    Some(match key {
        MIGRATION_DEFAULTS => {
            Setting::MigrationDefaults(Box::new(cluster::MigrationDefaults::decode(value).ok()?))
        }
        SCHEDULING_POLICY => Setting::SchedulingPolicy(serde_json::from_slice(value).ok()?),
        _ => Setting::Other,
    })
}

fn cpu(key: &[u8], value: &[u8]) -> Option<(Option<CpuDigest>, Option<CpuTable>)> {
    if key == BASELINE {
        let digest = std::str::from_utf8(value).ok()?;
        return Some((Some(CpuDigest(digest.to_owned())), None));
    }
    Some((None, Some(CpuTable::from_bytes(value).ok()?)))
}

fn migration(key: &[u8], value: &[u8]) -> Option<(u64, cluster::Migration)> {
    let migration = cluster::Migration::decode(value).ok()?;
    Some((number(key)?, history::light(migration)))
}

fn number(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.try_into().ok()?))
}

fn json<T: DeserializeOwned>(_key: &[u8], value: &[u8]) -> Option<T> {
    serde_json::from_slice(value).ok()
}
