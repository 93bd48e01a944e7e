use super::file::{Bytes, META, definition};
use super::*;
use crate::history;
use crate::moves::Direction;
use crate::record::{
    BlobRef, Cordon, GivingWay, Lost, NodeWishes, Outcome, Phase, QueuedRecord, Runs, SoftwareKvm, VmWishes,
    now_unix_ms,
};
use redb::Database;
use shoal_plan::KvmKind;
use shoal_plan::labels::parse_terms;
use shoal_proto::{Epoch, MigrationId, vm};

#[path = "../../../../tests/src/etcd.rs"]
#[allow(dead_code, reason = "other tests use more of it")]
mod etcd_server;

mod backups;
mod in_etcd;

use etcd_server::EtcdServer;

/// Where it is not to end: long, for machines that also do other things.
const LEASE: std::time::Duration = std::time::Duration::from_secs(60);
/// Where it is.
const SHORT_LEASE: std::time::Duration = std::time::Duration::from_secs(6);

fn open_etcd(server: &EtcdServer, prefix: &str) -> etcd::Etcd {
    let location = etcd::Location::parse(&server.url(prefix)).expect("a location");
    etcd::Etcd::new(&location).expect("a client")
}

fn member(address: &str) -> etcd::Member {
    etcd::Member {
        id: uuid::Uuid::new_v4().to_string(),
        address: address.to_owned(),
        started_unix_ms: 1,
    }
}

async fn elected(etcd: &etcd::Etcd, address: &str) -> (etcd::Session, etcd::Lead) {
    elected_for(etcd, address, LEASE).await
}

async fn elected_for(
    etcd: &etcd::Etcd,
    address: &str,
    lease: std::time::Duration,
) -> (etcd::Session, etcd::Lead) {
    let session = in_time(async || etcd.join(member(address), lease).await.map(Some)).await;
    let lead = wait_for_lead(&session).await;
    (session, lead)
}

async fn wait_for_lead(session: &etcd::Session) -> etcd::Lead {
    in_time(async || session.campaign().await).await
}

