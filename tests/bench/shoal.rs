//! Shoal's side: two VMMs, driven as agents drive them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use shoal_proto::vm::{
    BootRequest, Compression, MemoryBacking, MigrationPass, MigrationPolicy, MigrationReport,
    MigrationResult, OnStall, PrepareIncomingRequest, StartMigrationRequest, Verify, VmSpec,
};
use shoal_tests::guest;
use shoal_tests::vmm::{Vmm, incoming, outgoing, probe_spec};
use tokio::time::timeout;

use crate::case::{Case, POST_COPY_BANDWIDTH, Settings};
use crate::figures::{Figures, Run};
use crate::gap::{self, Timeline};
use crate::memory::Warm;
use crate::millis;
use crate::place::{DESTINATION, Place, SOURCE};
use crate::process::{VcpuWatch, cpu_time, memory_beyond_guest};

const VM: &str = "0b6a3f5e-5df7-4f55-9e5c-8c1f5d1f1a02";
const MIB: f64 = (1u64 << 20) as f64;

/// Boots a guest, moves it once into memory that was `warm` and looks at it until it has checked all of its memory.
///
/// # Errors
/// If the migration fails or the guest was harmed.
pub async fn run(
    case: &Case,
    place: &Place,
    max_downtime: Duration,
    patience: Duration,
    warm: Option<Warm>,
) -> Result<Run> {
    let mut source = Vmm::start_under(&place.words(case, SOURCE)).await;
    let mut destination = Vmm::start_under(&place.words(case, DESTINATION)).await;
    let spec = Some(spec(case, 1));
    source.client.boot(BootRequest { spec }).await?;
    let listen = listen_address(case, place, &destination);
    let address = destination.prepare(arriving(case, place, listen)).await?;
    let request = leaving(case, place, address, max_downtime);
    let settled = source.follow_console(|text| gap::settled(case, text).is_some());
    let console = timeout(patience, settled)
        .await
        .context("the guest does not settle")?;
    let heard = Instant::now();
    let before = gap::settled(case, &console).context("the guest is not settled")?;

    let pids = [source.pid(), destination.pid()];
    drop(warm);
    // The source frees its VM, vCPU threads and all, as soon as it has sent its last word.
    let watch = VcpuWatch::start(pids[0])?;
    let cpu_before = [cpu_time(pids[0])?, cpu_time(pids[1])?];
    let start = Instant::now();
    let report = timeout(patience, source.migrate_with(request, |_| ())).await;
    let total = start.elapsed();
    let source_vcpus = watch.end();
    let cpu_after = [cpu_time(pids[0])?, cpu_time(pids[1])?];
    let report = report.context("the migration does not end")??;
    ensure!(
        report.result() == MigrationResult::Completed,
        "the migration {}: {}",
        report.result().as_str_name(),
        report.reason
    );

    let paused_at = report
        .total_us
        .saturating_sub(report.post_copy_us + report.downtime_us);
    let downtime = Duration::from_micros(report.downtime_us);
    let timeline = Timeline {
        before,
        asked_after: start - heard,
        pause: Some((Duration::from_micros(paused_at), downtime)),
        total,
    };
    let seen = destination.follow_console(|text| gap::around(case, text, &timeline).is_some());
    let console = timeout(patience, seen)
        .await
        .context("no heartbeats after the migration")?;
    guest::check_unharmed(&console).map_err(anyhow::Error::msg)?;
    let gaps = gap::around(case, &console, &timeline).context("the guest is not observed")?;
    let source_cpu = (cpu_after[0].all - cpu_before[0].all) - (source_vcpus - cpu_before[0].vcpus);
    let destination_cpu = (cpu_after[1].all - cpu_before[1].all) - cpu_after[1].vcpus;
    Ok(Run {
        figures: Figures {
            total_ms: millis(total),
            downtime_ms: millis(downtime),
            bytes: report.bytes_sent as f64,
            passes: f64::from(report.passes),
            cpu_source_s: source_cpu.max(0.0),
            cpu_destination_s: destination_cpu.max(0.0),
            destination_beyond_guest_bytes: memory_beyond_guest(pids[1])?,
            ..Figures::of(&gaps)
        },
        not_as_asked: not_as_asked(&case.settings, &report),
        details: details(&report),
        own_report: own_report(&report),
    })
}

fn spec(case: &Case, epoch: u64) -> VmSpec {
    let backing = if case.settings.handover {
        MemoryBacking::Shared
    } else {
        MemoryBacking::Auto
    };
    VmSpec {
        memory_backing: backing.into(),
        ..probe_spec(VM, epoch, case.memory, case.cmdline)
    }
}

fn listen_address(case: &Case, place: &Place, destination: &Vmm) -> String {
    if case.settings.handover {
        let path = destination.directory().join("migration.sock");
        return format!("unix:{}", path.display());
    }
    format!("{}:0", place.address(case))
}

fn arriving(case: &Case, place: &Place, listen_address: String) -> PrepareIncomingRequest {
    let tls = case.settings.tls;
    PrepareIncomingRequest {
        listen_address,
        tls: tls.then(|| place.certificates.tls(DESTINATION, SOURCE)),
        ..incoming(spec(case, 2))
    }
}

