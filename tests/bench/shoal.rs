//! Shoal's side: two VMMs, driven as agents drive them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use shoal_proto::vm::{MigrationReport, MigrationResult};
use shoal_tests::guest;
use shoal_tests::vmm::{Vmm, probe_spec};
use tokio::time::timeout;

use crate::case::{Case, MEMORY};
use crate::figures::{Figures, Run};
use crate::memory::Warm;
use crate::process::{cpu_time, memory_beyond_guest, vcpu_time};
use crate::{gap, millis};

const VM: &str = "0b6a3f5e-5df7-4f55-9e5c-8c1f5d1f1a02";
const PATIENCE: Duration = Duration::from_secs(60);

/// Boots a guest, moves it once into memory that was `warm` and looks at it until it has checked all of its memory.
///
/// # Errors
/// If the migration fails or the guest was harmed.
pub async fn run(case: &Case, max_downtime: Duration, warm: Option<Warm>) -> Result<Run> {
    let (mut source, mut destination) = (Vmm::start().await, Vmm::start().await);
    source.boot(probe_spec(VM, 1, MEMORY, case.cmdline)).await;
    let address = destination
        .prepare_incoming(probe_spec(VM, 2, MEMORY, case.cmdline))
        .await;
    let settled = source.follow_console(|text| gap::settled(case, text).is_some());
    let console = timeout(PATIENCE, settled)
        .await
        .context("the guest does not settle")?;
    let before = gap::settled(case, &console).context("the guest is not settled")?;

    let (pids, mut source_vcpus) = ([source.pid(), destination.pid()], 0.0f64);
    let cpu_before = [cpu_time(pids[0])?, cpu_time(pids[1])?];
    drop(warm);
    let start = Instant::now();
    let report = source
        .migrate(address, 2, max_downtime, |_| {
            // The source frees its VM, vCPU threads and all, as soon as it has sent its last word.
            source_vcpus = source_vcpus.max(vcpu_time(pids[0]).unwrap_or(0.0));
        })
        .await;
    let total = start.elapsed();
    let cpu_after = [cpu_time(pids[0])?, cpu_time(pids[1])?];
    ensure!(
        report.result() == MigrationResult::Completed,
        "the migration {}: {}",
        report.result().as_str_name(),
        report.reason
    );

    let seen = destination.follow_console(|text| gap::around(case, text, &before, total).is_some());
    let console = timeout(PATIENCE, seen)
        .await
        .context("no heartbeats after the migration")?;
    guest::check_unharmed(&console).map_err(anyhow::Error::msg)?;
    let gaps = gap::around(case, &console, &before, total).context("the guest is not observed")?;
    let source_cpu = (cpu_after[0].all - cpu_before[0].all) - (source_vcpus - cpu_before[0].vcpus);
    let destination_cpu = (cpu_after[1].all - cpu_before[1].all) - cpu_after[1].vcpus;
    Ok(Run {
        figures: Figures {
            total_ms: millis(total),
            downtime_ms: millis(Duration::from_micros(report.downtime_us)),
            gap_ms: millis(gaps.during),
            gap_before_ms: millis(gaps.before),
            bytes: report.bytes_sent as f64,
            passes: f64::from(report.passes),
            cpu_source_s: source_cpu.max(0.0),
            cpu_destination_s: destination_cpu.max(0.0),
            destination_beyond_guest_bytes: memory_beyond_guest(pids[1], MEMORY)?,
        },
        own_report: own_report(&report),
    })
}

fn own_report(report: &MigrationReport) -> Value {
    let passes: Vec<_> = report
        .pass_table
        .iter()
        .map(|pass| {
            json!({
                "pass": pass.pass,
                "pages": pass.pages,
                "zero_pages": pass.zero_pages,
                "bytes": pass.bytes,
                "duration_us": pass.duration_us,
            })
        })
        .collect();
    json!({
        "total_us": report.total_us,
        "downtime_us": report.downtime_us,
        "downtime_stop_us": report.downtime_stop_us,
        "downtime_pages_us": report.downtime_pages_us,
        "downtime_state_us": report.downtime_state_us,
        "downtime_start_us": report.downtime_start_us,
        "pages_sent": report.pages_sent,
        "zero_pages": report.zero_pages,
        "passes": passes,
    })
}
