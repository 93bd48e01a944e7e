use super::super::etcd::Location;
use super::super::{Change, MOST_CHANGES, Table};
use super::*;
use std::time::Duration;

fn event(sequence: u64, message: &str) -> Write {
    Write::PutEvent(cluster::Event {
        sequence,
        message: message.to_owned(),
        ..Default::default()
    })
}

#[tokio::test]
async fn a_deposed_leader_writes_nothing() {
    let Some(server) = EtcdServer::start() else { return };
    let etcd = open_etcd(&server, "shoal");
    let (first, old) = elected_for(&etcd, "127.0.0.1:1", SHORT_LEASE).await;
    old.store.apply(vec![event(1, "first")]).await.expect("it leads");
    let second = etcd.join(member("127.0.0.1:2"), LEASE).await.expect("joined");
    assert!(second.campaign().await.expect("asked").is_none());
    let leader = etcd.leader().await.expect("asked").expect("one leads");
    assert_eq!(
        (leader.member.address.as_str(), leader.term),
        ("127.0.0.1:1", old.term.0)
    );
    assert_eq!(etcd.members().await.expect("asked").len(), 2);

    // The old leader's own clock stands still with it: nothing but the fence can stop its next write.
    let clock_stands = first.stand_still_for_test();
    let new = wait_for_lead(&second).await;
    assert!(new.term > old.term);
    new.store.apply(vec![event(2, "second")]).await.expect("it leads");

    let refused = old
        .store
        .apply(vec![event(3, "third"), Write::TrimEvents(2)])
        .await;
    assert!(matches!(refused, Err(StoreError::Deposed)), "{refused:?}");
    tokio::time::timeout(Duration::from_secs(10), old.deposed())
        .await
        .expect("it hears that it is deposed");
    let again = old.store.apply(vec![event(4, "fourth")]).await;
    assert!(matches!(again, Err(StoreError::Deposed)), "{again:?}");

    drop(clock_stands);
    let events = new.store.load().await.expect("read").events;
    let messages: Vec<&str> = events.iter().map(|event| event.message.as_str()).collect();
    assert_eq!(messages, ["first", "second"]);
    new.store
        .apply(vec![event(5, "fifth")])
        .await
        .expect("it leads on");
    second.leave().await;
    assert!(
        etcd.leader().await.expect("asked").is_none(),
        "who leaves is not waited for"
    );
}

#[tokio::test]
async fn a_leader_without_etcd_gives_up_and_its_writes_are_not_lost_half() {
    let Some(mut server) = EtcdServer::start() else {
        return;
    };
    let etcd = open_etcd(&server, "shoal");
    let (session, lead) = elected_for(&etcd, "127.0.0.1:1", SHORT_LEASE).await;
    lead.store.apply(vec![event(1, "before")]).await.expect("written");
    server.kill();
    let store = lead.store.clone();
    let write = tokio::spawn(async move { store.apply(vec![event(2, "during")]).await });
    tokio::time::timeout(Duration::from_secs(60), lead.deposed())
        .await
        .expect("it gives up by its own clock");
    session.lost().await;
    assert!(matches!(write.await.expect("no panic"), Err(StoreError::Deposed)));
    server.start_again();
    let (_session, next) = elected(&etcd, "127.0.0.1:1").await;
    assert!(next.term > lead.term);
    let events = next.store.load().await.expect("read").events;
    assert_eq!(events.len(), 1);
}

/// As after an election whose answer was lost: nobody else could lead as long as the lease is kept alive.
#[tokio::test]
async fn who_leads_without_knowing_it_gives_the_lease_back() {
    let Some(server) = EtcdServer::start() else { return };
    let etcd = open_etcd(&server, "shoal");
    let (session, lead) = elected(&etcd, "127.0.0.1:1").await;
    drop(lead);
    let again = session.campaign().await;
    assert!(matches!(again, Err(StoreError::Deposed)), "{again:?}");
    session.leave().await;
    let (_other, _lead) = elected(&etcd, "127.0.0.1:2").await;
}

