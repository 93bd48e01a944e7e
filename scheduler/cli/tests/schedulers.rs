//! Several schedulers with a real etcd, as processes, and what becomes of them when one dies or stands still. No guests.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use serde_json::Value;
use shoal_proto::cluster::cluster_client::ClusterClient;
use shoal_proto::cluster::{ListNodesRequest, ListSchedulersRequest, StreamEventsRequest, UpdateNodeRequest};
use shoal_proto::node::VmRef;
use shoal_proto::node::agent_client::AgentClient;
use shoal_proto::{LEADER_HEADER, TERM_HEADER};
use shoal_tests::machine::say;
use shoal_tests::schedulers::Schedulers;
use shoal_tests::wait::{self, seconds};
use tonic::transport::Channel;
use tonic::{Code, Request};

/// Nodes without guests need none.
const NO_VMM: &[&str] = &["--vmm-binary", "/bin/true", "--memory", "1GiB", "--cpus", "1"];

/// One after the other: their leases are to end when the test says so.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn label(node: &str, label: &str) -> UpdateNodeRequest {
    UpdateNodeRequest {
        node: node.to_owned(),
        set_labels: vec![label.to_owned()],
        ..Default::default()
    }
}

async fn connect(address: &str) -> ClusterClient<Channel> {
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
    ClusterClient::new(endpoint.connect().await.expect("it listens"))
}

fn has_label(node: &Value, label: &str) -> bool {
    node["labels"]
        .as_array()
        .is_some_and(|labels| labels.iter().any(|it| it == label))
}

