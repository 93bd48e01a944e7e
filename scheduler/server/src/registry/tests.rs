use super::*;
use crate::execute::launch;
use crate::testing::{Cluster, until};
use crate::view;
use shoal_proto::cluster::NodeState;
use shoal_proto::node::registry_client::RegistryClient;
use shoal_proto::node::registry_server::RegistryServer;
use shoal_proto::node::{Heartbeat, VmRef};
use tonic::transport::server::TcpIncoming;

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

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_cannot_be_written_keeps_no_heartbeat_waiting() {
    let cluster = Cluster::start(1, 1 << 30).await;
    let scheduler = &cluster.scheduler;
    let (entry, guard) = launch::submit(scheduler, cluster.draft("web", 64 << 20), None)
        .await
        .expect("placed");
    launch::start(scheduler, &entry, &guard).await.expect("started");
    let record = entry.record();
    // Whoever opens it to write waits until someone reads.
    let log = scheduler.logs.directory_of(record.id);
    std::fs::create_dir_all(&log).expect("made");
    let made = std::process::Command::new("mkfifo")
        .arg(log.join("00000000000000000000"))
        .status();
    assert!(made.expect("mkfifo runs").success());

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let registry = RegistryServer::new(RegistryApi::new(Role::Leader(Arc::clone(scheduler))));
    let server = tonic::transport::Server::builder().add_service(registry);
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    let mut client = RegistryClient::connect(endpoint).await.expect("connected");
    let (reports, queue) = mpsc::channel(4);
    let console = ConsoleData {
        vm: Some(VmRef {
            vm_id: record.id.to_string(),
            epoch: record.epoch.0,
        }),
        offset: 0,
        data: b"hello".to_vec(),
    };
    let heartbeat = Heartbeat {
        memory_available_bytes: 123,
        ..Heartbeat::default()
    };
    for report in [
        agent_report::Report::Register(register(&cluster, 0)),
        agent_report::Report::Console(console),
        agent_report::Report::Heartbeat(heartbeat),
    ] {
        let report = AgentReport { report: Some(report) };
        reports.send(report).await.expect("sent");
    }
    let _messages = client
        .report(ReceiverStream::new(queue))
        .await
        .expect("registered");
    let node = scheduler.nodes.get(&record.node).expect("known");
    until("the heartbeat", || node.figures().memory_available_bytes == 123).await;
}
