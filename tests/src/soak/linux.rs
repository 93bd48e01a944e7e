//! Linux guests: booted again and again, and one that is moved by every policy while its program of checks runs as stress.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use shoal_proto::cluster::MigrateVmRequest;
use shoal_proto::vm::{Compression, MigrationPolicy, MigrationReport, MigrationResult, OnStall, Verify};

use super::chain::count_report;
use super::summary::Summary;
use crate::cluster::{Cluster, Shape};
use crate::guest::{self, StressBeat, tail};
use crate::machine::{Machine, say};
use crate::migration::WatchedMigration;
use crate::wait::{self, seconds};

/// The image whose root has `checks`.
pub const IMAGE: &str = "linux-checks";
const NAME: &str = "stress";
const NODES: [&str; 2] = ["node1", "node2"];
/// How often it is said how it goes.
const PROGRESS_EVERY: u32 = 25;
/// A guest of any kind boots within this time, also where the machine is busy.
const BOOT: Duration = seconds(60);
const MIB: u64 = 1 << 20;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Boots in a row.
    pub boots: u32,
    /// Moves amid stress.
    pub migrations: u32,
    /// How long the stress goes on at least.
    pub minutes: u32,
    /// Decides in which order the checks run.
    pub seed: u64,
}

/// How a guest is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// By the defaults.
    PreCopy,
    /// Slowed down until the link is fast enough.
    Throttle,
    /// It runs at the destination before its memory is there.
    PostCopy,
    /// Stopped, though there is more to send than the limit allows.
    Force,
    /// Over several connections, compressed.
    Lz4,
    /// Compressed better.
    Zstd,
    /// All memory is compared.
    Verify,
    /// Stopped before, and resumed after.
    Suspended,
    /// To a new process on its node, to which its memory is handed over.
    Upgrade,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::PreCopy,
        Self::Throttle,
        Self::PostCopy,
        Self::Upgrade,
        Self::Lz4,
        Self::Suspended,
        Self::Zstd,
        Self::Force,
        Self::Verify,
    ];

    /// How memory is to go; an upgrade has no say in it.
    fn policy(self) -> MigrationPolicy {
        let stalls = |on_stall: OnStall, downtime, timeout, bandwidth| MigrationPolicy {
            on_stall: on_stall.into(),
            max_downtime_ms: Some(downtime),
            timeout_ms: Some(timeout),
            bandwidth_bytes_per_second: Some(bandwidth * MIB),
            ..MigrationPolicy::default()
        };
        // Stress writes at most some hundred MiB a second: the default ends, if not at once.
        let patient = stalls(OnStall::Throttle, 100, 120_000, 0);
        match self {
            Self::PreCopy | Self::Suspended | Self::Upgrade => patient,
            Self::Throttle => stalls(OnStall::Throttle, 10, 120_000, 64),
            Self::PostCopy => stalls(OnStall::PostCopy, 5, 1, 100),
            Self::Force => stalls(OnStall::Force, 1, 500, 128),
            Self::Lz4 => MigrationPolicy {
                compression: Compression::Lz4.into(),
                connections: Some(4),
                ..patient
            },
            Self::Zstd => MigrationPolicy {
                compression: Compression::Zstd.into(),
                ..patient
            },
            Self::Verify => MigrationPolicy {
                verify: Verify::Full.into(),
                ..patient
            },
        }
    }
}

/// Boots, then moves amid stress. Panics at the first thing that is wrong but for boots, which are counted.
#[must_use]
pub fn run(machine: Machine, options: Options) -> (Boots, Summary) {
    let cluster = start_cluster(machine);
    let boots = boot_in_a_row(&cluster, options.boots);
    let mut summary = Summary::default();
    if options.migrations > 0 || options.minutes > 0 {
        let duration = Duration::from_secs(60 * u64::from(options.minutes));
        move_amid_stress(&cluster, options, duration, &mut summary);
    }
    (boots, summary)
}

/// Two nodes whose VMs have memory that can be handed over.
#[must_use]
pub fn start_cluster(machine: Machine) -> Cluster {
    let shape = Shape {
        up: &["--memory-backing", "shared"],
        ..Shape::default()
    };
    Cluster::start(machine, &shape)
}

