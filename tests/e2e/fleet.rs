//! Hundreds of agents in one process report to a real scheduler. The load test of the benchmark, small and without a clock.

use std::future::Future;

use shoal_tests::fleet::{Fleet, Scheduler, Size};
use shoal_tests::machine::Machine;
use tokio::time::{Duration, sleep, timeout};

const SIZE: Size = Size { agents: 200, vms: 5 };
const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

fn on_runtime(body: impl Future<Output = ()>) {
    let _machine = Machine::shared();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(body);
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waits = async {
        while !condition().await {
            sleep(POLL).await;
        }
    };
    assert!(timeout(LIMIT, waits).await.is_ok(), "in vain: {what}");
}

async fn ready(scheduler: &Scheduler) -> usize {
    let nodes = scheduler.nodes().await.expect("nodes");
    let live = |node: &&shoal_proto::cluster::Node| {
        node.liveness() == shoal_proto::cluster::Liveness::Live && node.cpu_use > 0.0 && node.vms == 5
    };
    nodes.iter().filter(live).count()
}

#[test]
fn two_hundred_agents_report_lose_reports_and_are_relieved() {
    on_runtime(async {
        let (fleet, scheduler) = Fleet::start(SIZE).await.expect("started");
        until("all are live", async || ready(&scheduler).await == SIZE.agents).await;
        let reported = fleet.reported();
        assert!(reported.wholes >= 200);
        until("deltas", async || fleet.reported().deltas >= 400).await;
        let reported = fleet.reported();
        assert!(reported.bytes < reported.bytes_if_whole, "{reported:?}");

        // Every agent loses a report, of which few are followed by a whole one anyway: the others are asked for one.
        let gaps = r#"shoal_reports_total{kind="gap"}"#;
        fleet.lose_a_report_each();
        until("gaps were noticed", async || {
            scheduler.metric(gaps).expect("metrics") >= 150.0
        })
        .await;
        let gaps_before = scheduler.metric(gaps).expect("metrics");
        let deltas = r#"shoal_reports_total{kind="delta"}"#;
        let before = scheduler.metric(deltas).expect("metrics");
        until("deltas again", async || {
            scheduler.metric(deltas).expect("metrics") >= before + 400.0
        })
        .await;
        let gaps_after = scheduler.metric(gaps).expect("metrics");
        assert!(
            gaps_after - gaps_before < 150.0,
            "it is mended: {gaps_before} and {gaps_after}"
        );

        for node in [3, 77, 150] {
            fleet.overload(node);
        }
        until("VMs leave overloaded nodes", async || fleet.overloaded() == 0).await;
        assert_eq!(fleet.latencies().len(), 3);
        // Whatever moved, each VM runs once.
        until("no VM is lost or runs twice", async || {
            fleet.running() == (1000, 1000)
        })
        .await;
        fleet.stop().await;
    });
}

#[test]
fn agents_that_fall_silent_are_suspect_and_then_lost() {
    on_runtime(async {
        let small = Size { agents: 3, vms: 1 };
        let (fleet, scheduler) = Fleet::start(small).await.expect("started");
        let liveness = async || -> Vec<shoal_proto::cluster::Liveness> {
            let nodes = scheduler.nodes().await.expect("nodes");
            nodes.iter().map(shoal_proto::cluster::Node::liveness).collect()
        };
        use shoal_proto::cluster::Liveness::{Live, Lost, Suspect};
        until("all are live", async || {
            liveness().await == [Live; 3] && fleet.reported().deltas > 0
        })
        .await;
        fleet.stop().await;
        until("all are suspect", async || liveness().await == [Suspect; 3]).await;
        until("all are lost", async || liveness().await == [Lost; 3]).await;
        let vms = scheduler.nodes().await.expect("nodes");
        assert!(vms.iter().all(|node| node.vms == 1), "their VMs are still theirs");
    });
}
