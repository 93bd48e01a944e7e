//! What is measured, as it goes into the JSON file.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::gap::Gaps;
use crate::millis;

/// Everything.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where and with what.
    pub machine: Machine,
    /// Limit on downtime that both sides were given.
    pub max_downtime_ms: u64,
    /// Whether free memory was left as it was.
    pub cold: bool,
    /// Runs of each case.
    pub runs: u32,
    /// What the machine can do at best.
    pub references: References,
    /// Starting.
    pub startup: Pair<Startup>,
    /// Moving.
    pub cases: Vec<CaseReport>,
}

/// What `cargo xtask bench migrate` measures.
#[derive(Debug, Serialize)]
pub struct MigrateReport {
    /// Where and with what.
    pub machine: Machine,
    /// Limit on downtime that all sides were given.
    pub max_downtime_ms: u64,
    /// Whether free memory was left as it was.
    pub cold: bool,
    /// Most runs of a case.
    pub runs: u32,
    /// What the machine can do at best.
    pub references: References,
    /// One TCP stream over the slow link, in bytes per second.
    pub link: Option<f64>,
    /// Moving.
    pub cases: Vec<CaseReport>,
    /// What was not measured, and why.
    pub skipped: Vec<String>,
    /// How the figures stand against what they are to be.
    pub goals: Vec<Goal>,
}

/// What a figure is to be, and what it is.
#[derive(Debug, Serialize)]
pub struct Goal {
    /// The goal.
    pub goal: String,
    /// What was measured.
    pub measured: String,
    /// `None`: not measured.
    pub met: Option<bool>,
}

/// Shoal, and QEMU if it was asked for and is there.
#[derive(Debug, Serialize)]
pub struct Pair<T> {
    /// Shoal's.
    pub shoal: T,
    /// QEMU's.
    pub qemu: Option<T>,
}

/// The machine.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// CPUs that may be used.
    pub cpus: usize,
    /// As the kernel names it.
    pub cpu_model: String,
    /// Whether it says that it has VT-x or AMD-V. Without, KVM emulates or the machine is a guest itself.
    pub hardware_virtualization: bool,
    /// Version of the host's kernel.
    pub kernel: String,
    /// Load when the measurement began: it should be near 0.
    pub load_average: f64,
    /// First line of `qemu-system-x86_64 --version`.
    pub qemu: Option<String>,
    /// The same of `cloud-hypervisor`.
    pub cloud_hypervisor: Option<String>,
}

/// Rates of the machine, in bytes per second.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct References {
    /// Between pages that have been touched.
    pub memcpy_touched: f64,
    /// Into pages of 4 KiB that have not.
    pub memcpy_fresh: f64,
    /// Into huge pages that have not.
    pub memcpy_fresh_huge: f64,
    /// One stream over loopback, chunks of 1 MiB, into one buffer.
    pub tcp: f64,
    /// The same into fresh memory in huge pages.
    pub tcp_fresh: f64,
    /// The same with one CPU busy, as a guest that never sleeps keeps it.
    pub tcp_fresh_beside_busy_cpu: f64,
    /// As `tcp`, over TLS 1.3.
    pub tls: f64,
}

/// From the start of a process.
#[derive(Debug, Clone, Serialize)]
pub struct Startup {
    /// To the first byte on the guest's console: what was measured, in order.
    pub first_byte_ms: Vec<f64>,
    /// The same through the API (spawn, connect, boot, read the console).
    pub first_byte_by_api_ms: Vec<f64>,
    /// Resident memory beyond that of guest RAM, with the API up.
    pub memory_beyond_guest_bytes: Vec<f64>,
}

/// One case.
#[derive(Debug, Serialize)]
pub struct CaseReport {
    /// Its name.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// What it is part of.
    pub group: &'static str,
    /// The probe's options.
    pub cmdline: &'static str,
    /// Bytes of memory that it filled.
    pub filled: u64,
    /// Who did how well.
    #[serde(flatten)]
    pub sides: Pair<Side>,
    /// Cloud Hypervisor, where it is there.
    pub cloud_hypervisor: Option<Side>,
}

/// All runs of one case by one VMM.
#[derive(Debug, Default, Serialize)]
pub struct Side {
    /// The median of each figure.
    pub median: Option<Figures>,
    /// Runs that went well.
    pub runs: Vec<Run>,
    /// Why others did not.
    pub failures: Vec<String>,
}

