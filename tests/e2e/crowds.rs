//! Whoever can reach the scheduler may open far more than it can serve at a time: that must not keep it from its work.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shoal_proto::TERM_HEADER;
use shoal_proto::cluster::ImportImageRequest;
use shoal_proto::cluster::cluster_client::ClusterClient;
use shoal_proto::node::VmRef;
use shoal_proto::node::agent_client::AgentClient;
use shoal_proto::node::registry_client::RegistryClient;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::Channel;

use crate::CALM;

/// More on each of three connections than a scheduler takes.
const STREAMS: usize = 190;
/// Connections, more than one address gets.
const CROWD: usize = 530;

#[test]
fn hundreds_of_empty_imports_stop_neither_runs_nor_logs_nor_heartbeats() {
    let Some(machine) = Machine::with_kvm("imports that send nothing") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    cluster.run_probe("before", "node1", "128MiB", CALM);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let endpoint = cluster.shoal.endpoint().to_owned();
    let (held, refused) = runtime.block_on(open_imports(&endpoint));
    // Those that were taken are held until the end of the test, or as long as the scheduler lets them.
    assert!(refused >= 3 * STREAMS - 8, "{refused} were refused");

    cluster.run_probe("amid", "node2", "128MiB", CALM);
    for vm in ["before", "amid"] {
        cluster.wait_for_heartbeats(vm, 5);
    }
    for node in ["node1", "node2"] {
        assert_eq!(cluster.node(node)["state"], "ready");
    }
    let events = cluster.events();
    assert!(
        !events.iter().any(|event| event["kind"] == "node-unreachable"),
        "{events:?}"
    );
    drop(held);
}

#[test]
fn connections_that_say_nothing_are_closed_and_stop_nothing() {
    let Some(machine) = Machine::with_kvm("connections that say nothing") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let agent = cluster.node("node1")["address"]
        .as_str()
        .expect("an address")
        .to_owned();
    let scheduler = cluster.shoal.endpoint().trim_start_matches("http://").to_owned();
    let connect = |address: &String| {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_nonblocking(true).expect("set");
        stream
    };
    let silent: Vec<TcpStream> = [scheduler, agent]
        .iter()
        .flat_map(|address| std::iter::repeat_n(address, 200).map(connect))
        .collect();
    cluster.run_probe("steady", "node1", "128MiB", CALM);
    // What the other side says first is of no interest.
    let is_closed = |mut stream: &TcpStream| {
        let read = stream.read_to_end(&mut Vec::new());
        !matches!(read, Err(error) if error.kind() == ErrorKind::WouldBlock)
    };
    wait::until_true("all of them to be closed", seconds(30), || {
        silent.iter().all(is_closed)
    });
    assert_eq!(cluster.node("node1")["state"], "ready");
    cluster.wait_for_heartbeats("steady", 1);
}

#[test]
fn a_crowd_that_greets_and_never_calls_keeps_no_one_out() {
    let Some(machine) = Machine::with_kvm("a crowd that never calls") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    // Both ends of the crowd's connections are on this host, its own in this process.
    let limit = getrlimit(Resource::Nofile);
    let current = limit.maximum;
    setrlimit(Resource::Nofile, Rlimit { current, ..limit }).expect("raised");
    cluster.run_probe("before", "node1", "128MiB", CALM);
    let agent = cluster.node("node1")["address"].as_str().expect("one").to_owned();
    let scheduler = cluster.shoal.endpoint().trim_start_matches("http://").to_owned();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");

    let crowd = runtime.block_on(gather(&scheduler));
    cluster.run_probe("amid", "node2", "128MiB", CALM);
    let node = cluster.node("node2");
    cluster.kill_daemon("node2");
    cluster.start_daemon("node2");
    cluster.wait_for_return(&node);
    cluster.run_probe("later", "node2", "128MiB", CALM);
    cluster.wait_for_heartbeats("before", 5);
    drop(crowd);

    let crowd = runtime.block_on(gather(&agent));
    let refused = runtime.block_on(async {
        let client = AgentClient::connect(format!("http://{agent}")).await;
        client.expect("connected").stop_vm(VmRef::default()).await
    });
    assert_eq!(refused.expect_err("no secret").code(), Code::Unauthenticated);
    cluster.shoal.ok(&["stop", "before"]);
    drop(crowd);
}

