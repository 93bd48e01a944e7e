//! From the start of a process to the first byte that its guest prints, and what the process itself needs.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use shoal_proto::vm::GetStatusRequest;
use shoal_tests::vmm::{Vmm, probe_kernel, probe_spec};
use shoal_tests::{guest, paths};
use tokio::time::timeout;

use crate::case::MEMORY;
use crate::figures::Startup;
use crate::process::memory_beyond_guest;
use crate::{millis, qemu};

const STARTS: usize = 10;
const MEMORY_READINGS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(30);
const VM: &str = "0b6a3f5e-5df7-4f55-9e5c-8c1f5d1f1a03";

/// Shoal's.
///
/// # Errors
/// If a guest does not start.
pub async fn shoal() -> Result<Startup> {
    let mut startup = Startup {
        first_byte_ms: repeat(STARTS, || first_byte(&mut by_hand()))?,
        first_byte_by_api_ms: Vec::new(),
        memory_beyond_guest_bytes: Vec::new(),
    };
    for _ in 0..STARTS {
        startup.first_byte_by_api_ms.push(first_byte_by_api().await?);
    }
    for _ in 0..MEMORY_READINGS {
        startup.memory_beyond_guest_bytes.push(memory().await?);
    }
    Ok(startup)
}

/// QEMU's.
///
/// # Errors
/// If a guest does not start.
pub fn qemu() -> Result<Startup> {
    Ok(Startup {
        first_byte_ms: repeat(STARTS, || {
            first_byte(qemu::command(&[], MEMORY, "fill=0").args(["-serial", "stdio"]))
        })?,
        first_byte_by_api_ms: Vec::new(),
        memory_beyond_guest_bytes: repeat(MEMORY_READINGS, qemu::memory)?,
    })
}

fn repeat(times: usize, mut measure: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    (0..times).map(|_| measure()).collect()
}

/// A VMM with its guest's console on standard output.
fn by_hand() -> Command {
    let mut command = Command::new(paths::program("shoal-vmm"));
    command.arg("--kernel").arg(probe_kernel()).args([
        "--memory",
        &MEMORY.to_string(),
        "--cmdline",
        "fill=0",
    ]);
    command
}

fn first_byte(command: &mut Command) -> Result<f64> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let start = Instant::now();
    let mut child = command.spawn()?;
    let mut byte = [0u8];
    let read = child.stdout.as_mut().context("no pipe")?.read(&mut byte);
    let elapsed = start.elapsed();
    qemu::end(&mut child);
    ensure!(read? == 1, "{command:?} ended before its guest printed anything");
    Ok(millis(elapsed))
}

/// As an agent does it: spawn, connect, boot, read the console.
async fn first_byte_by_api() -> Result<f64> {
    let start = Instant::now();
    let mut vmm = Vmm::start().await;
    vmm.boot(probe_spec(VM, 1, MEMORY, "fill=0")).await;
    let first = vmm.follow_console(|text| !text.is_empty());
    timeout(PATIENCE, first)
        .await
        .context("the guest prints nothing")?;
    Ok(millis(start.elapsed()))
}

async fn memory() -> Result<f64> {
    let mut vmm = Vmm::start().await;
    vmm.boot(probe_spec(VM, 1, MEMORY, "fill=0")).await;
    let beat = vmm.follow_console(|text| !guest::heartbeats(text).is_empty());
    timeout(PATIENCE, beat).await.context("no heartbeat")?;
    vmm.client.get_status(GetStatusRequest {}).await?;
    memory_beyond_guest(vmm.pid())
}