impl Side {
    /// Of the outcome of each run.
    pub fn of(outcomes: Vec<anyhow::Result<Run>>) -> Self {
        let mut side = Self::default();
        for outcome in outcomes {
            match outcome {
                Ok(run) => side.runs.push(run),
                Err(error) => side.failures.push(format!("{error:#}")),
            }
        }
        side.median = (!side.runs.is_empty()).then(|| Figures::medians(&side.runs));
        side
    }
}

/// One migration.
#[derive(Debug, Serialize)]
pub struct Run {
    /// What is compared.
    #[serde(flatten)]
    pub figures: Figures,
    /// What the VMM did not do although it was asked to.
    pub not_as_asked: Vec<String>,
    /// What only this VMM tells, in words.
    pub details: Vec<String>,
    /// What the VMM itself reports.
    pub own_report: Value,
}

/// The figures that both sides have.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Figures {
    /// From the request until the guest runs at its destination and the source says so.
    pub total_ms: f64,
    /// vCPU stop to vCPU run.
    pub downtime_ms: f64,
    /// Worst gap that the guest saw from the start until 2 s after the end.
    pub gap_ms: f64,
    /// Of these, before the pause.
    pub gap_source_ms: f64,
    /// The pause, as the guest saw it.
    pub gap_pause_ms: f64,
    /// After it.
    pub gap_destination_ms: f64,
    /// Worst gap that it saw in the 3 s before.
    pub gap_before_ms: f64,
    /// On the wire.
    pub bytes: f64,
    /// Passes over memory.
    pub passes: f64,
    /// CPU time of the source's process without vCPU threads.
    pub cpu_source_s: f64,
    /// CPU time of the destination's.
    pub cpu_destination_s: f64,
    /// Resident memory of the destination beyond that of guest RAM, afterwards.
    pub destination_beyond_guest_bytes: f64,
}

impl Figures {
    /// With gaps alone; what nobody tells is not a number.
    pub fn of(gaps: &Gaps) -> Self {
        let told = |gap: Option<Duration>| gap.map_or(f64::NAN, millis);
        Self {
            total_ms: f64::NAN,
            downtime_ms: f64::NAN,
            gap_ms: millis(gaps.during),
            gap_source_ms: told(gaps.source),
            gap_pause_ms: told(gaps.pause),
            gap_destination_ms: told(gaps.destination),
            gap_before_ms: millis(gaps.before),
            bytes: f64::NAN,
            passes: f64::NAN,
            cpu_source_s: f64::NAN,
            cpu_destination_s: f64::NAN,
            destination_beyond_guest_bytes: f64::NAN,
        }
    }

    /// Of both ends.
    pub fn cpu_s(&self) -> f64 {
        self.cpu_source_s + self.cpu_destination_s
    }

    fn medians(runs: &[Run]) -> Self {
        let of = |figure: fn(&Self) -> f64| {
            median(&runs.iter().map(|run| figure(&run.figures)).collect::<Vec<_>>())
        };
        Self {
            total_ms: of(|figures| figures.total_ms),
            downtime_ms: of(|figures| figures.downtime_ms),
            gap_ms: of(|figures| figures.gap_ms),
            gap_source_ms: of(|figures| figures.gap_source_ms),
            gap_pause_ms: of(|figures| figures.gap_pause_ms),
            gap_destination_ms: of(|figures| figures.gap_destination_ms),
            gap_before_ms: of(|figures| figures.gap_before_ms),
            bytes: of(|figures| figures.bytes),
            passes: of(|figures| figures.passes),
            cpu_source_s: of(|figures| figures.cpu_source_s),
            cpu_destination_s: of(|figures| figures.cpu_destination_s),
            destination_beyond_guest_bytes: of(|figures| figures.destination_beyond_guest_bytes),
        }
    }
}

/// The middle one, or the mean of the middle two, of those that are told; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| !value.is_nan()).collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.as_slice() {
        [] => f64::NAN,
        odd if odd.len() % 2 == 1 => odd[middle],
        even => f64::midpoint(even[middle - 1], even[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!((median(&[4.0, f64::NAN, 2.0, 3.0]) - 3.0).abs() < 1e-9);
        assert!(median(&[]).is_nan());
    }
}
