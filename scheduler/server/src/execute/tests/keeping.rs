//! What is kept of VMs: those that have ended, for a while, and those that could not be started, until they are.

use super::*;
use crate::images::ImageStore;
use crate::queue;
use crate::record::BlobRef;

#[tokio::test]
async fn those_that_ended_first_make_room_for_those_that_end_later() {
    let cluster = Cluster::start(1, GIB).await;
    let scheduler = &cluster.scheduler;
    assert_eq!(scheduler.keep_ended, 3);
    let names = ["a", "b", "c", "d", "e"];
    let mut ids = Vec::new();
    for name in names {
        let (entry, guard) = launch::submit(scheduler, cluster.draft(name, 64 << 20), None)
            .await
            .expect("placed");
        launch::start(scheduler, &entry, &guard).await.expect("started");
        let id = entry.record().id;
        scheduler
            .logs
            .append(id, 0, b"hello".to_vec())
            .await
            .expect("written");
        ids.push(id);
    }
    let end = async |name: &str| {
        let entry = scheduler.vms.find(name).expect("known");
        let guard = entry.lock().await;
        let before = entry.record().runs.ended_unix_ms;
        drop(guard);
        assert_eq!(before, 0, "it runs");
        // Each at a later millisecond than the one before.
        let now = crate::record::now_unix_ms();
        until("the next millisecond", || crate::record::now_unix_ms() > now).await;
        stop::stop(scheduler, &entry).await.expect("stopped");
    };
    // Not in the order in which they began.
    for name in ["e", "a", "c"] {
        end(name).await;
    }
    stop::forget_ended(scheduler).await;
    assert_eq!(scheduler.vms.list().len(), 5, "so many are kept");
    for name in ["b", "d"] {
        end(name).await;
    }
    stop::forget_ended(scheduler).await;
    let left: Vec<bool> = names
        .iter()
        .map(|name| scheduler.vms.find(name).is_some())
        .collect();
    assert_eq!(left, [false, true, true, true, false], "e and a ended first");
    for (id, left) in ids.iter().zip(left) {
        assert_eq!(
            scheduler.logs.directory_of(*id).exists(),
            left,
            "a log goes with its VM"
        );
    }
    let contents = scheduler.store.load().await.expect("readable");
    assert_eq!(contents.vms.len(), 3);
}

#[tokio::test]
async fn one_that_waited_and_that_its_node_cannot_start_waits_again() {
    let cluster = Cluster::start(1, GIB).await;
    let scheduler = &cluster.scheduler;
    cluster.nodes[0].refuse_launches();
    let waiting = queue::enqueue(scheduler, cluster.draft("patient", 64 << 20), None)
        .await
        .expect("it may wait");
    let id = waiting.record.vm.id;
    let first = waiting.record.vm.runs.queued_unix_ms;
    until("it waits again", || {
        let again = scheduler.queue.find("patient");
        again.is_some_and(|again| again.record.vm.epoch == Epoch(2))
    })
    .await;
    let again = scheduler.queue.find("patient").expect("it waits");
    assert_eq!(again.record.vm.id, id);
    assert_eq!(again.record.since(), first, "in its old place");
    assert_eq!(again.entry.record().phase, Phase::Queued);
    assert!(scheduler.vms.get(id).is_none());
    let contents = scheduler.store.load().await.expect("readable");
    assert_eq!((contents.vms.len(), contents.queue.len()), (0, 1));
    queue::advance(scheduler).await;
    let still = scheduler.queue.find("patient").expect("it waits");
    assert!(
        still.reason.contains("failed"),
        "the node is passed over: {}",
        still.reason
    );

    cluster.nodes[0].accept_launches();
    scheduler.failures.clear(&cluster.nodes[0].record.name, None);
    queue::advance(scheduler).await;
    until("it runs", || {
        let entry = scheduler.vms.get(id);
        entry.is_some_and(|entry| entry.record().phase == Phase::Running)
    })
    .await;
    assert_eq!(cluster.nodes[0].epochs_of(id), [2]);
}

#[tokio::test]
async fn one_for_a_certain_node_is_not_tried_there_each_second() {
    let cluster = Cluster::start(2, GIB).await;
    let scheduler = &cluster.scheduler;
    cluster.nodes[0].refuse_launches();
    let node = cluster.nodes[0].record.name.clone();
    queue::enqueue(scheduler, cluster.draft("patient", 64 << 20), Some(node.clone()))
        .await
        .expect("it may wait");
    until("it waits again", || {
        let again = scheduler.queue.find("patient");
        again.is_some_and(|again| again.record.vm.epoch == Epoch(2))
    })
    .await;
    // As if that had happened often: it would be a while.
    for _ in 0..5 {
        scheduler.failures.note(&node, None, "scripted");
    }
    queue::advance(scheduler).await;
    let still = scheduler.queue.find("patient").expect("it waits");
    assert_eq!(still.record.vm.epoch, Epoch(2), "not tried");
    assert!(still.reason.contains("scripted"), "{}", still.reason);
}

#[tokio::test]
async fn the_files_of_one_that_waits_outlive_a_change_of_scheduler() {
    let cluster = Cluster::start(1, GIB).await;
    let scheduler = &cluster.scheduler;
    let (entry, guard) = launch::submit(scheduler, cluster.draft("first", GIB), None)
        .await
        .expect("placed");
    launch::start(scheduler, &entry, &guard).await.expect("started");
    let mut draft = cluster.draft("patient", GIB);
    let kernel = "5".repeat(64);
    draft.kernel = Some(BlobRef {
        sha256: kernel.clone(),
        size_bytes: 1,
    });
    queue::enqueue(scheduler, draft, None).await.expect("it may wait");
    assert!(scheduler.queue.find("patient").is_some(), "there is no room");

    // As the next scheduler begins: its image has been replaced meanwhile.
    let contents = scheduler.store.load().await.expect("readable");
    let blobs = tempfile::tempdir().expect("a directory");
    let unused = "6".repeat(64);
    for name in [&kernel, &unused] {
        std::fs::write(blobs.path().join(name), b"x").expect("written");
    }
    ImageStore::open(
        blobs.path().to_owned(),
        contents.images.clone(),
        &contents.blobs(),
    )
    .expect("opened");
    let left = [&kernel, &unused].map(|name| blobs.path().join(name).exists());
    assert_eq!(left, [true, false]);
}
