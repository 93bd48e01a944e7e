//! What is kept of migrations, and how it is shown.

use serde_json::Value;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::moving::Moving;
use shoal_tests::wait::{self, seconds};

use crate::CALM;

/// Of every migration, wherever it is shown.
const KEYS: [&str; 22] = [
    "id",
    "started_at",
    "policy",
    "vm",
    "vm_id",
    "from",
    "to",
    "epoch",
    "result",
    "reason",
    "downtime_ms",
    "downtime_stop_ms",
    "downtime_pages_ms",
    "downtime_state_ms",
    "downtime_start_ms",
    "total_ms",
    "passes",
    "bytes_sent",
    "pages_sent",
    "zero_pages",
    "tls",
    "suspended",
];

#[test]
fn the_history_tells_of_every_migration_and_outlives_the_scheduler_and_the_vm() {
    let Some(machine) = Machine::with_kvm("a history of migrations") else {
        return;
    };
    let shape = Shape {
        nodes: 3,
        node_memory: "512MiB",
        ..Shape::default()
    };
    let mut cluster = Cluster::start(machine, &shape);
    assert_eq!(list(&cluster, &[]), Vec::<Value>::new());
    let vm = cluster.run_probe("a", "node1", "96MiB", CALM);
    cluster.run_probe("b", "node1", "96MiB", CALM);

    let completed = cluster.shoal.json(&["migrate", "a", "--to", "node2"]);
    let gap = wait::until("the guest to have told what it missed", seconds(30), || {
        cluster.shoal.json(&["migrations", "--vm", "a"])[0]["guest_gap_ms"].as_f64()
    });
    assert!(gap > 0.0, "no move is unseen by the guest");
    let completed = with_gap(completed, gap);
    let mut moving = Moving::start(&cluster.shoal, "a", &["--to", "node1", "--bandwidth", "4MiB"]);
    let running = moving.wait_until_sent(1 << 20);
    assert_eq!(running["result"], "running", "{running}");
    let listed = list(&cluster, &["--running"]);
    assert_eq!((listed.len(), &listed[0]["id"]), (1, &running["id"]));
    moving.cancel();
    let cancelled = moving.end();
    assert_eq!(
        (cancelled.code, &cancelled.report["result"]),
        (1, &"cancelled".into())
    );
    let failed = cluster.shoal.output(&[
        "-o",
        "json",
        "migrate",
        "b",
        "--to",
        "node3",
        "--bandwidth",
        "4MiB",
        "--timeout",
        "1s",
    ]);
    assert_eq!(failed.status.code(), Some(1));
    let failed: Value = serde_json::from_slice(&failed.stdout).expect("a report");
    assert!(
        failed["result"] == "failed"
            && failed["reason"]
                .as_str()
                .is_some_and(|why| why.contains("timed out after") && why.contains("--timeout")),
        "the reason should say that the time was up, and what allows more: {failed}"
    );

    let all = list(&cluster, &[]);
    assert_eq!(all, [failed.clone(), cancelled.report.clone(), completed.clone()]);
    for migration in &all {
        for key in KEYS {
            assert!(!migration[key].is_null(), "'{key}' is missing in {migration}");
        }
        for key in [
            "max_downtime_ms",
            "timeout_ms",
            "on_stall",
            "bandwidth_bytes_per_second",
        ] {
            assert!(
                !migration["policy"][key].is_null(),
                "'{key}' is missing in {migration}"
            );
        }
        let started = migration["started_at"].as_str().expect("text");
        assert!(
            started.len() == 24 && started.ends_with('Z'),
            "RFC 3339: {started}"
        );
    }
    assert_eq!(failed["policy"]["timeout_ms"], 1000);
    assert_eq!(completed["tls"], true, "`shoal up` makes certificates");

    for (filter, expected) in [
        (&["--vm", "a"][..], &all[1..]),
        (&["--vm", &vm], &all[1..]),
        (&["--vm", "b"], &all[..1]),
        (&["--node", "node3"], &all[..1]),
        (&["--node", "node2"], &all[1..]),
        (&["--node", "node1"], &all[..]),
        (&["--node", "node2", "--vm", "b"], &[]),
        (&["--running"], &[]),
        (&["--limit", "2"], &all[..2]),
    ] {
        assert_eq!(list(&cluster, filter), expected, "{filter:?}");
    }
    for unknown in [["--vm", "nobody"], ["--node", "node9"]] {
        let refusal = cluster.shoal.fails(&[&["migrations"][..], &unknown].concat());
        assert_eq!(
            (refusal.code, &refusal.json["error"]["kind"]),
            (1, &"not-found".into()),
            "{unknown:?}: {refusal:?}"
        );
    }
    for limit in ["0", "100000"] {
        let refusal = cluster.shoal.fails(&["migrations", "--limit", limit]);
        assert_eq!(refusal.code, 2, "{refusal:?}");
        assert!(refusal.stderr.contains("1..=1000"), "{refusal:?}");
    }
    let table = cluster.shoal.ok(&["migrations"]);
    for word in ["ID", "completed", "cancelled", "failed", "node3"] {
        assert!(table.contains(word), "no {word} in\n{table}");
    }

    cluster.kill_daemon("scheduler");
    cluster.start_daemon("scheduler");
    assert_eq!(list(&cluster, &[]), all, "after a restart of the scheduler");
    cluster.wait_for_state("a", "running", seconds(30));
    guest::assert_unharmed(&cluster.logs("a"));
    cluster.shoal.ok(&["rm", "--force", "a"]);
    assert_eq!(list(&cluster, &["--vm", "a"]), all[1..], "when the VM is gone");
    assert_eq!(list(&cluster, &["--vm", &vm]), all[1..], "when the VM is gone");
    shows_each_whole(&cluster, &all);
}

