//! Cloud Hypervisor's side, where it is installed: driven by its own `ch-remote`, as docs/live_migration.md there says.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use shoal_tests::{guest, vmm};

use crate::case::Case;
use crate::figures::{Figures, Run};
use crate::gap::{self, Timeline};
use crate::memory::Warm;
use crate::millis;
use crate::place::{DESTINATION, Place, SOURCE};
use crate::process::{VcpuWatch, cpu_time, memory_beyond_guest};
use crate::qemu::{end, poll, version_of};

const PROGRAM: &str = "cloud-hypervisor";
const REMOTE: &str = "ch-remote";

/// Its version, if it and its control program are there.
pub fn version() -> Option<String> {
    version_of(REMOTE)?;
    version_of(PROGRAM)
}

/// One process, ended with this. Its console is its standard output.
struct Vmm {
    child: Child,
    socket: PathBuf,
    console: PathBuf,
    log: PathBuf,
}

impl Vmm {
    fn start(directory: &Path, name: &str, guest: &[String]) -> Result<Self> {
        let path = |extension: &str| directory.join(format!("{name}.{extension}"));
        let (socket, console, log) = (path("api"), path("console"), path("log"));
        let child = Command::new(PROGRAM)
            .arg("--api-socket")
            .arg(&socket)
            .args(guest)
            .stdin(Stdio::null())
            .stdout(File::create(&console)?)
            .stderr(File::create(&log)?)
            .spawn()
            .context("cannot start Cloud Hypervisor")?;
        Ok(Self {
            child,
            socket,
            console,
            log,
        })
    }

    /// A call of its API, under way.
    fn call(&self, command: &str, argument: &str) -> Result<Child> {
        Command::new(REMOTE)
            .arg("--api-socket")
            .arg(&self.socket)
            .args([command, argument])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start ch-remote")
    }

    fn console(&self) -> String {
        fs::read(&self.console).map_or_else(
            |_| String::new(),
            |text| String::from_utf8_lossy(&text).into_owned(),
        )
    }

    fn log(&self) -> String {
        guest::tail(&fs::read_to_string(&self.log).unwrap_or_default())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Boots a guest, moves it once into memory that was `warm` and looks at it until it has checked all of its memory.
///
/// # Errors
/// If the migration fails or the guest was harmed.
pub fn run(
    case: &Case,
    place: &Place,
    max_downtime: Duration,
    patience: Duration,
    warm: Option<Warm>,
) -> Result<Run> {
    let directory = tempfile::tempdir()?;
    let kernel = vmm::probe_kernel();
    let memory = format!("size={}M,thp=on", case.memory >> 20);
    let words = [
        "--cpus",
        "boot=1",
        "--memory",
        &memory,
        "--serial",
        "tty",
        "--console",
        "off",
    ];
    let mut guest_words: Vec<String> = words.map(str::to_owned).to_vec();
    guest_words.extend(["--kernel".into(), kernel.display().to_string()]);
    guest_words.extend(["--cmdline".into(), case.cmdline.into()]);
    let source = Vmm::start(directory.path(), SOURCE, &guest_words)?;
    let destination = Vmm::start(directory.path(), DESTINATION, &[])?;
    let address = format!("tcp:{}:{}", place.address(case), place.port(case));
    poll("the API", patience, || {
        (source.socket.exists() && destination.socket.exists()).then_some(())
    })?;
    let receiving = destination.call("receive-migration", &format!("receiver_url={address}"))?;
    let before = poll("the guest to settle", patience, || {
        gap::settled(case, &source.console())
    })
    .with_context(|| source.log())?;
    let heard = Instant::now();

    let pids = [source.child.id(), destination.child.id()];
    drop(warm);
    let watch = VcpuWatch::start(pids[0])?;
    let cpu_before = [cpu_time(pids[0])?, cpu_time(pids[1])?];
    let start = Instant::now();
    let connections = match case.settings.connections {
        0 | 1 => String::new(),
        n => format!(",connections={n}"),
    };
    let options = format!(
        "destination_url={address},downtime_ms={}{connections}",
        max_downtime.as_millis()
    );
    let sent = source.call("send-migration", &options);
    let results = [sent.and_then(finish), finish(receiving)];
    let total = start.elapsed();
    let source_vcpus = watch.end();
    let cpu_after = [cpu_time(pids[0])?, cpu_time(pids[1])?];
    for result in results {
        result.with_context(|| format!("source: {}\ndestination: {}", source.log(), destination.log()))?;
    }

    let timeline = Timeline {
        before,
        asked_after: start - heard,
        pause: None,
        total,
    };
    let console = || source.console() + &destination.console();
    let gaps = poll("heartbeats after the migration", patience, || {
        gap::around(case, &console(), &timeline)
    })?;
    guest::check_unharmed(&console()).map_err(anyhow::Error::msg)?;
    let source_cpu = (cpu_after[0].all - cpu_before[0].all) - (source_vcpus - cpu_before[0].vcpus);
    let destination_cpu = (cpu_after[1].all - cpu_before[1].all) - cpu_after[1].vcpus;
    Ok(Run {
        figures: Figures {
            total_ms: millis(total),
            cpu_source_s: source_cpu.max(0.0),
            cpu_destination_s: destination_cpu.max(0.0),
            destination_beyond_guest_bytes: memory_beyond_guest(pids[1])?,
            ..Figures::of(&gaps)
        },
        not_as_asked: Vec::new(),
        details: Vec::new(),
        own_report: Value::Null,
    })
}

fn finish(call: Child) -> Result<()> {
    let output = call.wait_with_output()?;
    ensure!(
        output.status.success(),
        "ch-remote: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