fn leaving(case: &Case, place: &Place, address: String, max_downtime: Duration) -> StartMigrationRequest {
    let settings = &case.settings;
    let request = outgoing(address, 2, max_downtime);
    let on_stall = if settings.post_copy {
        OnStall::PostCopy
    } else {
        OnStall::Unspecified
    };
    StartMigrationRequest {
        policy: Some(MigrationPolicy {
            connections: Some(settings.connections),
            compression: settings.compression.into(),
            verify: settings.verify.into(),
            on_stall: on_stall.into(),
            bandwidth_bytes_per_second: settings.post_copy.then_some(POST_COPY_BANDWIDTH),
            ..request.policy.unwrap_or_default()
        }),
        tls: settings.tls.then(|| place.certificates.tls(SOURCE, DESTINATION)),
        ..request
    }
}

/// In what the migration differs from what was asked for: it must not pass for that.
fn not_as_asked(settings: &Settings, report: &MigrationReport) -> Vec<String> {
    let compress = matches!(settings.compression, Compression::Lz4 | Compression::Zstd);
    let verify = ![Verify::Unspecified, Verify::Off].contains(&settings.verify);
    let wrong = [
        (settings.tls && !report.tls, "without TLS"),
        (
            settings.handover && !report.handed_over,
            "memory was copied, not handed over",
        ),
        (settings.post_copy && !report.post_copy, "without post-copy"),
        (
            verify && report.verified() != settings.verify,
            "memory was not compared",
        ),
        (compress && report.compressed_pages == 0, "no page was compressed"),
    ];
    let mut notes: Vec<String> = wrong
        .iter()
        .filter(|(wrong, _)| *wrong)
        .map(|(_, what)| (*what).to_owned())
        .collect();
    let [asked, had] = [settings.connections, report.connections];
    if asked > 0 && had != asked && !settings.handover {
        notes.push(format!("{had} connections instead of {asked}"));
    }
    notes
}

/// What only Shoal has, in words.
fn details(report: &MigrationReport) -> Vec<String> {
    let ms = |us: u64| us as f64 / 1e3;
    let mut details = vec![format!(
        "pause: stop {:.2} + pages {:.2} + state {:.2} + start {:.2} ms; {} connections",
        ms(report.downtime_stop_us),
        ms(report.downtime_pages_us),
        ms(report.downtime_state_us),
        ms(report.downtime_start_us),
        report.connections
    )];
    let mut tell = |wanted: bool, text: String| {
        if wanted {
            details.push(text);
        }
    };
    tell(
        report.compressed_pages + report.delta_pages > 0,
        format!(
            "{} pages compressed, {:.1} MiB saved; {} as differences, {:.1} MiB saved",
            report.compressed_pages,
            report.compression_saved_bytes as f64 / MIB,
            report.delta_pages,
            report.delta_saved_bytes as f64 / MIB
        ),
    );
    tell(
        report.resent_pages > 0,
        format!(
            "{} pages sent again, as they changed while they were sent",
            report.resent_pages
        ),
    );
    tell(
        report.verify_us > 0,
        format!("compared in {:.1} ms of the pause", ms(report.verify_us)),
    );
    tell(
        report.post_copy,
        format!(
            "post-copy: {:.0} ms, {} pages, {} faults of {:.2} ms on average, {:.2} ms at worst",
            ms(report.post_copy_us),
            report.post_copy_pages,
            report.faults,
            ms(report.mean_fault_us),
            ms(report.worst_fault_us)
        ),
    );
    tell(
        report.max_throttle_percent > 0,
        format!("throttled by up to {} %", report.max_throttle_percent),
    );
    details
}

fn own_report(report: &MigrationReport) -> Value {
    let pass = |pass: &MigrationPass| {
        json!({
            "pass": pass.pass,
            "pages": pass.pages,
            "zero_pages": pass.zero_pages,
            "bytes": pass.bytes,
            "duration_us": pass.duration_us,
            "dirtied_pages": pass.dirtied_pages,
            "throttle_percent": pass.throttle_percent,
        })
    };
    json!({
        "total_us": report.total_us,
        "downtime_us": report.downtime_us,
        "downtime_stop_us": report.downtime_stop_us,
        "downtime_pages_us": report.downtime_pages_us,
        "downtime_state_us": report.downtime_state_us,
        "downtime_start_us": report.downtime_start_us,
        "pages_sent": report.pages_sent,
        "zero_pages": report.zero_pages,
        "connections": report.connections,
        "tls": report.tls,
        "handed_over": report.handed_over,
        "compressed_pages": report.compressed_pages,
        "compression_saved_bytes": report.compression_saved_bytes,
        "delta_pages": report.delta_pages,
        "delta_saved_bytes": report.delta_saved_bytes,
        "resent_pages": report.resent_pages,
        "max_throttle_percent": report.max_throttle_percent,
        "throttled_us": report.throttled_us,
        "verified": report.verified().as_str_name(),
        "verify_us": report.verify_us,
        "post_copy": report.post_copy,
        "post_copy_us": report.post_copy_us,
        "post_copy_pages": report.post_copy_pages,
        "faults": report.faults,
        "worst_fault_us": report.worst_fault_us,
        "mean_fault_us": report.mean_fault_us,
        "guest_gap_us": report.guest_gap_us,
        "passes": report.pass_table.iter().map(pass).collect::<Vec<_>>(),
    })
}