fn shows_each_whole(cluster: &Cluster, all: &[Value]) {
    for migration in all {
        let id = migration["id"].as_str().expect("text");
        let shown = cluster.shoal.json(&["migrations", "show", &id[..8]]);
        for (key, value) in migration.as_object().expect("an object") {
            assert_eq!(&shown[key], value, "'{key}' in {shown}");
        }
        assert!(
            !shown["samples"].as_array().expect("a list").is_empty(),
            "{shown}"
        );
        let text = cluster.shoal.ok(&["migrations", "show", id]);
        let result = migration["result"].as_str().expect("text");
        for word in [id, result, "downtime:", "policy:", "on stall cancel"] {
            assert!(text.contains(word), "no {word} in\n{text}");
        }
    }
    let completed = &all[2];
    let id = completed["id"].as_str().expect("text");
    let shown = cluster.shoal.json(&["migrations", "show", id]);
    let passes = shown["pass_table"].as_array().expect("a list");
    assert_eq!(u64::try_from(passes.len()).ok(), completed["passes"].as_u64());
    let pages: u64 = passes.iter().filter_map(|pass| pass["pages"].as_u64()).sum();
    assert_eq!(Some(pages), completed["pages_sent"].as_u64(), "{shown}");
    for (unknown, kind) in [
        ("00000000", "not-found"),
        ("zzz", "not-found"),
        ("", "invalid-argument"),
    ] {
        let refusal = cluster.shoal.fails(&["migrations", "show", unknown]);
        assert_eq!(
            (refusal.code, &refusal.json["error"]["kind"]),
            (1, &kind.into()),
            "{unknown}: {refusal:?}"
        );
    }
}

#[test]
fn the_life_of_a_migration_is_drawn_as_a_picture_that_can_be_read() {
    let Some(machine) = Machine::with_kvm("a plot of a migration") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let args = "fill=64MiB wss=24MiB rate=3000 pattern=random";
    cluster.run_probe("drawn", "node1", "96MiB", args);
    let report = cluster.shoal.json(&[
        "migrate",
        "drawn",
        "--to",
        "node2",
        "--bandwidth",
        "24MiB",
        "--max-downtime",
        "30ms",
        "--on-stall",
        "throttle",
    ]);
    assert_eq!(report["result"], "completed", "{report}");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("life.svg");
    let id = report["id"].as_str().expect("text");
    cluster
        .shoal
        .ok(&["migrations", "show", id, "--plot", &file.to_string_lossy()]);

    let svg = std::fs::read_to_string(&file).expect("the picture");
    let picture = roxmltree::Document::parse(&svg).expect("well-formed XML");
    let root = picture.root_element();
    assert_eq!(
        (root.tag_name().name(), root.tag_name().namespace()),
        ("svg", Some("http://www.w3.org/2000/svg"))
    );
    let words: Vec<&str> = root
        .descendants()
        .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "text")))
        .filter_map(|node| node.text())
        .collect();
    for word in [
        "rate",
        "dirty rate",
        "remaining",
        "throttle",
        "pre-copy",
        "MiB/s",
        "seconds since the start",
    ] {
        assert!(words.contains(&word), "no {word} in {words:?}");
    }
    assert!(
        words.iter().any(|word| word.starts_with("drawn: node1 to node2")),
        "{words:?}"
    );
    let shown = cluster.shoal.json(&["migrations", "show", id]);
    let samples = shown["samples"].as_array().expect("a list").len();
    let (width, height) = (number(root, "width"), number(root, "height"));
    let lines: Vec<Vec<(f64, f64)>> = root
        .descendants()
        .filter_map(|node| node.attribute("points"))
        .map(points)
        .collect();
    assert_eq!(lines.len(), 4, "rate, dirty rate, remaining, throttle");
    for line in &lines {
        assert!(
            line.len() >= samples,
            "{} points of {samples} samples",
            line.len()
        );
        assert!(
            line.windows(2).all(|pair| pair[0].0 <= pair[1].0),
            "time goes on: {line:?}"
        );
        for &(x, y) in line {
            assert!(
                (0.0..=width).contains(&x) && (0.0..=height).contains(&y),
                "{x}, {y}"
            );
        }
    }
    for (line, what) in [(0, "rate"), (1, "dirty rate"), (2, "remaining")] {
        let flat = lines[line]
            .windows(2)
            .all(|pair| (pair[0].1 - pair[1].1).abs() < 0.1);
        assert!(!flat, "{what} never changes");
    }
}

fn list(cluster: &Cluster, more: &[&str]) -> Vec<Value> {
    let listed = cluster.shoal.json(&[&["migrations"], more].concat());
    listed.as_array().expect("a list").clone()
}

/// The report with what the guest told after it.
fn with_gap(mut report: Value, gap: f64) -> Value {
    report["guest_gap_ms"] = gap.into();
    report
}

fn number(node: roxmltree::Node<'_, '_>, attribute: &str) -> f64 {
    let value = node.attribute(attribute).expect("the attribute");
    value.parse().expect("a number")
}

fn points(text: &str) -> Vec<(f64, f64)> {
    let point = |pair: &str| {
        let (x, y) = pair.split_once(',').expect("two numbers");
        (x.parse().expect("a number"), y.parse().expect("a number"))
    };
    text.split(' ').map(point).collect()
}
