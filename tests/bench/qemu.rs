//! QEMU's side: the same guest and the same case between two QEMU processes, with QEMU's own defaults but for the limits.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use shoal_tests::{cluster, guest, vmm};

use crate::case::{Case, MEMORY};
use crate::figures::{Figures, Run};
use crate::memory::Warm;
use crate::process::{cpu_time, memory_beyond_guest};
use crate::qmp::{Qmp, time_of};
use crate::{gap, millis};

const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);
/// Far above what any link here takes.
const BANDWIDTH: u64 = 100 << 30;

/// Its version, if it is there.
pub fn version() -> Option<String> {
    let output = Command::new(PROGRAM).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

/// The command line without console and control socket: a machine as small as QEMU has one, with the probe in it.
pub fn command(cmdline: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args([
            "-M",
            "microvm",
            "-enable-kvm",
            "-cpu",
            "host,-arch-capabilities",
            "-m",
            "1G",
        ])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args([
            "-name",
            "shoal-bench,debug-threads=on",
            "-append",
            cmdline,
            "-kernel",
        ])
        .arg(vmm::probe_kernel())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// One process, ended with this.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    log: PathBuf,
    console: PathBuf,
    /// Its control socket.
    pub qmp: Qmp,
}

impl Qemu {
    /// Starts one. With `incoming`, it waits there for a migration.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(directory: &Path, name: &str, cmdline: &str, incoming: Option<&str>) -> Result<Self> {
        let path = |extension: &str| directory.join(format!("{name}.{extension}"));
        let (socket, console, log) = (path("qmp"), path("console"), path("log"));
        let mut command = command(cmdline);
        command
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(incoming.map_or(vec![], |address| vec!["-incoming", address]))
            .stderr(File::create(&log)?);
        let mut child = command.spawn().context("cannot start QEMU")?;
        match Qmp::connect(&socket) {
            Ok(qmp) => Ok(Self {
                child,
                log,
                console,
                qmp,
            }),
            Err(error) => {
                end(&mut child);
                Err(error.context(fs::read_to_string(&log).unwrap_or_default()))
            }
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What its guest has printed here.
    pub fn console(&self) -> String {
        fs::read(&self.console).map_or_else(
            |_| String::new(),
            |text| String::from_utf8_lossy(&text).into_owned(),
        )
    }

    /// The end of what it said.
    fn log(&self) -> String {
        guest::tail(&fs::read_to_string(&self.log).unwrap_or_default())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Ends a process that was started here.
pub fn end(child: &mut Child) {
    drop(child.kill()); // it may have ended
    drop(child.wait());
}

/// Boots a guest, moves it once into memory that was `warm` and looks at it until it has checked all of its memory.
///
/// # Errors
/// If the migration fails or the guest was harmed.
pub fn run(case: &Case, max_downtime: Duration, warm: Option<Warm>) -> Result<Run> {
    let directory = tempfile::tempdir()?;
    let address = format!("tcp:127.0.0.1:{}", cluster::free_port());
    let mut source = Qemu::start(directory.path(), "source", case.cmdline, None)?;
    let mut destination = Qemu::start(directory.path(), "destination", case.cmdline, Some(&address))?;
    prepare(&mut source.qmp, max_downtime)?;
    let before = poll("the guest to settle", || gap::settled(case, &source.console()))?;

    let pids = [source.pid(), destination.pid()];
    let cpu_before = [cpu_time(pids[0])?, cpu_time(pids[1])?];
    drop(warm);
    let moved = migrate(&mut source, &mut destination, &address)
        .with_context(|| format!("source: {}\ndestination: {}", source.log(), destination.log()))?;
    let cpu_after = [cpu_time(pids[0])?, cpu_time(pids[1])?];

    // Each side has written what the guest printed there; a line may have been cut in two by the move.
    let console = || source.console() + &destination.console();
    let gaps = poll("heartbeats after the migration", || {
        gap::around(case, &console(), &before, moved.total)
    })?;
    guest::check_unharmed(&console()).map_err(anyhow::Error::msg)?;
    // Only now: some figures are still missing when QEMU says that it has completed.
    let own_report = source.qmp.run("query-migrate", &json!({}))?;
    let own_cpu = |side: usize| {
        let (before, after) = (cpu_before[side], cpu_after[side]);
        ((after.all - before.all) - (after.vcpus - before.vcpus)).max(0.0)
    };
    let figure = |name: &str| own_report["ram"][name].as_f64().unwrap_or(f64::NAN);
    Ok(Run {
        figures: Figures {
            total_ms: millis(moved.total),
            downtime_ms: millis(moved.downtime),
            gap_ms: millis(gaps.during),
            gap_before_ms: millis(gaps.before),
            bytes: figure("transferred"),
            passes: figure("dirty-sync-count"),
            cpu_source_s: own_cpu(0),
            cpu_destination_s: own_cpu(1),
            destination_beyond_guest_bytes: memory_beyond_guest(pids[1], MEMORY)?,
        },
        own_report,
    })
}

fn prepare(qmp: &mut Qmp, max_downtime: Duration) -> Result<()> {
    let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    qmp.run("migrate-set-capabilities", &events)?;
    let limits =
        json!({ "max-bandwidth": BANDWIDTH, "downtime-limit": u64::try_from(max_downtime.as_millis())? });
    qmp.run("migrate-set-parameters", &limits)?;
    Ok(())
}

struct Moved {
    total: Duration,
    downtime: Duration,
}

/// Moves the guest. Times are those of QEMU's events, so that nobody has to ask while it works.
fn migrate(source: &mut Qemu, destination: &mut Qemu, address: &str) -> Result<Moved> {
    let start = SystemTime::now().duration_since(UNIX_EPOCH)?;
    source.qmp.run("migrate", &json!({ "uri": address }))?;
    let ended = source
        .qmp
        .wait_for("the end of the migration", PATIENCE, |event| {
            event["event"] == "MIGRATION"
                && ["completed", "failed", "cancelled"]
                    .contains(&event["data"]["status"].as_str().unwrap_or(""))
        })?;
    if ended["data"]["status"] != "completed" {
        let own_report = source.qmp.run("query-migrate", &json!({}))?;
        bail!("the migration did not complete: {own_report}");
    }
    let resumed = destination
        .qmp
        .wait_for("the guest to run", PATIENCE, |event| event["event"] == "RESUME")?;
    let stopped = source
        .qmp
        .wait_for("the stop of the guest", Duration::from_secs(1), |event| {
            event["event"] == "STOP"
        })?;
    let [ended, resumed, stopped] = [time_of(&ended)?, time_of(&resumed)?, time_of(&stopped)?];
    ensure!(start < stopped && stopped <= resumed, "the host's clock was set");
    Ok(Moved {
        total: ended.max(resumed) - start,
        downtime: resumed - stopped,
    })
}

fn poll<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(
            Instant::now() < deadline,
            "{what}: not within {} s",
            PATIENCE.as_secs()
        );
        thread::sleep(POLL);
    }
}

/// Boots an idle guest and answers QEMU's memory beyond that of guest RAM, with its control socket in use.
///
/// # Errors
/// If it does not start.
pub fn memory() -> Result<f64> {
    let directory = tempfile::tempdir()?;
    let mut qemu = Qemu::start(directory.path(), "idle", "fill=0", None)?;
    poll("a heartbeat", || {
        guest::heartbeats(&qemu.console()).into_iter().next()
    })?;
    qemu.qmp.run("query-status", &json!({}))?;
    memory_beyond_guest(qemu.pid(), MEMORY)
}