/// What came of boots in a row.
#[derive(Debug, Clone, Default)]
pub struct Boots {
    /// From asking until the command is back, by those that went well, in ms.
    pub millis: Vec<u64>,
    /// Those that did not: which, and what was seen of them.
    pub failures: Vec<String>,
}

impl fmt::Display for Boots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sorted = self.millis.clone();
        sorted.sort_unstable();
        if let (Some(least), Some(most)) = (sorted.first(), sorted.last()) {
            let (count, median) = (sorted.len(), sorted[sorted.len() / 2]);
            writeln!(
                f,
                "boots: {count} well, {least} / {median} / {most} ms (least, median, most)"
            )?;
        }
        for failure in &self.failures {
            writeln!(f, "{failure}")?;
        }
        write!(f, "boots: {} failed", self.failures.len())
    }
}

/// Each runs a command, whose output and exit status must come back.
#[must_use]
pub fn boot_in_a_row(cluster: &Cluster, boots: u32) -> Boots {
    const STATUS: i32 = 17;
    let mut result = Boots::default();
    for number in 1..=boots {
        let word = format!("up {number}");
        let script = format!("echo {word}; exit {STATUS}");
        let name = format!("boot{number}");
        let start = Instant::now();
        let run = ["run", IMAGE, "--name", &name, "--", "sh", "-c", &script];
        let output = cluster.shoal.output(&run);
        let elapsed = start.elapsed();
        let console = String::from_utf8_lossy(&output.stdout);
        if output.status.code() == Some(STATUS) && console.lines().any(|line| line.trim_end() == word) {
            let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
            result.millis.push(millis);
        } else {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let seen = format!(
                "boot {number} FAILED: {}: {stderr}\n{}",
                output.status,
                tail(&console)
            );
            say(&seen);
            result.failures.push(seen);
        }
        if number.is_multiple_of(PROGRESS_EVERY) || number == boots {
            say(&format!(
                "boots: {number} of {boots}, {} failed",
                result.failures.len()
            ));
        }
    }
    result
}

fn move_amid_stress(cluster: &Cluster, options: Options, duration: Duration, summary: &mut Summary) {
    let stress = Stress::start(cluster, options.seed);
    let start = Instant::now();
    for number in 1..=options.migrations {
        // Spread over all the time.
        let due = duration * number / (options.migrations + 1);
        thread::sleep(due.saturating_sub(start.elapsed()));
        let kind = Kind::ALL[(number as usize - 1) % Kind::ALL.len()];
        stress.go(kind, summary);
        if number.is_multiple_of(PROGRESS_EVERY) || number == options.migrations {
            let beat = stress.newest();
            let of = options.migrations;
            let minutes = start.elapsed().as_secs() / 60;
            say(&format!(
                "amid stress: {number} of {of} moves, {minutes} minutes, {beat:?}"
            ));
        }
    }
    while start.elapsed() < duration {
        thread::sleep(seconds(5).min(duration.saturating_sub(start.elapsed())));
        stress.check();
    }
    let last = stress.end();
    let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    summary.counts.insert("seconds of stress".into(), count(last.n));
    summary
        .counts
        .insert("checks amid stress".into(), count(last.rounds));
}

/// A Linux guest that runs its checks at random until it is stopped.
#[derive(Debug)]
pub struct Stress<'a> {
    cluster: &'a Cluster,
    id: String,
}

impl<'a> Stress<'a> {
    /// Boots it on the first node and waits for its first heartbeats.
    #[must_use]
    pub fn start(cluster: &'a Cluster, seed: u64) -> Self {
        const WEEK: &str = "604800";
        let seed = seed.to_string();
        let run = [
            "run",
            IMAGE,
            "--detach",
            "--name",
            NAME,
            "--prefer-node",
            NODES[0],
            "--",
        ];
        let command = ["checks", "stress", WEEK, &seed];
        let started = cluster.shoal.json(&[&run[..], &command].concat());
        let id = started["id"].as_str().expect("an id").to_owned();
        let stress = Self { cluster, id };
        wait::until_true("the stress to begin", BOOT, || stress.beats().len() >= 2);
        stress
    }