#[tokio::test(flavor = "multi_thread")]
async fn another_scheduler_leads_when_the_leader_dies() {
    let _turn = TURN.lock().await;
    let Some(mut cluster) = Schedulers::start(3, &["--vmm-binary", "/bin/true"]) else {
        return;
    };
    for node in ["node1", "node2"] {
        cluster.start_agent(node, NO_VMM);
    }
    cluster.wait_for_nodes(&["node1", "node2"]);
    wait::until_true("all to be members", seconds(60), || cluster.list().len() == 3);
    cluster.shoal.ok(&["node", "label", "node1", "zone=a"]);

    // One that follows answers what is stored, and names the leader for the rest.
    let (leader, term) = cluster.wait_for_leader("");
    let mut follower = connect(cluster.address(&cluster.follower())).await;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let nodes = follower.list_nodes(ListNodesRequest {}).await.expect("answered");
        let nodes = nodes.into_inner().nodes;
        if nodes.iter().any(|node| node.labels == ["zone=a"]) {
            break;
        }
        assert!(Instant::now() < deadline, "{nodes:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let refused = follower
        .update_node(label("node1", "zone=b"))
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains(cluster.address(&leader)), "{refused}");
    let named = refused.metadata().get(LEADER_HEADER).expect("the leader");
    assert_eq!(named.to_str().expect("text"), cluster.address(&leader));
    let mut events = follower
        .stream_events(StreamEventsRequest {
            follow: true,
            after_sequence: 0,
        })
        .await
        .expect("a stream")
        .into_inner();
    let updated = async {
        while let Some(event) = events.message().await.expect("an event") {
            if event.kind == "node-updated" {
                return true;
            }
        }
        false
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(30), updated)
            .await
            .expect("in time")
    );

    cluster.kill(&leader);
    let died = Instant::now();
    let (next, next_term) = cluster.wait_for_leader(&leader);
    say(&format!(
        "{next} leads {:.1} s after {leader} was killed",
        died.elapsed().as_secs_f64()
    ));
    assert!(next_term > term);
    cluster.wait_for_nodes(&["node1", "node2"]);
    say(&format!(
        "all agents are back after {:.1} s",
        died.elapsed().as_secs_f64()
    ));
    assert!(has_label(&cluster.node("node1"), "zone=a"));
    cluster.shoal.ok(&["node", "label", "node1", "zone=b"]);
    assert!(has_label(&cluster.node("node1"), "zone=b"));

    // The dead one comes back and follows; one that leaves in order is not waited for.
    cluster.start_scheduler(&leader);
    wait::until_true("it to be a member again", seconds(60), || {
        cluster.list().len() == 3
    });
    assert_eq!(cluster.wait_for_leader("").0, next);
    let left = Instant::now();
    cluster.terminate(&next);
    let (third, third_term) = cluster.wait_for_leader(&next);
    say(&format!(
        "{third} leads {:.1} s after {next} was told to end",
        left.elapsed().as_secs_f64()
    ));
    assert!(third_term > next_term);
    cluster.wait_for_nodes(&["node1", "node2"]);
    assert!(has_label(&cluster.node("node1"), "zone=b"));

    // Out of the cluster into a store of another kind.
    let backup = cluster.directory().join("backup");
    let backup = backup.to_string_lossy();
    cluster.shoal.ok(&["backup", &backup]);
    let alone = cluster.directory().join("alone");
    let alone = alone.to_string_lossy();
    let restored = cluster.shoal.json(&["restore", &backup, "--state-dir", &alone]);
    assert_eq!(restored["nodes"], 2, "{restored}");
    let led = cluster
        .shoal
        .fails(&["restore", &backup, "--store", &cluster.store(), "--force"]);
    assert!(led.stderr.contains("a scheduler leads"), "{led:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stood_still_is_refused_and_steps_down() {
    let _turn = TURN.lock().await;
    let Some(mut cluster) = Schedulers::start(2, &["--vmm-binary", "/bin/true"]) else {
        return;
    };
    cluster.start_agent("node1", NO_VMM);
    cluster.wait_for_nodes(&["node1"]);
    let (old, old_term) = cluster.wait_for_leader("");
    let mut to_old = connect(cluster.address(&old)).await;
    to_old
        .update_node(label("node1", "zone=a"))
        .await
        .expect("it leads");

    cluster.pause(&old);
    let stopped = Instant::now();
    // Waits in the socket of the one that stands still, and is the first thing that it does when it goes on.
    let late = tokio::spawn({
        let mut to_old = to_old.clone();
        async move { to_old.update_node(label("node1", "zone=late")).await }
    });
    let (new, new_term) = cluster.wait_for_leader(&old);
    say(&format!(
        "{new} leads {:.1} s after {old} was stopped",
        stopped.elapsed().as_secs_f64()
    ));
    assert!(new_term > old_term);
    cluster.wait_for_nodes(&["node1"]);
    cluster.shoal.ok(&["node", "label", "node1", "zone=b"]);

    cluster.resume(&old);
    let late = tokio::time::timeout(Duration::from_secs(60), late).await;
    let refused = late.expect("an answer").expect("no panic").expect_err("refused");
    say(&format!(
        "the late write: {:?}: {}",
        refused.code(),
        refused.message()
    ));
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        // Its connections end with its lead.
        let listed = connect(cluster.address(&old))
            .await
            .list_schedulers(ListSchedulersRequest {})
            .await;
        let own = listed.ok().and_then(|listed| {
            let all = listed.into_inner().schedulers;
            all.into_iter().find(|scheduler| scheduler.answers)
        });
        if own.is_some_and(|own| !own.leads) {
            break;
        }
        assert!(Instant::now() < deadline, "it steps down: {}", cluster.log(&old));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let log = cluster.log(&old);
    assert!(log.contains("deposed"), "{log}");
    let node = cluster.node("node1");
    assert!(
        has_label(&node, "zone=b") && !has_label(&node, "zone=late"),
        "{node}"
    );
    assert_eq!(cluster.wait_for_leader("").0, new);

    // The agent has heard of the new term, and obeys the old one no more.
    let address = node["address"].as_str().expect("an address");
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
    let mut agent = AgentClient::new(endpoint.connect().await.expect("it listens"));
    for (term, code) in [(old_term, Code::FailedPrecondition), (new_term, Code::NotFound)] {
        let mut request = Request::new(VmRef {
            vm_id: uuid::Uuid::new_v4().to_string(),
            epoch: 1,
        });
        request.metadata_mut().insert(TERM_HEADER, term.into());
        let answer = agent.describe_vm(request).await.expect_err("there is no such VM");
        assert_eq!(answer.code(), code, "{answer}");
    }
}
