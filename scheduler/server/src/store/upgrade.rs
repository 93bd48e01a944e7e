//! Stores that older schedulers wrote. All of them are files: stores in etcd begin with schema 3.

use prost::Message as _;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use shoal_proto::cluster;

use super::StoreError;
use super::backend::Table;
use super::file::{Bytes, definition};

/// Schema 1: the last 16 migrations of each VM, gone with it. Key: VM id, then epoch (big endian). The record's `vm` is
/// the VM's name.
const BY_VM: Bytes = TableDefinition::new("migrations");
/// Schema 2: keys are texts.
const SETTINGS: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("settings");

/// Brings a file from an older schema to this one, in the transaction that opens it.
pub fn file(transaction: &WriteTransaction, name: &str, found: u64) -> Result<(), StoreError> {
    match found {
        1 => {
            history_by_vm(transaction, name)?;
            settings_by_text(transaction, name)
        }
        2 => settings_by_text(transaction, name),
        _ => Err(StoreError::corrupt(name, "the schema version")),
    }
}

/// From schema 1: one history of all VMs, in the order in which migrations began.
fn history_by_vm(transaction: &WriteTransaction, name: &str) -> Result<(), StoreError> {
    let failed = |error: redb::Error| StoreError::database(name, error);
    let mut found = Vec::new();
    {
        let table = transaction.open_table(BY_VM).map_err(|e| failed(e.into()))?;
        for (index, entry) in table.iter().map_err(|e| failed(e.into()))?.enumerate() {
            let (key, value) = entry.map_err(|e| failed(e.into()))?;
            let migration = decode(key.value(), value.value())
                .ok_or_else(|| StoreError::corrupt(name, format!("record {index} of table 'migrations'")))?;
            found.push(migration);
        }
    }
    found.sort_by_key(|migration| migration.started_unix_ms);
    let mut history = transaction
        .open_table(definition(Table::History))
        .map_err(|e| failed(e.into()))?;
    for (number, migration) in (0u64..).zip(found) {
        history
            .insert(
                number.to_be_bytes().as_slice(),
                migration.encode_to_vec().as_slice(),
            )
            .map_err(|e| failed(e.into()))?;
    }
    transaction.delete_table(BY_VM).map_err(|e| failed(e.into()))?;
    Ok(())
}

fn decode(key: &[u8], value: &[u8]) -> Option<cluster::Migration> {
    let vm = uuid::Uuid::from_slice(key.get(..16)?).ok()?;
    let migration = cluster::Migration::decode(value).ok()?;
    Some(cluster::Migration {
        vm_name: migration.vm,
        vm: vm.to_string(),
        ..migration
    })
}

/// From schema 2: keys are bytes in every table.
fn settings_by_text(transaction: &WriteTransaction, name: &str) -> Result<(), StoreError> {
    let failed = |error: redb::Error| StoreError::database(name, error);
    {
        let old = transaction.open_table(SETTINGS).map_err(|e| failed(e.into()))?;
        let mut new = transaction
            .open_table(definition(Table::Settings))
            .map_err(|e| failed(e.into()))?;
        for entry in old.iter().map_err(|e| failed(e.into()))? {
            let (key, value) = entry.map_err(|e| failed(e.into()))?;
            new.insert(key.value().as_bytes(), value.value())
                .map_err(|e| failed(e.into()))?;
        }
    }
    transaction.delete_table(SETTINGS).map_err(|e| failed(e.into()))?;
    Ok(())
}
