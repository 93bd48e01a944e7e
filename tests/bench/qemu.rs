//! QEMU's side: the same guest and the same case between two QEMU processes, with QEMU's own defaults but for the limits.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use shoal_proto::vm::Compression;
use shoal_tests::{guest, vmm};

use crate::case::{Case, MEMORY, POST_COPY_BANDWIDTH, Settings};
use crate::figures::{Figures, Run};
use crate::gap::{self, Timeline};
use crate::memory::Warm;
use crate::millis;
use crate::place::{DESTINATION, Place, SOURCE};
use crate::process::{cpu_time, memory_beyond_guest};
use crate::qmp::{Qmp, time_of};

/// Its program.
pub const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);
/// Far above what any link here takes.
const BANDWIDTH: u64 = 100 << 30;

/// Its version, if it is there.
pub fn version() -> Option<String> {
    version_of(PROGRAM)
}

/// The first line that a program prints when asked for its version, if it is there.
pub fn version_of(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

/// The command line without console and control socket: a machine as small as QEMU has one, with the probe in it.
pub fn command(words: &[String], memory: u64, cmdline: &str) -> Command {
    let mut words = words.iter().map(String::as_str).chain([PROGRAM]);
    let mut command = Command::new(words.next().unwrap_or(PROGRAM));
    let memory = format!("{}M", memory >> 20);
    command
        .args(words)
        .args(["-M", "microvm", "-enable-kvm", "-cpu", "host,-arch-capabilities"])
        .args([
            "-m",
            &memory,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ])
        .args(["-name", "shoal-bench,debug-threads=on", "-append", cmdline])
        .arg("-kernel")
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
    /// Starts `command`, with console, log and control socket in `directory`.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(mut command: Command, directory: &Path, name: &str) -> Result<Self> {
        let path = |extension: &str| directory.join(format!("{name}.{extension}"));
        let (socket, console, log) = (path("qmp"), path("console"), path("log"));
        command
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
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
pub fn run(
    case: &Case,
    place: &Place,
    max_downtime: Duration,
    patience: Duration,
    warm: Option<Warm>,
) -> Result<Run> {
    let directory = tempfile::tempdir()?;
    let address = format!("tcp:{}:{}", place.address(case), place.port(case));
    let start = |node: &str, incoming: &[&str]| {
        let mut command = command(&place.words(case, node), case.memory, case.cmdline);
        command.args(incoming);
        if case.settings.tls {
            // Its certificates are found by the name of the endpoint, which is the node's.
            let files = place.certificates.directory().display();
            let credentials = format!("tls-creds-x509,id=tls,endpoint={node},verify-peer=on,dir={files}");
            command.args(["-object", &credentials]);
        }
        Qemu::start(command, directory.path(), node)
    };
    let mut source = start(SOURCE, &[])?;
    let mut destination = start(DESTINATION, &["-incoming", "defer"])?;
    prepare(&mut source.qmp, &case.settings, max_downtime, Some(DESTINATION))?;
    prepare(&mut destination.qmp, &case.settings, max_downtime, None)?;
    destination
        .qmp
        .run("migrate-incoming", &json!({ "uri": address }))?;
    let before = poll("the guest to settle", patience, || {
        gap::settled(case, &source.console())
    })?;
    let heard = SystemTime::now();

    let pids = [source.pid(), destination.pid()];
    drop(warm);
    let cpu_before = [cpu_time(pids[0])?, cpu_time(pids[1])?];
    let moved = migrate(
        &mut source,
        &mut destination,
        &address,
        case.settings.post_copy,
        patience,
    )
    .with_context(|| format!("source: {}\ndestination: {}", source.log(), destination.log()))?;
    let cpu_after = [cpu_time(pids[0])?, cpu_time(pids[1])?];

    let timeline = Timeline {
        before,
        asked_after: moved.asked.duration_since(heard).unwrap_or_default(),
        pause: Some((moved.paused_after, moved.downtime)),
        total: moved.total,
    };
    // Each side has written what the guest printed there; a line may have been cut in two by the move.
    let console = || source.console() + &destination.console();
    let gaps = poll("heartbeats after the migration", patience, || {
        gap::around(case, &console(), &timeline)
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
            // With compression its counter goes on counting pages as they are in memory (7.2).
            bytes: if case.settings.compression == Compression::Zstd {
                f64::NAN
            } else {
                figure("transferred")
            },
            passes: figure("dirty-sync-count"),
            cpu_source_s: own_cpu(0),
            cpu_destination_s: own_cpu(1),
            destination_beyond_guest_bytes: memory_beyond_guest(pids[1])?,
            ..Figures::of(&gaps)
        },
        not_as_asked: Vec::new(),
        details: Vec::new(),
        own_report,
    })
}

/// Capabilities and limits of one end; `towards` is the other end's name in its certificate, for the source.
fn prepare(qmp: &mut Qmp, settings: &Settings, max_downtime: Duration, towards: Option<&str>) -> Result<()> {
    let zstd = settings.compression == Compression::Zstd;
    // It compresses well only with this, also over one connection.
    let multifd = settings.connections > 1 || zstd;
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = [
        capability("events", true),
        capability("multifd", multifd),
        capability("postcopy-ram", settings.post_copy),
    ];
    qmp.run(
        "migrate-set-capabilities",
        &json!({ "capabilities": capabilities }),
    )?;
    let mut limits = json!({
        "max-bandwidth": if settings.post_copy { POST_COPY_BANDWIDTH } else { BANDWIDTH },
        "downtime-limit": u64::try_from(max_downtime.as_millis())?,
    });
    if multifd {
        limits["multifd-channels"] = settings.connections.max(1).into();
    }
    if zstd {
        limits["multifd-compression"] = "zstd".into();
    }
    if settings.tls {
        limits["tls-creds"] = "tls".into();
        if let Some(name) = towards {
            limits["tls-hostname"] = name.into();
        }
    }
    qmp.run("migrate-set-parameters", &limits)?;
    Ok(())
}

struct Moved {
    asked: SystemTime,
    paused_after: Duration,
    total: Duration,
    downtime: Duration,
}

/// Moves the guest. Times are those of QEMU's events, so that nobody has to ask while it works.
fn migrate(
    source: &mut Qemu,
    destination: &mut Qemu,
    address: &str,
    post_copy: bool,
    patience: Duration,
) -> Result<Moved> {
    let asked = SystemTime::now();
    let start = asked.duration_since(UNIX_EPOCH)?;
    source.qmp.run("migrate", &json!({ "uri": address }))?;
    if post_copy {
        source.qmp.wait_for("the second pass", patience, |event| {
            event["event"] == "MIGRATION_PASS" && event["data"]["pass"] == 2
        })?;
        source.qmp.run("migrate-start-postcopy", &json!({}))?;
    }
    let ended = source
        .qmp
        .wait_for("the end of the migration", patience, |event| {
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
        .wait_for("the guest to run", patience, |event| event["event"] == "RESUME")?;
    let stopped = source
        .qmp
        .wait_for("the stop of the guest", Duration::from_secs(1), |event| {
            event["event"] == "STOP"
        })?;
    let [ended, resumed, stopped] = [time_of(&ended)?, time_of(&resumed)?, time_of(&stopped)?];
    ensure!(start < stopped && stopped <= resumed, "the host's clock was set");
    Ok(Moved {
        asked,
        paused_after: stopped - start,
        total: ended.max(resumed) - start,
        downtime: resumed - stopped,
    })
}

/// Looks again and again until `look` answers something.
///
/// # Errors
/// If it does not within `patience`.
pub fn poll<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(
            Instant::now() < deadline,
            "{what}: not within {} s",
            patience.as_secs()
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
    let mut qemu = Qemu::start(command(&[], MEMORY, "fill=0"), directory.path(), "idle")?;
    poll("a heartbeat", PATIENCE, || {
        guest::heartbeats(&qemu.console()).into_iter().next()
    })?;
    qemu.qmp.run("query-status", &json!({}))?;
    memory_beyond_guest(qemu.pid())
}