/// Tries again where etcd does not answer, as when it has just been started.
async fn in_time<T>(attempt: impl AsyncFn() -> Result<Option<T>, StoreError>) -> T {
    let tries = async {
        loop {
            match attempt().await {
                Ok(Some(done)) => return done,
                Ok(None) | Err(StoreError::Database { .. }) => {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(90), tries)
        .await
        .expect("elected in time")
}

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
        kernel: Some(blob()),
        initrd: Some(blob()),
        cmdline: "quiet".to_owned(),
        software_kvm: Some(SoftwareKvm {
            kernel: Some(BlobRef {
                sha256: "cd".repeat(32),
                size_bytes: 8,
            }),
            cmdline: "noapic".to_owned(),
            max_cpus: Some(1),
        }),
        cpus: 2,
        memory_bytes: 1 << 30,
        created_unix_ms: now_unix_ms(),
        node: "node1".parse().expect("a node"),
        epoch: Epoch(3),
        last_epoch: Epoch(5),
        fenced_through: Epoch(0),
        phase: Phase::Ended(Outcome::Exited {
            status: Some(3),
            how: String::new(),
        }),
        message: String::new(),
        cpu: Some(CpuDigest("ab".repeat(32))),
        cpu_baseline: true,
        kvm: Some(KvmKind::Software),
        wishes: VmWishes {
            labels: "app=web,user=ada".parse().expect("labels"),
            rules: Some(Arc::new(shoal_plan::Rules {
                selector: parse_terms("zone=a,disk!=slow").expect("terms"),
                anti_affinity: parse_terms("app=web").expect("terms"),
                exclusive: true,
                ..Default::default()
            })),
            locked: true,
            priority: 9,
            preemptible: true,
            queued: true,
        },
        home: Some("node7".parse().expect("a node")),
        placement: "asked for".to_owned(),
        suspended: None,
        giving_way: Some(GivingWay {
            to: VmId::new(),
            name: "other".to_owned(),
            priority: 8,
            since_unix_ms: 4,
        }),
        runs: Runs {
            ended_unix_ms: 6,
            queued_unix_ms: 7,
            started_unix_ms: 3,
            pinned: Some("node7".parse().expect("a node")),
            preferred: Some("node8".parse().expect("a node")),
            console_offset: 77,
            preempted: 2,
            last_preempted: None,
        },
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
        policy: vm::MigrationPolicy {
            timeout_ms: Some(7),
            on_stall: vm::OnStall::Force.into(),
            ..Default::default()
        },
        expected: Some(std::time::Duration::from_millis(2500)),
    }
}

fn migration(epoch: u64) -> cluster::Migration {
    let report = vm::MigrationReport {
        downtime_us: 1234,
        samples: vec![vm::MigrationSample {
            elapsed_us: epoch,
            ..Default::default()
        }],
        pass_table: vec![vm::MigrationPass::default()],
        ..Default::default()
    };
    cluster::Migration {
        epoch,
        report: Some(report),
        ..Default::default()
    }
}

/// A store that can be opened again.
trait Place {
    type Open;
    async fn open(&self) -> (Store, Contents, Self::Open);
    async fn close(&self, store: Store, open: Self::Open);
}

struct InFile(std::path::PathBuf);

impl Place for InFile {
    type Open = ();

    async fn open(&self) -> (Store, Contents, ()) {
        let (store, contents) = Store::open_file(&self.0).await.expect("opened");
        (store, contents, ())
    }

    async fn close(&self, store: Store, (): ()) {
        let error = Store::open_file(&self.0).await.expect_err("it is open");
        assert!(matches!(error, StoreError::InUse(_)));
        drop(store);
    }
}

struct InEtcd(etcd::Etcd);

impl Place for InEtcd {
    type Open = (etcd::Session, etcd::Lead);

    async fn open(&self) -> (Store, Contents, Self::Open) {
        let (session, lead) = elected(&self.0, "127.0.0.1:1").await;
        let contents = lead.store.load().await.expect("read");
        (lead.store.clone(), contents, (session, lead))
    }

    async fn close(&self, store: Store, (session, _): Self::Open) {
        let other = self.0.join(member("127.0.0.1:2"), LEASE).await.expect("joined");
        assert!(other.campaign().await.expect("asked").is_none(), "it is led");
        other.leave().await;
        session.leave().await;
        drop(store);
    }
}

#[tokio::test]
async fn everything_comes_back_from_a_file_as_it_was_written() {
    let directory = tempfile::tempdir().expect("temporary directory");
    everything_comes_back(&InFile(directory.path().join("store"))).await;
}

#[tokio::test]
async fn everything_comes_back_from_etcd_as_it_was_written() {
    let Some(server) = EtcdServer::start() else { return };
    everything_comes_back(&InEtcd(open_etcd(&server, "shoal"))).await;
}

async fn everything_comes_back(place: &impl Place) {
    let (store, contents, open) = place.open().await;
    assert!(contents.vms.is_empty() && contents.events.is_empty());
    let (kept, removed) = (vm_record("kept"), vm_record("removed"));
    let intent = intent(&kept);
    let node = NodeRecord {
        name: "node1".parse().expect("a node"),
        address: "127.0.0.1:1".to_owned(),
        cpus: 4,
        memory_bytes: 1 << 30,
        migration_tls: true,
        cordon: Cordon::Draining,
        cpu: None,
        cpu_model: "A CPU".to_owned(),
        kvm: Some(KvmKind::Software),
        kvm_trouble: "interrupts do not arrive".to_owned(),
        wishes: NodeWishes {
            labels: "zone=a".parse().expect("labels"),
            taints: "gpu".parse().expect("labels"),
            reserved_memory_bytes: 5,
            reserved_millicpus: 1500,
        },
        lost: Some(Lost {
            since_unix_ms: 5,
            fenced: [(VmId::new(), Epoch(3))].into(),
        }),
        removed: false,
    };
    let defaults = cluster::MigrationDefaults {
        link_bandwidth_bytes_per_second: Some(5 << 20),
        ..Default::default()
    };
    let policy: BTreeMap<_, _> = [("overcommit".to_owned(), "2".to_owned())].into();
    let waits = vm_record("waits");
    let queued = |sequence| QueuedRecord {
        sequence,
        vm: waits.clone(),
        pinned: None,
        since_unix_ms: 5,
        room: Some("node2".parse().expect("a node")),
    };
    let order = |direction| MoveOrder {
        node: "node1".parse().expect("a node"),
        direction,
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
            Write::PutMigration(1, Box::new(migration(2))),
            Write::PutMigration(2, Box::new(migration(300))),
            Write::PutMigration(300, Box::new(migration(4))),
            Write::PutMigrationDefaults(Box::new(defaults)),
            Write::PutSchedulingPolicy(policy.clone()),
            Write::PutQueued(Arc::new(queued(3))),
            Write::PutQueued(Arc::new(queued(4))),
            Write::PutNode(node.clone()),
            Write::PutMoveOrder(order(Direction::Expel)),
            Write::PutMoveOrder(order(Direction::Bring)),
            Write::PutEvent(event.clone()),
            Write::PutEvent(early),
        ])
        .await
        .expect("written");
    store
        .apply(vec![
            Write::DeleteVm(removed.id),
            Write::DeleteMigration(1),
            Write::DeleteSamples(2),
            Write::SetGuestGap(300, 1500),
            Write::SetGuestGap(1, 1500),
            Write::TrimEvents(2),
            Write::DeleteQueued(3),
            Write::DeleteMoveOrder(order(Direction::Bring)),
        ])
        .await
        .expect("written");
    place.close(store, open).await;

    let (store, contents, open) = place.open().await;
    assert_eq!(contents.vms.len(), 1);
    assert_eq!(contents.vms[0], kept);
    assert_eq!(contents.intents, std::slice::from_ref(&intent));
    assert_eq!(contents.nodes, [node]);
    assert_eq!(contents.events, [event]);
    let mut gone_on = migration(4);
    history::set_guest_gap(&mut gone_on, 1500);
    assert_eq!(
        contents.history,
        [
            (2, history::light(migration(300))),
            (300, history::light(gone_on.clone()))
        ],
        "big parts are not read at start"
    );
    assert_eq!(contents.sampled, [300]);
    assert_eq!(contents.migration_defaults, defaults);
    assert_eq!(contents.scheduling_policy, policy);
    assert_eq!(contents.queue, [queued(4)]);
    assert_eq!(contents.orders, [order(Direction::Expel)]);
    let whole = store.migration(300).await.expect("readable");
    assert_eq!(whole, Some(gone_on));
    let thinned = store.migration(2).await.expect("readable").expect("there");
    let report = thinned.report.expect("a report");
    assert!(report.samples.is_empty() && !report.pass_table.is_empty());
    assert_eq!(store.migration(1).await.expect("readable"), None);

    let changed = |migration| Intent {
        reason: "changed".to_owned(),
        migration,
        ..intent.clone()
    };
    store
        .apply(vec![Write::ReplaceIntent(Arc::new(changed(MigrationId::new())))])
        .await
        .expect("written");
    place.close(store, open).await;
    let (store, contents, open) = place.open().await;
    assert_eq!(
        contents.intents,
        std::slice::from_ref(&intent),
        "another migration's is not replaced"
    );
    let replacement = changed(intent.migration);
    store
        .apply(vec![Write::ReplaceIntent(Arc::new(replacement.clone()))])
        .await
        .expect("written");
    place.close(store, open).await;
    let (store, contents, open) = place.open().await;
    assert_eq!(contents.intents, std::slice::from_ref(&replacement));
    store
        .apply(vec![
            Write::DeleteIntent(kept.id),
            Write::ReplaceIntent(Arc::new(replacement)),
        ])
        .await
        .expect("written");
    place.close(store, open).await;
    let (_, contents, _) = place.open().await;
    assert!(contents.intents.is_empty(), "one that is closed stays closed");
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    let (backend, _) = FileBackend::open(&path).expect("created");
    let transaction = backend.begin_write().expect("transaction");
    transaction
        .open_table(META)
        .expect("meta")
        .insert("schema", SCHEMA_VERSION + 1)
        .expect("written");
    transaction.commit().expect("committed");
    drop(backend);
    let error = Store::open_file(&path).await.expect_err("refused").to_string();
    assert!(
        error.contains("schema version 4") && error.contains("newer shoal"),
        "{error}"
    );
}

