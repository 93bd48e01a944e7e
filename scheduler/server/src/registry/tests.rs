use super::*;
use crate::testing::Cluster;
use crate::view;
use shoal_proto::cluster::NodeState;

fn register(cluster: &Cluster, term: u64) -> Register {
    let record = &cluster.nodes[0].record;
    Register {
        node: record.name.to_string(),
        address: record.address.clone(),
        cpus: record.cpus,
        memory_bytes: record.memory_bytes,
        term,
        ..Register::default()
    }
}

#[tokio::test]
async fn an_agent_that_obeys_another_is_refused_and_its_node_says_why() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let scheduler = &cluster.scheduler;
    let own = scheduler.store.term().0;
    let name = &cluster.nodes[0].record.name;
    let entry = scheduler.nodes.get(name).expect("known");
    let (sender, _messages) = mpsc::channel(1);
    let refused = begin(scheduler, &register(&cluster, own + 1), 2, sender.clone()).await;
    let refused = refused.expect_err("refused");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    let shown = view::node(scheduler, &entry);
    assert!(
        shown.trouble.contains("remove the file 'term'"),
        "{}",
        shown.trouble
    );

    begin(scheduler, &register(&cluster, own), 3, sender)
        .await
        .expect("obeys this one");
    let shown = view::node(scheduler, &entry);
    assert_eq!((shown.trouble.as_str(), shown.state()), ("", NodeState::Ready));
}

#[tokio::test]
async fn registering_alone_makes_no_node_ready() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let scheduler = &cluster.scheduler;
    let mut newcomer = register(&cluster, 0);
    newcomer.node = "another".to_owned();
    let (sender, _messages) = mpsc::channel(1);
    let (name, entry) = begin(scheduler, &newcomer, 1, sender).await.expect("registered");
    assert!(!entry.is_reachable(), "it has reported nothing");
    assert!(entry.is_taken_by_other("127.0.0.1:9"), "but is connected");
    observe::report(
        scheduler,
        &name,
        &entry,
        &shoal_proto::node::Heartbeat::default().into(),
    );
    assert!(entry.is_reachable());
}
