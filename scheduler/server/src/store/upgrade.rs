//! Stores that older schedulers wrote.

use std::path::Path;

use prost::Message as _;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use shoal_proto::cluster;

use super::{HISTORY, StoreError, corrupt, database_error};

/// Schema 1: the last 16 migrations of each VM, gone with it.
pub const HISTORY_BY_VM: u64 = 1;

/// Key: VM id, then epoch (big endian). The record's `vm` is the VM's name.
const BY_VM: TableDefinition<'static, &'static [u8], &'static [u8]> = TableDefinition::new("migrations");

/// From schema 1: one history of all VMs, in the order in which migrations began.
pub fn history_by_vm(transaction: &WriteTransaction, path: &Path) -> Result<(), StoreError> {
    let mut found = Vec::new();
    {
        let table = transaction
            .open_table(BY_VM)
            .map_err(|e| database_error(path, e))?;
        for (index, entry) in table.iter().map_err(|e| database_error(path, e))?.enumerate() {
            let (key, value) = entry.map_err(|e| database_error(path, e))?;
            let migration = decode(key.value(), value.value())
                .ok_or_else(|| corrupt(path, &format!("record {index} of table 'migrations'")))?;
            found.push(migration);
        }
    }
    found.sort_by_key(|migration| migration.started_unix_ms);
    let mut history = transaction
        .open_table(HISTORY)
        .map_err(|e| database_error(path, e))?;
    for (number, migration) in (0u64..).zip(found) {
        history
            .insert(
                number.to_be_bytes().as_slice(),
                migration.encode_to_vec().as_slice(),
            )
            .map_err(|e| database_error(path, e))?;
    }
    transaction
        .delete_table(BY_VM)
        .map_err(|e| database_error(path, e))?;
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
