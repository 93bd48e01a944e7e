//! The machine: QEMU that emulates an AMD CPU with SVM, in which Debian's kernel offers KVM.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cpio::Archive;
use crate::hardware_kvm::outfit::{MODULES, Outfit};
use crate::hardware_kvm::report::{Report, Stage};
use crate::hardware_kvm::selection::Test;
use crate::images;

const INIT: &str = include_str!("init.sh");
/// Several emulated CPUs on threads of their own took the kernel down.
const ACCELERATOR: &str = "tcg,thread=single";
const CPU: &str = "EPYC,+svm,+npt";
const CPUS: &str = "2";
/// Time passes with the instructions that are executed, 2 ns each, and as outside only while both CPUs are idle. So no test fails
/// because this machine gives QEMU too little time.
const TIME: &str = "shift=1,sleep=on";
const MEMORY_MIB: &str = "4096";
/// Its clock is the TSC: on HPET the clock that KVM gives guests is not steady.
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 quiet tsc=reliable clocksource=tsc mitigations=off random.trust_cpu=1 panic=-1";

/// CPU time of ours in which it boots, or goes from one test to the next: twenty times what that takes.
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// CPU time of ours for each second of its own: several times what a slow host needs. The machine ends a test that is too long by
/// its own clock; if it does not, it hangs.
const SLOWNESS: u32 = 8;
const POLL: Duration = Duration::from_secs(1);
/// Variables that the tests get from our own environment.
const PASSED_ON: [&str; 3] = ["RUST_LOG", "SHOAL_TEST_BIN", "SHOAL_TEST_IMAGES"];
/// Lines of the kernel's console that are shown when the machine ends before its time.
const CONSOLE_TAIL: usize = 20;

/// A machine that runs tests. Ended when dropped.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    lines: Receiver<String>,
    console: PathBuf,
    qemu_log: PathBuf,
}

impl Machine {
    /// Starts one that will run `tests`. Its files are in `directory`.
    ///
    /// # Errors
    /// If QEMU cannot be started.
    pub fn start(outfit: &Outfit, directory: &Path, tests: &[Test]) -> Result<Self> {
        let initramfs = directory.join("initramfs");
        fs::write(&initramfs, initramfs_for(outfit, tests)?)
            .with_context(|| format!("cannot write {}", initramfs.display()))?;
        let (console, qemu_log) = (directory.join("console.log"), directory.join("qemu.log"));
        // It ends with us, however we end.
        let mut command = outfit.qemu(&["setpriv", "--pdeathsig", "KILL", "--"]);
        command
            .args(["-machine", "q35", "-accel", ACCELERATOR, "-icount", TIME])
            .args(["-cpu", CPU, "-smp", CPUS, "-m", MEMORY_MIB, "-rtc", "clock=vm"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(outfit.kernel())
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", KERNEL_COMMAND_LINE])
            .args([
                "-fsdev",
                "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
            ])
            .args(["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"])
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", console.display()))
            .args(["-chardev", "stdio,id=report,signal=off"])
            .args(["-serial", "chardev:console", "-serial", "chardev:report"]);
        let mut qemu = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&qemu_log)?)
            .spawn()
            .context("cannot run setpriv and QEMU")?;
        let stdout = qemu.stdout.take().context("the output of QEMU")?;
        Ok(Self {
            qemu,
            lines: lines(stdout),
            console,
            qemu_log,
        })
    }

    /// Passes on what it says until it has run all tests.
    ///
    /// # Errors
    /// If it does not boot, ends before, hangs or has not done after `limit`.
    pub fn watch(&self, report: &mut Report<'_>, tests: &[Test], limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let (mut stage, mut entered) = (report.stage(), Duration::ZERO);
        loop {
            match self.lines.recv_timeout(POLL) {
                Ok(line) => report.line(&line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the machine is gone; {}", self.last_words()),
            }
            report.sign_of_life();
            if report.stage() != stage {
                (stage, entered) = (report.stage(), self.cpu_time()?);
            }
            let allowed = match stage {
                Stage::Done => return Ok(()),
                Stage::Failed => bail!("the machine runs no tests; {}", self.last_words()),
                Stage::Booting | Stage::Ready => STEP_LIMIT,
                Stage::Testing(test) => STEP_LIMIT + tests[test].limit * SLOWNESS,
            };
            ensure!(
                self.cpu_time()?.saturating_sub(entered) < allowed,
                "the machine hangs; {}",
                self.last_words()
            );
            ensure!(
                Instant::now() < deadline,
                "not done after {} minutes, the limit for a run",
                limit.as_secs() / 60
            );
        }
    }

    /// What QEMU has used so far; it does not get on if it gets none.
    fn cpu_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.qemu.id());
        let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        parse_cpu_time(&stat).with_context(|| format!("no times in {path}"))
    }

    /// What its kernel and QEMU said last.
    fn last_words(&self) -> String {
        let tail = |path: &Path| {
            let text = fs::read(path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<_> = text.lines().collect();
            format!(
                "{} ends:\n{}\n",
                path.display(),
                lines[lines.len().saturating_sub(CONSOLE_TAIL)..].join("\n")
            )
        };
        tail(&self.console) + &tail(&self.qemu_log)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.qemu.kill()); // it may have ended
        drop(self.qemu.wait());
    }
}

/// Time in user and kernel mode, of a line as in /proc/PID/stat (proc(5)).
fn parse_cpu_time(stat: &str) -> Option<Duration> {
    // The name in parentheses may have spaces; the state, field 3, comes after it. The times are fields 14 and 15, in 1/100 s.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut times = fields.split(' ').skip(11);
    let mut ticks = || times.next()?.parse::<u64>().ok();
    Some(Duration::from_millis((ticks()? + ticks()?) * 10))
}

/// Lines as they come, until the end.
fn lines(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n') {
            let Ok(line) = line else { return };
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The machine's root until it has the host's: busybox, init, kernel modules, the plan.
fn initramfs_for(outfit: &Outfit, tests: &[Test]) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "modules", "proc", "sys"] {
        archive.directory(directory, 0o755);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("bin/busybox", 0o755, &read(Path::new(images::BUSYBOX))?);
    let mut order = String::new();
    for (path, options) in MODULES {
        let (_, name) = path.rsplit_once('/').context("modules are in directories")?;
        archive.file(&format!("modules/{name}.ko"), 0o644, &read(&outfit.module(path))?);
        order += &format!("{name} {options}\n");
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.file("plan", 0o644, plan(tests)?.as_bytes());
    archive.file("environment", 0o644, environment().as_bytes());
    Ok(archive.finish())
}

/// Variables for the tests, one a line.
fn environment() -> String {
    let set = |name: &&str| Some(format!("{name}={}\n", std::env::var(name).ok()?));
    PASSED_ON.iter().filter_map(set).collect()
}

/// What init.sh reads.
fn plan(tests: &[Test]) -> Result<String> {
    let mut plan = String::new();
    for test in tests {
        let (directory, program) = (test.directory.display(), test.program.display());
        let line = format!("{}\t{directory}\t{program}\t{}", test.limit.as_secs(), test.name);
        ensure!(
            line.matches(['\t', '\n']).count() == 3,
            "a path with a tab or a line break: {line:?}"
        );
        plan += &line;
        plan.push('\n');
    }
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_whatever_the_program_is_called() {
        let stat = "7 (a) (b c) S 1 7 7 0 -1 4194560 1 0 0 0 150 25 0 0 20 0 1 0 5 0 0";
        assert_eq!(parse_cpu_time(stat), Some(Duration::from_millis(1750)));
        assert_eq!(parse_cpu_time("7 (a) S 1"), None);
    }
}