#[test]
fn a_stranger_is_refused_by_agents_and_cannot_register_as_a_node() {
    let Some(machine) = Machine::with_kvm("strangers") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let mode = std::fs::metadata(cluster.state_dir().join("cluster.secret"));
    assert_eq!(mode.expect("`up` made it").permissions().mode() & 0o777, 0o600);
    let address = cluster.node("node1")["address"].as_str().expect("one").to_owned();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let agent = AgentClient::connect(format!("http://{address}")).await;
        let mut call = tonic::Request::new(VmRef::default());
        let last = u64::MAX.to_string().parse().expect("a value");
        call.metadata_mut().insert(TERM_HEADER, last);
        let refused = agent.expect("connected").stop_vm(call).await;
        assert_eq!(refused.expect_err("refused").code(), Code::Unauthenticated);

        let registry = RegistryClient::connect(cluster.shoal.endpoint().to_owned()).await;
        let refused = registry.expect("connected").report(tokio_stream::empty()).await;
        assert_eq!(refused.expect_err("refused").code(), Code::Unauthenticated);
    });
    // The agent obeys its scheduler as before.
    cluster.run_probe("web", "node1", "128MiB", CALM);
    cluster.shoal.ok(&["stop", "web"]);
}

/// Opens them all and waits until each but a few is refused. Those few, and how many were.
async fn open_imports(endpoint: &str) -> (JoinSet<Code>, usize) {
    let mut calls = JoinSet::new();
    for _ in 0..3 {
        let channel = Channel::from_shared(endpoint.to_owned()).expect("an endpoint");
        let channel = channel.connect().await.expect("connected");
        for _ in 0..STREAMS {
            let mut client = ClusterClient::new(channel.clone());
            calls.spawn(async move {
                let (_silent, parts) = mpsc::channel::<ImportImageRequest>(1);
                let answer = client.import_image(ReceiverStream::new(parts)).await;
                answer.expect_err("nothing was sent").code()
            });
        }
    }
    let mut refused = 0;
    while calls.len() > 4 {
        let code = calls.join_next().await.expect("one").expect("no panic");
        assert_eq!(code, Code::ResourceExhausted);
        refused += 1;
    }
    (calls, refused)
}

/// Connects more than an address may, until some have had to go. All that have not greet, and answer what HTTP/2 asks of them.
async fn gather(address: &str) -> JoinSet<std::io::Result<()>> {
    let mut crowd = JoinSet::new();
    for _ in 0..CROWD {
        let stream = tokio::net::TcpStream::connect(address).await.expect("it listens");
        crowd.spawn(greet_and_answer(stream));
    }
    let first = crowd.join_next().await.expect("a crowd").expect("no panic");
    first.expect_err("its end is the other side's doing");
    assert!(crowd.len() > CROWD / 2, "{} are left", crowd.len());
    crowd
}

/// Does all that a client does but call, until the other side closes the connection.
async fn greet_and_answer(mut stream: tokio::net::TcpStream) -> std::io::Result<()> {
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const ACK: u8 = 1;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    stream.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).await?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let [a, b, c, kind, flags, ..] = head;
        let mut rest = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        stream.read_exact(&mut rest).await?;
        if flags & ACK != 0 {
            continue;
        }
        match kind {
            SETTINGS => stream.write_all(&[0, 0, 0, SETTINGS, ACK, 0, 0, 0, 0]).await?,
            PING => {
                stream.write_all(&[0, 0, 8, PING, ACK, 0, 0, 0, 0]).await?;
                stream.write_all(&rest).await?;
            }
            _ => {}
        }
    }
}
