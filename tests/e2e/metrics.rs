//! What Prometheus is told, against what the history says.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::Value;
use shoal_tests::cluster::{Cluster, Shape, free_port};
use shoal_tests::machine::Machine;
use shoal_tests::moving::Moving;
use shoal_tests::wait::{self, seconds};

use crate::CALM;

#[test]
fn the_metrics_say_what_the_history_says() {
    let Some(machine) = Machine::with_kvm("metrics") else {
        return;
    };
    let mut cluster = Cluster::start(machine, &Shape::default());
    let address = format!("127.0.0.1:{}", free_port());
    cluster.kill_daemon("scheduler");
    cluster.start_daemon_with("scheduler", &[("--metrics", &address)]);
    wait::until_true("both nodes", seconds(30), || {
        ["node1", "node2"]
            .iter()
            .all(|node| cluster.node(node)["state"] == "ready")
    });
    cluster.run_probe("a", "node1", "96MiB", CALM);
    let before = scrape(&address);
    assert_eq!(value(&before, "shoal_migration_downtime_seconds_count"), 0.0);

    let there = cluster.shoal.json(&["migrate", "a", "--to", "node2"]);
    let back = cluster
        .shoal
        .json(&["migrate", "a", "--to", "node1", "--on-stall", "force"]);
    let post_copy = cluster.shoal.json(&[
        "migrate",
        "a",
        "--bandwidth",
        "16MiB",
        "--on-stall",
        "post-copy",
        "--timeout",
        "1ms",
        "--max-downtime",
        "1ms",
    ]);
    let mut moving = Moving::start(&cluster.shoal, "a", &["--bandwidth", "2MiB"]);
    moving.wait_until_sent(1 << 20);
    let open = scrape(&address);
    assert_eq!(value(&open, "shoal_migrations_open{state=\"pre-copy\"}"), 1.0);
    moving.cancel();
    drop(moving.end());

    let text = scrape(&address);
    assert!(text.ends_with("# EOF\n"), "OpenMetrics ends so:\n{text}");
    let ended = |result: &str, on_stall: &str| {
        let labels = format!("result=\"{result}\",cause=\"requested\",on_stall=\"{on_stall}\"");
        value(&text, &format!("shoal_migrations_total{{{labels}}}"))
    };
    for (result, on_stall) in [
        ("completed", "cancel"),
        ("completed", "force"),
        ("completed", "post-copy"),
        ("cancelled", "cancel"),
    ] {
        assert_eq!(ended(result, on_stall), 1.0, "{result} {on_stall} in\n{text}");
    }
    assert_eq!(value(&text, "shoal_migrations_open{state=\"pre-copy\"}"), 0.0);
    let completed = [&there, &back, &post_copy];
    for (name, key, unit) in [
        ("duration_seconds", "total_ms", 1e3),
        ("downtime_seconds", "downtime_ms", 1e3),
        ("bytes", "bytes_sent", 1.0),
    ] {
        let name = format!("shoal_migration_{name}");
        assert_eq!(value(&text, &format!("{name}_count")), 3.0, "{text}");
        assert_eq!(
            value(&text, &format!("{name}_bucket{{le=\"+Inf\"}}")),
            3.0,
            "{text}"
        );
        let sum: f64 = completed.iter().map(|report| figure(report, key) / unit).sum();
        let told = value(&text, &format!("{name}_sum"));
        assert!((told - sum).abs() <= sum * 1e-6, "{name}: {told} is not {sum}");
    }
    assert_eq!(value(&text, "shoal_migration_post_copies_total"), 1.0);
    assert_eq!(
        value(&text, "shoal_migration_faults_total"),
        figure(&post_copy, "faults")
    );
    let worst = value(&text, "shoal_migration_worst_fault_seconds_sum");
    assert!(
        (worst - figure(&post_copy, "worst_fault_ms") / 1e3).abs() < 1e-6,
        "{worst} {post_copy}"
    );
}

fn figure(report: &Value, key: &str) -> f64 {
    report[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} in {report}"))
}

fn scrape(address: &str) -> String {
    let mut stream = wait::until("the metrics to be served", seconds(30), || {
        TcpStream::connect(address).ok()
    });
    stream
        .write_all(
            format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes(),
        )
        .expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(
        head.starts_with("HTTP/1.1 200") && head.contains("application/openmetrics-text"),
        "{head}"
    );
    body.to_owned()
}

/// The value of one series.
fn value(text: &str, series: &str) -> f64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    let line = line.unwrap_or_else(|| panic!("no {series} in\n{text}"));
    line.parse().expect("a number")
}