#[test]
fn records_of_before_there_were_wishes_wish_nothing() {
    let vm = vm_record("old");
    let mut json = serde_json::to_value(&vm).expect("json");
    for field in ["wishes", "home", "placement", "software_kvm", "kvm"] {
        json.as_object_mut().expect("an object").remove(field);
    }
    let read: VmRecord = serde_json::from_value(json).expect("read");
    assert_eq!(read.wishes, VmWishes::default());
    assert_eq!(
        (&read.kernel, read.software_kvm, read.kvm),
        (&Some(blob()), None, None)
    );
    let mut json = serde_json::to_value(&vm).expect("json");
    json["wishes"] = serde_json::json!({ "locked": true });
    let read: VmRecord = serde_json::from_value(json).expect("read");
    assert!(read.wishes.locked && read.wishes.rules.is_none());
    let mut json = serde_json::to_value(&vm).expect("json");
    json["wishes"]["labels"] = "no label".into();
    assert!(serde_json::from_value::<VmRecord>(json).is_err());
}

/// What a scheduler of schema 1 wrote: an intent without a policy, and a history by VM with the VM's name.
#[tokio::test]
async fn a_store_of_the_first_schema_is_taken_over() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    let vm = vm_record("old");
    let other = VmId::new();
    let old_intent = {
        let mut json = serde_json::to_value(intent(&vm)).expect("JSON");
        json.as_object_mut().expect("an object").remove("policy");
        json.to_string()
    };
    {
        let database = Database::create(&path).expect("created");
        let transaction = database.begin_write().expect("transaction");
        let put = |table: Bytes, key: &[u8], value: &[u8]| {
            let mut table = transaction.open_table(table).expect("a table");
            table.insert(key, value).expect("written");
        };
        let by_vm = Bytes::new("migrations");
        for (vm, epoch, started_unix_ms) in [(vm.id, 2u64, 30), (vm.id, 3, 50), (other, 2, 40)] {
            let key = [vm.as_bytes().as_slice(), &epoch.to_be_bytes()].concat();
            let migration = cluster::Migration {
                vm: "old".to_owned(),
                started_unix_ms,
                ..migration(epoch)
            };
            put(by_vm, &key, &migration.encode_to_vec());
        }
        put(
            definition(Table::Vms),
            vm.id.as_bytes(),
            &serde_json::to_vec(&vm).expect("JSON"),
        );
        put(
            definition(Table::Intents),
            vm.id.as_bytes(),
            old_intent.as_bytes(),
        );
        for table in [Table::Nodes, Table::Images, Table::Events].map(definition) {
            transaction.open_table(table).expect("a table");
        }
        transaction
            .open_table(META)
            .expect("meta")
            .insert("schema", 1)
            .expect("written");
        transaction.commit().expect("committed");
    }
    for _ in 0..2 {
        let (_, contents) = Store::open_file(&path)
            .await
            .expect("opened, and once more afterwards");
        let history: Vec<_> = contents
            .history
            .iter()
            .map(|(number, m)| (*number, m.vm.clone(), m.vm_name.as_str(), m.started_unix_ms))
            .collect();
        let expected = [
            (0, vm.id, "old", 30),
            (1, other, "old", 40),
            (2, vm.id, "old", 50),
        ];
        assert_eq!(
            history,
            expected.map(|(number, vm, name, at)| (number, vm.to_string(), name, at))
        );
        assert_eq!(contents.vms, std::slice::from_ref(&vm));
        assert_eq!(contents.intents[0].policy, vm::MigrationPolicy::default());
    }
}

