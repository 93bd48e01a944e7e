//! `cargo xtask bench sampling`: what it costs to sample how a guest writes its memory: CPU time of the VMM, and work that the
//! guest does not get done.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;
use shoal_proto::vm::{MemorySample, SampleMemoryRequest};
use shoal_tests::guest;
use shoal_tests::vmm::{Vmm, probe_spec};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::process::cpu_time;

const VM: &str = "0b6a3f5e-5df7-4f55-9e5c-8c1f5d1f1a05";
const PATIENCE: Duration = Duration::from_secs(120);
const PAGE: f64 = 4096.0;

/// Guests that write all the time, and one that does what most do.
const GUESTS: [(&str, u64, &str); 4] = [
    ("quiet", 1 << 30, "fill=256MiB wss=16MiB rate=200"),
    ("steady", 1 << 30, "fill=256MiB wss=128MiB rate=20000"),
    (
        "as fast as it can",
        1 << 30,
        "fill=512MiB wss=512MiB rate=10000000",
    ),
    ("the same, 4 GiB", 4 << 30, "fill=2GiB wss=2GiB rate=10000000"),
];

#[derive(Debug, Args)]
pub struct Sampling {
    /// How long each guest is watched with samples, and as long without, in turns
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Between two samples; agents ask for 5000
    #[arg(long, default_value_t = 5000)]
    interval_ms: u64,
    /// Where to write the figures as JSON
    #[arg(long, overrides_with = "out")]
    out: Option<PathBuf>,
}

/// Of one guest.
#[derive(Debug, Serialize)]
struct Figures {
    guest: &'static str,
    samples: usize,
    /// Parts of one CPU.
    vmm_cpu: f64,
    /// The VMM's own count, by sample.
    cost_us: f64,
    faults: f64,
    interval_s: f64,
    /// Pages written by a second of vCPU time.
    pages_without: f64,
    pages_with: f64,
    /// Part of its work that the guest does not get done.
    guest_loss: f64,
    dirty_rate_mib: f64,
    written_mib: f64,
    working_set_mib: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Phase {
    pages: f64,
    vcpu: f64,
    other: f64,
    seconds: f64,
}

/// Measures and prints.
///
/// # Errors
/// If a guest does not start, or is harmed.
pub fn run(runtime: &Runtime, options: &Sampling) -> Result<()> {
    let mut all = Vec::new();
    println!(
        "{:<20}{:>8}{:>10}{:>10}{:>10}{:>10}{:>12}{:>11}{:>10}",
        "guest", "samples", "every s", "VMM CPU", "us each", "faults", "guest loses", "MiB/s", "set MiB"
    );
    for (name, memory, probe) in GUESTS {
        let figures = runtime.block_on(measure(name, memory, probe, options))?;
        println!(
            "{name:<20}{:>8}{:>10.1}{:>9.3}%{:>10.0}{:>10.0}{:>11.2}%{:>11.1}{:>10.1}",
            figures.samples,
            figures.interval_s,
            figures.vmm_cpu * 100.0,
            figures.cost_us,
            figures.faults,
            figures.guest_loss * 100.0,
            figures.dirty_rate_mib,
            figures.working_set_mib
        );
        all.push(figures);
    }
    if let Some(path) = &options.out {
        fs::write(path, serde_json::to_string_pretty(&all)?)?;
        println!("written to {}", path.display());
    }
    Ok(())
}

async fn measure(name: &'static str, memory: u64, probe: &str, options: &Sampling) -> Result<Figures> {
    let mut vmm = Vmm::start().await;
    vmm.boot(probe_spec(VM, 1, memory, probe)).await;
    let filled = |text: &str| {
        let beats = guest::heartbeats(text);
        beats.len() > 2 && beats[beats.len() - 1].filled == beats[beats.len() - 2].filled
    };
    timeout(PATIENCE, vmm.follow_console(filled)).await?;
    // In turns, so that whatever else the machine does is in both.
    let turns = (options.seconds / 15).max(2);
    let time = Duration::from_secs(options.seconds) / u32::try_from(turns)?;
    let (mut without, mut with) = (Phase::default(), Phase::default());
    let mut samples = Vec::new();
    for _ in 0..turns {
        without.add(phase(&mut vmm, time, None, &mut samples).await?);
        with.add(phase(&mut vmm, time, Some(options.interval_ms), &mut samples).await?);
    }
    guest::assert_unharmed(&vmm.console().await);
    let mean = |of: fn(&MemorySample) -> u64| {
        let sum: u64 = samples.iter().map(of).sum();
        float(sum) / float(samples.len().max(1) as u64)
    };
    let pages = |phase: Phase| phase.pages / phase.vcpu.max(1e-9);
    let last = samples.last().context("no sample came")?;
    Ok(Figures {
        guest: name,
        samples: samples.len(),
        vmm_cpu: with.other / with.seconds - without.other / without.seconds,
        cost_us: mean(|sample| sample.cost_us),
        faults: mean(|sample| sample.faults),
        interval_s: with.seconds / float(samples.len().max(1) as u64),
        pages_without: pages(without),
        pages_with: pages(with),
        guest_loss: 1.0 - pages(with) / pages(without),
        dirty_rate_mib: mean(|sample| sample.dirty_rate_bytes_per_second) / f64::from(1 << 20),
        written_mib: with.pages / with.seconds * PAGE / f64::from(1 << 20),
        working_set_mib: float(last.working_set_bytes) / f64::from(1 << 20),
    })
}

impl Phase {
    fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.vcpu += other.vcpu;
        self.other += other.other;
        self.seconds += other.seconds;
    }
}

/// From one of the guest's heartbeats to another, at least so long after.
async fn phase(
    vmm: &mut Vmm,
    time: Duration,
    interval_ms: Option<u64>,
    samples: &mut Vec<MemorySample>,
) -> Result<Phase> {
    let mut stream = match interval_ms {
        Some(interval_ms) => {
            let request = SampleMemoryRequest {
                interval_ms,
                window_ms: 0,
            };
            Some(vmm.client.sample_memory(request).await?.into_inner())
        }
        None => None,
    };
    let (pages, cpu) = reading(vmm).await?;
    let started = Instant::now();
    match &mut stream {
        Some(stream) => {
            let listen = async {
                while let Ok(Some(sample)) = stream.message().await {
                    samples.push(sample);
                }
            };
            // It goes on until the time is up.
            drop(timeout(time, listen).await);
        }
        None => tokio::time::sleep(time).await,
    }
    let (pages_now, cpu_now) = reading(vmm).await?;
    Ok(Phase {
        pages: pages_now - pages,
        vcpu: cpu_now.vcpus - cpu.vcpus,
        other: (cpu_now.all - cpu_now.vcpus) - (cpu.all - cpu.vcpus),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Pages that the guest has written, as it has just said, and the CPU time that it has had.
async fn reading(vmm: &mut Vmm) -> Result<(f64, crate::process::CpuTime)> {
    let seen = guest::heartbeats(&vmm.console().await).len();
    let text = timeout(
        PATIENCE,
        vmm.follow_console(|text| guest::heartbeats(text).len() > seen),
    )
    .await?;
    let cpu = cpu_time(vmm.pid())?;
    let beats = guest::heartbeats(&text);
    let last = beats.last().context("no heartbeat")?;
    Ok((float(last.dirtied), cpu))
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}
