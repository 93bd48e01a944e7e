use super::*;
use crate::record::{BlobRef, Cordon, Outcome, Phase, now_unix_ms};
use shoal_proto::{MigrationId, vm};

fn blob() -> BlobRef {
    BlobRef {
        sha256: "ab".repeat(32),
        size_bytes: 7,
    }
}

fn vm_record(name: &str) -> VmRecord {
    VmRecord {
        id: VmId::new(),
        name: name.parse().expect("a name"),
        image: "linux".to_owned(),
        image_digest: "d".to_owned(),
        args: vec!["sh".to_owned(), "-c".to_owned(), "echo ü".to_owned()],
        kernel: blob(),
        initrd: Some(blob()),
        cmdline: "quiet".to_owned(),
        cmdline_software_kvm: String::new(),
        cpus: 2,
        memory_bytes: 1 << 30,
        created_unix_ms: now_unix_ms(),
        node: "node1".parse().expect("a node"),
        epoch: Epoch(3),
        last_epoch: Epoch(5),
        fenced_through: Epoch(0),
        phase: Phase::Ended(Outcome::Exited { status: Some(3) }),
        message: String::new(),
    }
}

fn intent(vm: &VmRecord) -> Intent {
    Intent {
        vm: vm.id,
        migration: MigrationId::new(),
        from: vm.node.clone(),
        from_epoch: vm.epoch,
        to: "node2".parse().expect("a node"),
        epoch: Epoch(6),
        reason: "requested".to_owned(),
        started_unix_ms: 1,
    }
}

fn migration(epoch: u64) -> cluster::Migration {
    let report = vm::MigrationReport {
        downtime_us: 1234,
        ..Default::default()
    };
    cluster::Migration {
        epoch,
        report: Some(report),
        ..Default::default()
    }
}

#[tokio::test]
async fn everything_comes_back_as_it_was_written() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    let (store, contents) = Store::open(&path).expect("created");
    assert!(contents.vms.is_empty() && contents.events.is_empty());
    let (kept, removed) = (vm_record("kept"), vm_record("removed"));
    let intent = intent(&kept);
    let node = NodeRecord {
        name: "node1".parse().expect("a node"),
        address: "127.0.0.1:1".to_owned(),
        cpus: 4,
        memory_bytes: 1 << 30,
        cordon: Cordon::Draining,
    };
    let event = cluster::Event {
        sequence: 300,
        message: "hello".to_owned(),
        ..Default::default()
    };
    let early = cluster::Event {
        sequence: 2,
        ..Default::default()
    };
    store
        .apply(vec![
            Write::PutVm(Arc::new(kept.clone())),
            Write::PutVm(Arc::new(removed.clone())),
            Write::PutIntent(Arc::new(intent.clone())),
            Write::PutMigration(kept.id, Box::new(migration(2))),
            Write::PutMigration(kept.id, Box::new(migration(300))),
            Write::PutMigration(removed.id, Box::new(migration(2))),
            Write::PutNode(node.clone()),
            Write::PutEvent(event.clone()),
            Write::PutEvent(early),
        ])
        .await
        .expect("written");
    store
        .apply(vec![
            Write::DeleteVm(removed.id),
            Write::DeleteMigration(kept.id, Epoch(2)),
            Write::TrimEvents(2),
        ])
        .await
        .expect("written");
    assert!(matches!(Store::open(&path), Err(StoreError::InUse(_))));
    drop(store);

    let (store, contents) = Store::open(&path).expect("opened again");
    assert_eq!(contents.vms.len(), 1);
    assert_eq!(contents.vms[0], kept);
    assert_eq!(contents.intents, [intent]);
    assert_eq!(contents.nodes, [node]);
    assert_eq!(contents.events, [event]);
    assert_eq!(contents.migrations, [(kept.id, migration(300))]);
    store
        .apply(vec![Write::DeleteIntent(kept.id)])
        .await
        .expect("written");
    drop(store);
    let (_, contents) = Store::open(&path).expect("opened again");
    assert!(contents.intents.is_empty());
}

#[test]
fn a_newer_schema_is_refused() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    let (store, _) = Store::open(&path).expect("created");
    let transaction = store.database.begin_write().expect("transaction");
    transaction
        .open_table(META)
        .expect("meta")
        .insert("schema", SCHEMA_VERSION + 1)
        .expect("written");
    transaction.commit().expect("committed");
    drop(store);
    let error = Store::open(&path).expect_err("refused").to_string();
    assert!(
        error.contains("schema version 2") && error.contains("newer shoal"),
        "{error}"
    );
}

#[test]
fn damage_is_said_to_be_damage() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    std::fs::write(&path, vec![0x5a; 1 << 20]).expect("written");
    let error = Store::open(&path).expect_err("refused").to_string();
    assert!(error.contains("damaged"), "{error}");

    let path = directory.path().join("record");
    let (store, _) = Store::open(&path).expect("created");
    let transaction = store.database.begin_write().expect("transaction");
    transaction
        .open_table(VMS)
        .expect("vms")
        .insert(&b"key"[..], &b"{not json"[..])
        .expect("written");
    transaction.commit().expect("committed");
    drop(store);
    let error = Store::open(&path).expect_err("refused").to_string();
    assert!(error.contains("record 0 of table 'vms'"), "{error}");
}
