//! What is counted of migrations and reports, and what nodes and VMs are like, for Prometheus.

pub mod http;
mod observed;

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use shoal_proto::cluster;
use shoal_proto::vm::{MigrationReport, MigrationResult, OnStall};

use crate::scheduler::Scheduler;

use observed::ObservedMetrics;

/// A word out of a fixed set.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Word(&'static str);

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        EncodeLabelValue::encode(&self.0, encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    result: Word,
    cause: Word,
    on_stall: Word,
}

/// What came of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportKind {
    /// It was whole.
    Whole,
    /// It said what had changed.
    Delta,
    /// It said what had changed since one that did not come.
    Gap,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfReport {
    kind: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Open {
    state: Word,
}

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    observed: ObservedMetrics,
    reports: Family<OfReport, Counter>,
    planning: Histogram,
    ended: Family<Ended, Counter>,
    open: Family<Open, Gauge>,
    duration: Histogram,
    downtime: Histogram,
    guest_gap: Histogram,
    bytes: Histogram,
    throttle: Histogram,
    throttled: Counter<f64, AtomicU64>,
    post_copies: Counter,
    faults: Counter,
    worst_fault: Histogram,
    recoveries: Counter,
    preemptions: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        // From 0.1 ms to 1.6 s, and from 10 ms to 11 min.
        let pauses = || Histogram::new(exponential_buckets(1e-4, 2.0, 15));
        let mut metrics = Self {
            registry: Registry::default(),
            observed: ObservedMetrics::default(),
            reports: Family::default(),
            // From 1 ms to 16 s.
            planning: Histogram::new(exponential_buckets(1e-3, 2.0, 15)),
            ended: Family::default(),
            open: Family::default(),
            duration: Histogram::new(exponential_buckets(1e-2, 2.0, 17)),
            downtime: pauses(),
            guest_gap: pauses(),
            bytes: Histogram::new(exponential_buckets(1_048_576.0, 4.0, 11)),
            throttle: Histogram::new((1..=10).map(|step| f64::from(step) * 10.0)),
            throttled: Counter::default(),
            post_copies: Counter::default(),
            faults: Counter::default(),
            worst_fault: pauses(),
            recoveries: Counter::default(),
            preemptions: Counter::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = self.registry.sub_registry_with_prefix("shoal");
        self.observed.register(registry);
        let reports = "Reports of agents";
        registry.register("reports", reports, self.reports.clone());
        let planning = "A look at the cluster, and a plan";
        registry.register("planning_seconds", planning, self.planning.clone());
        let ended = "Migrations that have ended";
        registry.register("migrations", ended, self.ended.clone());
        let open = "Migrations under way";
        registry.register("migrations_open", open, self.open.clone());
        for (name, help, histogram) in [
            (
                "migration_duration_seconds",
                "From start to end, of completed migrations",
                &self.duration,
            ),
            (
                "migration_downtime_seconds",
                "vCPU stop to vCPU run, of completed migrations",
                &self.downtime,
            ),
            (
                "migration_guest_gap_seconds",
                "Longest time in which a guest saw no time pass, where it says so",
                &self.guest_gap,
            ),
            (
                "migration_bytes",
                "On the wire, of completed migrations",
                &self.bytes,
            ),
            (
                "migration_max_throttle_percent",
                "The most vCPU time taken from a guest, where any was",
                &self.throttle,
            ),
            (
                "migration_worst_fault_seconds",
                "Longest wait of a guest for a page in post-copy",
                &self.worst_fault,
            ),
        ] {
            registry.register(name, help, histogram.clone());
        }
        let throttled = "vCPU time taken from guests";
        registry.register("migration_throttled_seconds", throttled, self.throttled.clone());
        for (name, help, counter) in [
            (
                "migration_post_copies",
                "Migrations that went on in post-copy",
                &self.post_copies,
            ),
            (
                "migration_faults",
                "Pages that guests waited for in post-copy",
                &self.faults,
            ),
            (
                "migration_recoveries",
                "Connections lost and made again in post-copy",
                &self.recoveries,
            ),
            (
                "preemptions",
                "VMs stopped for one of higher priority",
                &self.preemptions,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
    }

    /// Counts a migration that has ended.
    pub fn count(&self, migration: &cluster::Migration) {
        let Some(report) = &migration.report else { return };
        let labels = Ended {
            result: result(report.result()),
            cause: cause(&migration.reason),
            on_stall: on_stall(migration.policy.unwrap_or_default().on_stall()),
        };
        self.ended.get_or_create(&labels).inc();
        self.count_side_effects(report);
        // The figures of a report that was lost are all zero.
        if report.result() == MigrationResult::Completed && report.passes > 0 {
            self.duration.observe(seconds(report.total_us));
            if !report.paused {
                self.downtime.observe(seconds(report.downtime_us));
            }
            self.bytes.observe(bytes(report.bytes_sent));
        }
    }

    /// Counts a round of planning.
    pub fn count_planning(&self, took: std::time::Duration) {
        self.planning.observe(took.as_secs_f64());
    }

    /// Counts VMs that are stopped for another.
    pub fn count_preemptions(&self, vms: usize) {
        self.preemptions.inc_by(u64::try_from(vms).unwrap_or(u64::MAX));
    }

    /// Counts a report.
    pub fn count_report(&self, kind: ReportKind) {
        let kind = Word(match kind {
            ReportKind::Whole => "whole",
            ReportKind::Delta => "delta",
            ReportKind::Gap => "gap",
        });
        self.reports.get_or_create(&OfReport { kind }).inc();
    }

    /// Counts what a guest missed, in microseconds: that is known a while after its migration.
    pub fn count_guest_gap(&self, us: u64) {
        self.guest_gap.observe(seconds(us));
    }

    fn count_side_effects(&self, report: &MigrationReport) {
        if report.max_throttle_percent > 0 {
            self.throttle.observe(f64::from(report.max_throttle_percent));
            self.throttled.inc_by(seconds(report.throttled_us));
        }
        if report.post_copy {
            self.post_copies.inc();
            self.faults.inc_by(report.faults);
            self.worst_fault.observe(seconds(report.worst_fault_us));
            self.recoveries.inc_by(u64::from(report.recoveries));
        }
    }

    /// All of it as text, in the OpenMetrics format.
    fn text(&self, scheduler: &Scheduler) -> String {
        let states = ["pre-copy", "post-copy", "link-lost", "in-doubt"];
        let mut counts = states.map(|state| (state, 0));
        for open in scheduler.migrations.list() {
            let view = open.view();
            let state = match (view.in_doubt.is_some(), view.post_copy, view.link_lost) {
                (true, ..) => "in-doubt",
                (_, true, true) => "link-lost",
                (_, true, false) => "post-copy",
                _ => "pre-copy",
            };
            for (name, count) in &mut counts {
                *count += i64::from(*name == state);
            }
        }
        for (state, count) in counts {
            let labels = Open { state: Word(state) };
            self.open.get_or_create(&labels).set(count);
        }
        self.observed.set(scheduler);
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

fn seconds(us: u64) -> f64 {
    std::time::Duration::from_micros(us).as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "to be put in a bucket")]
fn bytes(count: u64) -> f64 {
    count as f64
}

fn result(result: MigrationResult) -> Word {
    Word(match result {
        MigrationResult::Completed => "completed",
        MigrationResult::Cancelled => "cancelled",
        MigrationResult::InDoubt => "in-doubt",
        MigrationResult::Failed | MigrationResult::Unspecified => "failed",
    })
}

fn on_stall(on_stall: OnStall) -> Word {
    Word(match on_stall {
        OnStall::Throttle => "throttle",
        OnStall::PostCopy => "post-copy",
        OnStall::Cancel => "cancel",
        OnStall::Force => "force",
        OnStall::Unspecified => "unknown",
    })
}

/// By the first word of why it was asked for.
fn cause(reason: &str) -> Word {
    let known = [
        "requested",
        "usher",
        "drain",
        "rules",
        "rebalance",
        "swap",
        "pack",
        "expel",
        "bring",
    ];
    let found = known.into_iter().find(|word| reason.starts_with(word));
    Word(found.unwrap_or("found"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Cluster;

    #[tokio::test]
    async fn migrations_are_counted_by_result_cause_and_policy() {
        let cluster = Cluster::start(1, 1 << 30).await;
        let metrics = Metrics::default();
        let report = MigrationReport {
            result: MigrationResult::Completed.into(),
            passes: 3,
            total_us: 1_500_000,
            downtime_us: 2_000,
            bytes_sent: 5 << 20,
            max_throttle_percent: 40,
            throttled_us: 500_000,
            post_copy: true,
            faults: 7,
            ..Default::default()
        };
        let mut migration = cluster::Migration {
            reason: "usher: node1 runs out of memory".to_owned(),
            policy: Some(shoal_proto::vm::MigrationPolicy {
                on_stall: OnStall::Throttle.into(),
                ..Default::default()
            }),
            report: Some(report),
            ..Default::default()
        };
        metrics.count(&migration);
        migration.report = Some(MigrationReport {
            result: MigrationResult::Cancelled.into(),
            ..Default::default()
        });
        metrics.count(&migration);
        metrics.count_guest_gap(2_100);
        metrics.count_preemptions(2);
        let text = metrics.text(&cluster.scheduler);
        for line in [
            r#"shoal_migrations_total{result="completed",cause="usher",on_stall="throttle"} 1"#,
            r#"shoal_migrations_total{result="cancelled",cause="usher",on_stall="throttle"} 1"#,
            r#"shoal_migrations_open{state="pre-copy"} 0"#,
            "shoal_migration_duration_seconds_sum 1.5",
            "shoal_migration_downtime_seconds_count 1",
            "shoal_migration_guest_gap_seconds_count 1",
            r#"shoal_migration_max_throttle_percent_bucket{le="40.0"} 1"#,
            "shoal_migration_throttled_seconds_total 0.5",
            "shoal_migration_faults_total 7",
            "shoal_preemptions_total 2",
            "# EOF",
        ] {
            assert!(text.contains(line), "no {line} in\n{text}");
        }
    }
}