#[tokio::test]
async fn damage_is_said_to_be_damage() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    std::fs::write(&path, vec![0x5a; 1 << 20]).expect("written");
    let error = Store::open_file(&path).await.expect_err("refused").to_string();
    assert!(error.contains("damaged"), "{error}");

    let path = directory.path().join("record");
    let (backend, _) = FileBackend::open(&path).expect("created");
    let transaction = backend.begin_write().expect("transaction");
    transaction
        .open_table(definition(Table::Vms))
        .expect("vms")
        .insert(&b"key"[..], &b"{not json"[..])
        .expect("written");
    transaction.commit().expect("committed");
    drop(backend);
    let error = Store::open_file(&path).await.expect_err("refused").to_string();
    assert!(error.contains("record 0 of table 'vms'"), "{error}");
}

/// A disk of its own that can be filled; unmounted at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        if std::env::var("SHOAL_SKIP_ROOT").is_ok_and(|skip| skip == "1") {
            println!("skipped, as SHOAL_SKIP_ROOT says: needs root to mount a disk");
            return None;
        }
        let directory = tempfile::tempdir().expect("temporary directory");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
            .arg(directory.path())
            .status();
        assert!(
            mounted.is_ok_and(|status| status.success()),
            "mounting needs root; SHOAL_SKIP_ROOT=1 skips this test"
        );
        Some(Self(directory))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("--lazy")
            .arg(self.0.path())
            .status();
    }
}

#[tokio::test]
async fn a_disk_that_was_full_is_written_again_once_it_has_room() {
    let Some(disk) = SmallDisk::mount() else { return };
    let path = disk.0.path().join("store");
    let (store, _) = Store::open_file(&path).await.expect("created");
    let setting = |value: String| vec![Write::PutSchedulingPolicy([("value".to_owned(), value)].into())];
    store.apply(setting("before".to_owned())).await.expect("stored");
    let well = store.watch();
    assert!(*well.borrow());

    let filler = disk.0.path().join("filler");
    let mut file = std::fs::File::create(&filler).expect("created");
    while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    let mut refused = 0;
    for number in 0..100 {
        let large = "x".repeat(500_000 + number);
        refused += usize::from(store.apply(setting(large)).await.is_err());
        if refused == 3 {
            break;
        }
    }
    assert_eq!(refused, 3, "the disk is full");
    assert!(!*well.borrow());

    drop(file);
    std::fs::remove_file(&filler).expect("removed");
    store
        .apply(setting("after".to_owned()))
        .await
        .expect("there is room again");
    assert!(*well.borrow());
    drop(store);
    let (_, contents) = Store::open_file(&path).await.expect("opened again");
    assert_eq!(contents.scheduling_policy["value"], "after");
}
