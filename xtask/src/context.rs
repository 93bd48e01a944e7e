//! Where things are, and how steps are run and shown.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How often a long step says that it goes on.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);
/// How often the end of a process is looked for.
const POLL: Duration = Duration::from_millis(50);
/// Lines of a failed step's log that are shown.
const LOG_TAIL: usize = 15;

/// The repository and its target directory.
#[derive(Debug)]
pub struct Context {
    root: PathBuf,
    target: PathBuf,
}

impl Context {
    /// Finds both. The target directory is `CARGO_TARGET_DIR`, else `target` in the repository.
    ///
    /// # Errors
    /// If the repository is not where it was when this program was built.
    pub fn new() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest
            .parent()
            .context("xtask lies in the root of the filesystem")?
            .to_path_buf();
        if !root.join("Cargo.toml").is_file() {
            bail!("{} is gone; run `cargo xtask` again", root.display());
        }
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |path| root.join(path));
        Ok(Self { root, target })
    }

    /// The repository.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The target directory.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// A directory below the target directory, made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn target_dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.target.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

/// Does one step and shows it: its name, then how long it took.
///
/// # Errors
/// The step's own.
pub fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("==> {name}");
    let start = Instant::now();
    let result = work().with_context(|| format!("{name}: failed"))?;
    println!("    {name}: {}", elapsed(start));
    Ok(result)
}

/// Whether commands that run with their output in a log are to end, now and later.
static GIVEN_UP: AtomicBool = AtomicBool::new(false);

/// Ends what [`run_logged`] runs on other threads: a step has failed, so that the rest is in vain.
pub fn give_up() {
    GIVEN_UP.store(true, Ordering::Relaxed);
}

/// What is shown of a long command whose output goes to a log: its name, and how much of it is done.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// What is worked at.
    pub name: &'a str,
    /// Lines that the command prints when it does all of its work.
    pub lines: usize,
}

impl Progress<'_> {
    fn line(&self, lines: usize, start: Instant) -> String {
        let percent = (100 * lines / self.lines).min(99);
        format!(
            "    ... {}: about {percent} % after {}",
            self.name,
            elapsed(start)
        )
    }
}

/// Runs a command with its output in a log file. Shows the end of the log if it fails.
///
/// # Errors
/// If the command cannot be run or fails, or if another step has failed meanwhile.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    run_long(command, log, None)
}

/// The same, and shows every so often how far it is.
///
/// # Errors
/// As [`run_logged`].
pub fn run_long(command: &mut Command, log: &Path, progress: Option<Progress<'_>>) -> Result<()> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    let program = command.get_program().to_owned();
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let start = Instant::now();
    let mut next_sign = SIGN_OF_LIFE;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if GIVEN_UP.load(Ordering::Relaxed) {
            child.kill()?;
            child.wait()?;
            bail!("ended, as another step failed");
        }
        if start.elapsed() >= next_sign {
            println!(
                "{}",
                progress.map_or_else(
                    || format!("    ... {}", elapsed(start)),
                    |progress| progress.line(line_count(log), start)
                )
            );
            next_sign += SIGN_OF_LIFE;
        }
        thread::sleep(POLL);
    };
    succeeded(status, &program.display().to_string()).with_context(|| {
        let text = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_TAIL)..].join("\n");
        format!("the log is {}, and ends:\n{tail}\n", log.display())
    })
}

/// Runs a command with its output on ours.
///
/// # Errors
/// If the command cannot be run or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let status = command
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    succeeded(status, &program)
}

/// An error unless `program` ended well.
///
/// # Errors
/// If it did not.
pub fn succeeded(status: ExitStatus, program: &str) -> Result<()> {
    if !status.success() {
        bail!("{program} ended with {status}");
    }
    Ok(())
}

fn line_count(path: &Path) -> usize {
    fs::read(path).map_or(0, |text| text.split(|&byte| byte == b'\n').count())
}

fn elapsed(start: Instant) -> String {
    let seconds = start.elapsed().as_secs_f64();
    if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{:.0} min {:.0} s", (seconds / 60.0).floor(), seconds % 60.0)
    }
}