    /// Moves it, and waits until it is seen to go on unharmed. False if it was not moved, and goes on where it was.
    pub fn go(&self, kind: Kind, summary: &mut Summary) -> bool {
        let before = self.cluster.vm(NAME);
        let from = before["node"].as_str().expect("a node").to_owned();
        let other = if from == NODES[0] { NODES[1] } else { NODES[0] };
        let to = if kind == Kind::Upgrade {
            from.as_str()
        } else {
            other
        };
        let moved = match kind {
            Kind::Upgrade => self.upgrade(&from, summary),
            Kind::Suspended => {
                self.cluster.shoal.ok(&["suspend", NAME]);
                let moved = self.migrate(kind, to, summary);
                self.cluster.shoal.ok(&["resume", NAME]);
                moved
            }
            _ => self.migrate(kind, to, summary),
        };
        summary.count(format!("amid stress {kind:?}"));
        let now = self.cluster.wait_for_state(NAME, "running", seconds(60));
        assert_eq!(
            now["node"],
            if moved { to } else { from.as_str() },
            "{kind:?}: {now}"
        );
        assert_eq!(now["epoch"] != before["epoch"], moved, "{kind:?}: {now}");
        let seen = self.newest().n;
        wait::until_true(&format!("heartbeats after {kind:?}"), seconds(90), || {
            self.newest().n >= seen + 2
        });
        self.check();
        let vmm = self.cluster.only_vmm(&self.id);
        summary.hold("VMM", vmm.identity.pid);
        moved
    }

    fn migrate(&self, kind: Kind, to: &str, summary: &mut Summary) -> bool {
        let request = MigrateVmRequest {
            vm: NAME.into(),
            to_node: to.into(),
            policy: Some(kind.policy()),
        };
        let outcome = WatchedMigration::start(self.cluster.shoal.endpoint(), request).outcome();
        let migration = outcome.unwrap_or_else(|error| panic!("{kind:?}: {error}"));
        let report = migration.report.unwrap_or_else(|| panic!("{kind:?}: no report"));
        count_report(&kind.policy(), &report, summary);
        if report.result() != MigrationResult::Completed {
            say(&format!("{kind:?} FAILED: {}", report.reason));
            return false;
        }
        check_report(kind, &report);
        true
    }

    fn upgrade(&self, node: &str, summary: &mut Summary) -> bool {
        let upgraded = self.cluster.shoal.json(&["upgrade", node]);
        let migration = &upgraded["migrations"][0];
        if migration["result"] != "completed" {
            say(&format!("{:?} FAILED: {upgraded}", Kind::Upgrade));
            summary.count("result failed");
            return false;
        }
        assert_eq!(migration["handed_over"], true, "{upgraded}");
        let millis = migration["downtime_ms"].as_f64().expect("a downtime");
        summary.count("result completed");
        summary.downtimes.push(
            Duration::from_secs_f64(millis / 1e3)
                .as_micros()
                .try_into()
                .unwrap_or(0),
        );
        true
    }

    /// Its heartbeats so far.
    #[must_use]
    pub fn beats(&self) -> Vec<StressBeat> {
        guest::stress_beats(&self.cluster.logs(NAME))
    }

    fn newest(&self) -> StressBeat {
        self.beats().pop().expect("a heartbeat")
    }

    /// Nothing has failed, and no heartbeat is missing.
    pub fn check(&self) {
        let console = self.cluster.logs(NAME);
        guest::check_stress(&console).unwrap_or_else(|wrong| panic!("{wrong}"));
        let vm = self.cluster.vm(NAME);
        assert_eq!(vm["state"], "running", "{vm}\n{}", tail(&console));
    }

    /// Checks once more and stops it. Answers its last heartbeat.
    #[must_use]
    pub fn end(self) -> StressBeat {
        self.check();
        let last = self.newest();
        self.cluster.shoal.ok(&["stop", NAME]);
        last
    }
}

/// It has gone as it was asked for.
fn check_report(kind: Kind, report: &MigrationReport) {
    assert!(report.tls, "{kind:?}: {report:?}");
    match kind {
        Kind::PostCopy => assert!(report.post_copy, "{report:?}"),
        Kind::Verify => assert_eq!(report.verified(), Verify::Full, "{report:?}"),
        Kind::Suspended => assert!(report.paused, "{report:?}"),
        Kind::Lz4 | Kind::Zstd => assert!(report.compressed_pages > 0, "{report:?}"),
        Kind::PreCopy | Kind::Throttle | Kind::Force | Kind::Upgrade => {}
    }
}