/// Many at once share transactions, and none is lost or done twice.
#[tokio::test]
async fn batches_written_at_once_are_all_there() {
    let Some(server) = EtcdServer::start() else { return };
    let etcd = open_etcd(&server, "shoal");
    let (_session, lead) = elected(&etcd, "127.0.0.1:1").await;
    let before = etcd.revision().await.expect("asked");
    let mut tasks = tokio::task::JoinSet::new();
    for number in 1..=300 {
        let store = lead.store.clone();
        tasks.spawn(async move {
            store
                .apply(vec![event(2 * number, "a"), event(2 * number + 1, "b")])
                .await
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no panic").expect("written");
    }
    let transactions = etcd.revision().await.expect("asked") - before;
    assert!(transactions < 300, "{transactions} transactions for 300 batches");
    let events = lead.store.load().await.expect("read").events;
    assert_eq!(events.len(), 600);
    assert!(events.is_sorted_by_key(|event| event.sequence));

    let too_many = (0..=MOST_CHANGES as u64)
        .map(|number| event(number, "x"))
        .collect();
    let refused = lead.store.apply(too_many).await;
    assert!(matches!(refused, Err(StoreError::TooLarge { .. })), "{refused:?}");
    let too_long = lead.store.apply(vec![event(1, &"x".repeat(2 << 20))]).await;
    assert!(
        matches!(too_long, Err(StoreError::TooLarge { .. })),
        "{too_long:?}"
    );
    lead.store
        .apply(
            (0..MOST_CHANGES as u64)
                .map(|number| event(number, "x"))
                .collect(),
        )
        .await
        .expect("as many as are allowed fit into a transaction of etcd");
    lead.store
        .apply(vec![event(1, &"x".repeat(1_000_000))])
        .await
        .expect("as long as is allowed fits into a request of etcd");
}

#[tokio::test]
async fn a_large_store_is_read_in_pages_as_it_was_at_one_moment() {
    let Some(server) = EtcdServer::start() else { return };
    let etcd = open_etcd(&server, "shoal");
    let (_session, lead) = elected(&etcd, "127.0.0.1:1").await;
    let long = "x".repeat(900_000);
    for number in 0..40 {
        lead.store
            .apply(vec![event(number, &long)])
            .await
            .expect("written");
    }
    for batch in 1..=12 {
        let batch = (0..100).map(|number| event(batch * 100 + number, "short"));
        lead.store.apply(batch.collect()).await.expect("written");
    }
    let snapshot = etcd.snapshot().await.expect("taken");
    lead.store
        .apply(vec![Write::TrimEvents(2000)])
        .await
        .expect("written");
    let (mut after, mut pages, mut records) = (None, 0, 0);
    loop {
        let page = snapshot
            .page(Table::Events, after.as_deref(), false)
            .await
            .expect("read");
        let Some((last, _)) = page.last() else { break };
        assert!(page.is_sorted());
        let bytes: usize = page.iter().map(|(_, value)| value.len()).sum();
        assert!(bytes <= 32 << 20, "{bytes} in one page");
        (pages, records) = (pages + 1, records + page.len());
        after = Some(last.clone());
    }
    assert!(pages > 3 && records == 1240, "{records} in {pages}");
    assert!(lead.store.load().await.expect("read").events.is_empty());
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_by_name() {
    let Some(server) = EtcdServer::start() else { return };
    let place = |prefix: &str| open_etcd(&server, prefix);
    for (prefix, schema, words) in [
        ("newer", "4", "schema version 4"),
        ("older", "1", "the schema version is damaged"),
        ("garbage", "three", "the schema version is damaged"),
        ("half", "restoring", "did not come to its end"),
    ] {
        let etcd = place(prefix);
        let (session, _lead) = elected(&etcd, "127.0.0.1:1").await;
        etcd.set_for_test("schema", schema.as_bytes()).await;
        session.leave().await;
        let error = etcd.check_schema().await.expect_err(prefix).to_string();
        assert!(error.contains(words) && error.contains(prefix), "{error}");
        let session = etcd.join(member("127.0.0.1:1"), LEASE).await.expect("joined");
        let error = session.campaign().await.expect_err("not led").to_string();
        assert!(error.contains(words), "{error}");
    }
    let etcd = place("damaged");
    let (_session, lead) = elected(&etcd, "127.0.0.1:1").await;
    etcd.set_for_test("data/vms/0123456789abcdef", b"{not json").await;
    let error = lead.store.load().await.expect_err("damaged").to_string();
    assert!(error.contains("record 0 of table 'vms'"), "{error}");
    let etcd = place("no-schema");
    etcd.set_for_test("data/vms/0123456789abcdef", b"{}").await;
    let error = etcd.check_schema().await.expect_err("no schema").to_string();
    assert!(error.contains("the schema version"), "{error}");
    assert!(!place("empty").check_schema().await.expect("nothing there"));
}

#[test]
fn changes_of_one_key_become_one_operation() {
    let key = |n: u8| vec![n];
    let (table, other) = (Table::Events, Table::Vms);
    let changes = vec![
        Change::Put(table, key(1), vec![1]),
        Change::Put(table, key(9), vec![9]),
        Change::Put(other, key(1), vec![1]),
        Change::Delete(other, key(1)),
        Change::DeleteThrough(table, key(0), key(5)),
        Change::Put(table, key(6), vec![6]),
    ];
    assert_eq!(etcd::operations_for_test(changes).expect("possible"), 4);
    let impossible = vec![
        Change::DeleteThrough(table, key(0), key(5)),
        Change::Put(table, key(3), vec![3]),
    ];
    assert!(etcd::operations_for_test(impossible).is_err());
}

#[test]
fn locations_are_read_and_garbage_is_not() {
    let parsed = |text| Location::parse(text).expect(text);
    assert_eq!(parsed("etcd://a:1").to_string(), "etcd://a:1/shoal");
    assert_eq!(
        parsed("etcd://10.0.0.1:2379,[::1]:2379/my/shoal/").to_string(),
        "etcd://10.0.0.1:2379,[::1]:2379/my/shoal"
    );
    for bad in [
        "",
        "etcd://",
        "http://a:1",
        "etcd://a",
        "etcd://a:0",
        "etcd://a:99999",
        "etcd://a:1,/x",
        "etcd://u:p@a:1",
        "etcd://a:1/a b",
        "etcd://[x]:1",
    ] {
        let error = Location::parse(bad).expect_err(bad).to_string();
        assert!(error.contains("the form is"), "{error}");
    }
}
