use super::super::backup::{BackupError, StoreLocation, back_up, restore};
use super::*;
use std::fs;

/// A VM, a node, a migration, an event and the rest.
fn some_of_everything() -> Vec<Write> {
    let vm = vm_record("kept");
    let node = NodeRecord {
        name: "node1".parse().expect("a node"),
        address: "127.0.0.1:1".to_owned(),
        cpus: 4,
        memory_bytes: 1 << 30,
        migration_tls: true,
        cordon: Cordon::Draining,
        cpu: None,
        cpu_model: "A CPU".to_owned(),
        kvm: Some(KvmKind::Hardware),
        kvm_trouble: String::new(),
        wishes: NodeWishes::default(),
        lost: None,
        removed: false,
    };
    let event = cluster::Event {
        sequence: 7,
        message: "hello".to_owned(),
        ..Default::default()
    };
    vec![
        Write::PutIntent(Arc::new(intent(&vm))),
        Write::PutVm(Arc::new(vm)),
        Write::PutNode(node),
        Write::PutMigration(3, Box::new(migration(2))),
        Write::PutSchedulingPolicy([("overcommit".to_owned(), "2".to_owned())].into()),
        Write::PutEvent(event),
    ]
}

fn same(a: &Contents, b: &Contents) {
    assert_eq!(a.vms, b.vms);
    assert_eq!(a.intents, b.intents);
    assert_eq!(a.history, b.history);
    assert_eq!(a.sampled, b.sampled);
    assert_eq!(a.nodes, b.nodes);
    assert_eq!(a.events, b.events);
    assert_eq!(a.scheduling_policy, b.scheduling_policy);
    assert!(!a.vms.is_empty() && !a.sampled.is_empty() && !a.events.is_empty());
}

#[tokio::test]
async fn a_backup_goes_from_a_file_to_etcd_and_back() {
    let Some(server) = EtcdServer::start() else { return };
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name);
    let (one, other) = (
        StoreLocation::StateDir(path("one")),
        StoreLocation::StateDir(path("other")),
    );
    fs::create_dir(path("one")).expect("made");
    let (store, _) = Store::open_file(&path("one/shoal.redb")).await.expect("opened");
    store.apply(some_of_everything()).await.expect("written");
    let original = store.load().await.expect("read");
    let in_use = back_up(&one, &path("backup"))
        .await
        .expect_err("in use")
        .to_string();
    assert!(in_use.contains("another scheduler uses"), "{in_use}");
    assert!(!path("backup").exists());
    drop(store);

    let written = back_up(&one, &path("backup")).await.expect("backed up");
    assert_eq!((written.vms, written.nodes, written.records), (1, 1, 7));
    assert_eq!(written.bytes, fs::metadata(path("backup")).expect("there").len());
    let again = back_up(&one, &path("backup")).await.expect_err("it is there");
    assert!(matches!(again, BackupError::Io { .. }), "{again}");

    let in_etcd = StoreLocation::Etcd(server.url("shoal"));
    let restored = restore(&path("backup"), &in_etcd, false).await.expect("restored");
    assert_eq!(restored, written);
    let etcd = open_etcd(&server, "shoal");
    let (session, lead) = elected(&etcd, "127.0.0.1:1").await;
    assert!(
        lead.term > Term(1_000_000_000),
        "terms that agents have heard of are over"
    );
    same(&original, &lead.store.load().await.expect("read"));

    let led = restore(&path("backup"), &in_etcd, true)
        .await
        .expect_err("it is led");
    assert!(crate::api::chain(&led).contains("a scheduler leads"), "{led:?}");
    session.leave().await;
    let full = restore(&path("backup"), &in_etcd, false)
        .await
        .expect_err("not empty");
    assert!(full.to_string().contains("--force"), "{full}");
    restore(&path("backup"), &in_etcd, true).await.expect("replaced");

    back_up(&in_etcd, &path("second")).await.expect("backed up");
    restore(&path("second"), &other, false).await.expect("restored");
    let (store, contents) = Store::open_file(&path("other/shoal.redb")).await.expect("opened");
    same(&original, &contents);
    assert!(store.term() > lead.term);
    let in_use = restore(&path("second"), &other, true).await.expect_err("in use");
    assert!(in_use.to_string().contains("another scheduler uses"), "{in_use}");
    drop(store);
    let full = restore(&path("second"), &other, false)
        .await
        .expect_err("not empty");
    assert!(matches!(full, BackupError::NotEmpty(_)), "{full}");
    restore(&path("second"), &other, true).await.expect("replaced");
    assert!(path("other/shoal.replaced").exists());
    let nothing = back_up(&StoreLocation::Etcd(server.url("nothing")), &path("third")).await;
    assert!(nothing.is_err() && !path("third").exists());
}

#[tokio::test]
async fn a_backup_that_is_not_whole_is_refused_and_restores_nothing() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name);
    fs::create_dir(path("one")).expect("made");
    let (store, _) = Store::open_file(&path("one/shoal.redb")).await.expect("opened");
    store.apply(some_of_everything()).await.expect("written");
    drop(store);
    let written = back_up(&StoreLocation::StateDir(path("one")), &path("backup")).await;
    written.expect("backed up");
    let whole = fs::read(path("backup")).expect("read");
    let target = StoreLocation::StateDir(path("target"));
    let attempt = async |bytes: &[u8]| {
        fs::write(path("bad"), bytes).expect("written");
        let refused = restore(&path("bad"), &target, true).await;
        assert!(!path("target").exists(), "nothing is touched");
        refused.expect_err("it is not whole")
    };

    for length in (0..whole.len()).step_by(7) {
        let error = attempt(&whole[..length]).await;
        match &error {
            BackupError::Truncated { part, .. } => assert!(!part.is_empty()),
            BackupError::NoBackup { .. } if length < 8 => {}
            other => panic!("cut at {length}: {other}"),
        }
    }
    for at in (0..whole.len()).step_by(5) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x40;
        let error = attempt(&flipped).await.to_string();
        assert!(error.contains("bad"), "{error}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    let error = attempt(&longer).await.to_string();
    assert!(error.contains("what follows its end is damaged"), "{error}");

    let mut newer = whole.clone();
    newer[8] = 2;
    let error = attempt(&newer).await.to_string();
    assert!(
        error.contains("format version 2") && error.contains("newer shoal"),
        "{error}"
    );
    let mut newer = whole.clone();
    let at = newer
        .windows(11)
        .position(|part| part == b"\"schema\":3,")
        .expect("there");
    newer[at + 9] = b'4';
    let error = attempt(&newer).await.to_string();
    assert!(
        error.contains("schema version 4") && error.contains("newer shoal"),
        "{error}"
    );
    let mut record = whole;
    let at = record
        .windows(6)
        .position(|part| part == b"\"name\"")
        .expect("there");
    record[at] = b'!';
    let error = attempt(&record).await.to_string();
    assert!(error.contains("of table 'vms'"), "{error}");
}
