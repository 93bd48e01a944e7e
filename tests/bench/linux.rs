//! `cargo xtask bench linux`: how fast a Linux guest is, by its own measurements (`checks measure`), in Shoal's VMM and in QEMU, each
//! with the better of the image's kernels; and how long `shoal run linux -- true` takes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine as Lock;
use shoal_tests::paths;
use shoal_tests::soak::linux::IMAGE;

use crate::figures::{Machine, median};
use crate::{millis, qemu, table};

const MEMORY: &str = "256M";
const RUNS_THROUGH_CLUSTER: usize = 10;
const COMMAND: &str = "checks measure";

/// What the guest measures, in words; the unit comes with the figure.
const ROWS: [(&str, &str); 13] = [
    ("wall-userland", "userland, after process start"),
    ("userland", "userland, by the guest's clock"),
    ("getpid", "getpid"),
    ("pipe", "pipe round trip"),
    ("fork", "fork + exit"),
    ("fork-exec-exit", "fork + exec + exit of busybox true"),
    ("vfork-exec-exit", "the same by vfork"),
    ("first-touch", "first touch of a page"),
    ("first-touch-again", "the same of one that the guest had before"),
    ("fp-1e8", "10^8 floating-point multiplications"),
    ("tcp-loopback", "TCP over the guest's loopback"),
    ("sleep-10ms", "sleep of 10 ms"),
    ("wall-end", "all of it, process start to end"),
];

#[derive(Debug, Args)]
pub struct Linux {
    /// How often each guest is run; medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Shoal alone, even if QEMU is installed
    #[arg(long)]
    pub no_qemu: bool,
    /// Give up on a guest after so many seconds: TCG is slow
    #[arg(long, default_value_t = 300)]
    patience: u64,
    /// Where to write the figures as JSON
    #[arg(long, overrides_with = "out")]
    out: Option<PathBuf>,
}

/// The parts of an image's manifest that matter here.
#[derive(Debug, Deserialize)]
struct Manifest {
    kernel: Option<String>,
    initrd: String,
    #[serde(default)]
    cmdline: String,
    #[serde(default)]
    software_kvm: SoftwareKvm,
}

/// What takes the place of the kernel, and is added to the command line, where KVM has no hardware virtualization.
#[derive(Debug, Default, Deserialize)]
struct SoftwareKvm {
    kernel: Option<String>,
    #[serde(default)]
    cmdline: String,
}

/// A kernel and its command line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Kernel {
    file: String,
    cmdline: String,
}

impl Manifest {
    fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("image.toml");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("cannot read {}", path.display()))
    }

    /// For a processor, real or emulated, that runs kernels as they are.
    fn plain(&self) -> Option<Kernel> {
        let file = self.kernel.clone()?;
        let cmdline = self.cmdline.clone();
        Some(Kernel { file, cmdline })
    }

    /// For KVM without hardware virtualization.
    fn software_kvm(&self) -> Option<Kernel> {
        let file = self
            .software_kvm
            .kernel
            .as_ref()
            .or(self.kernel.as_ref())?
            .clone();
        let cmdline = format!("{} {}", self.cmdline, self.software_kvm.cmdline);
        let cmdline = cmdline.trim().to_owned();
        Some(Kernel { file, cmdline })
    }
}

/// Who runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
enum Side {
    Shoal,
    QemuKvm,
    QemuTcg,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Shoal => "Shoal",
            Self::QemuKvm => "QEMU, KVM",
            Self::QemuTcg => "QEMU, TCG",
        }
    }
}

/// A figure with its unit.
#[derive(Debug, Clone, Serialize)]
struct Figure {
    values: Vec<f64>,
    unit: String,
}

type Figures = BTreeMap<String, Figure>;

/// A side's.
#[derive(Debug, Serialize)]
struct Column {
    side: Side,
    kernel: String,
    figures: Figures,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    runs: u32,
    columns: Vec<Column>,
    skipped: Vec<String>,
    /// `shoal run linux -- true`, by a cluster that is up.
    run_true_ms: Vec<f64>,
}

/// Measures and prints.
///
/// # Errors
/// If Shoal's guest does not run. What QEMU cannot run is said, and left out.
pub fn run(lock: Lock, machine: Machine, options: &Linux) -> Result<()> {
    println!("{}", table::machine(&machine));
    let directory = paths::image(IMAGE);
    let manifest = Manifest::read(&directory)?;
    let (plain, software) = (manifest.plain(), manifest.software_kvm());
    let best = if machine.hardware_virtualization {
        &plain
    } else {
        &software
    };
    let best = best.clone().context("the image has no kernel for this host")?;
    let mut sides = vec![(Side::Shoal, best.clone())];
    let mut skipped = Vec::new();
    if machine.qemu.is_some() {
        let for_tcg = plain.unwrap_or_else(|| {
            skipped.push(
                "the plain kernel on TCG: `cargo xtask images --all` builds it; TCG runs the other".into(),
            );
            best.clone()
        });
        sides.extend([(Side::QemuKvm, best), (Side::QemuTcg, for_tcg)]);
    } else {
        skipped.push("QEMU: it is not on PATH (Debian: qemu-system-x86), or not wanted".into());
    }
    let mut columns: Vec<Column> = Vec::new();
    let patience = Duration::from_secs(options.patience);
    for (side, kernel) in sides {
        let mut figures = Figures::new();
        let mut failure = None;
        for number in 1..=options.runs {
            println!(
                "  {}, {}: run {number} of {}",
                side.name(),
                kernel.file,
                options.runs
            );
            let command = command(side, &directory, &manifest.initrd, &kernel);
            match measure(command, patience) {
                Ok(measured) => merge(&mut figures, measured),
                Err(error) if side == Side::Shoal => return Err(error),
                Err(error) => {
                    failure = Some(format!("{}: {error:#}", side.name()));
                    break;
                }
            }
        }
        skipped.extend(failure);
        let kernel = kernel.file;
        columns.push(Column {
            side,
            kernel,
            figures,
        });
    }
    let run_true_ms = through_cluster(lock)?;
    print(&columns, &run_true_ms, &skipped);
    let report = Report {
        machine,
        runs: options.runs,
        columns,
        skipped,
        run_true_ms,
    };
    if let Some(path) = &options.out {
        fs::write(path, serde_json::to_string_pretty(&report)?)?;
        println!("written to {}", path.display());
    }
    Ok(())
}

/// A guest that measures and ends, with its console on standard output.
fn command(side: Side, directory: &Path, initrd: &str, kernel: &Kernel) -> Command {
    let cmdline = format!("{} -- {COMMAND}", kernel.cmdline);
    let (file, initrd) = (directory.join(&kernel.file), directory.join(initrd));
    let mut command = match side {
        Side::Shoal => {
            let mut command = Command::new(paths::program("shoal-vmm"));
            command.args(["--memory", MEMORY, "--cmdline", &cmdline]);
            command.arg("--kernel").arg(file).arg("--initrd").arg(initrd);
            command
        }
        Side::QemuKvm | Side::QemuTcg => {
            let mut command = Command::new(qemu::PROGRAM);
            let accelerator = if side == Side::QemuKvm {
                ["kvm", "host,-arch-capabilities"]
            } else {
                ["tcg", "max"]
            };
            command.args([
                "-M",
                "microvm",
                "-accel",
                accelerator[0],
                "-cpu",
                accelerator[1],
                "-m",
                MEMORY,
            ]);
            command.args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-serial",
                "stdio",
                "-no-reboot",
            ]);
            command
                .arg("-kernel")
                .arg(file)
                .arg("-initrd")
                .arg(initrd)
                .args(["-append", &cmdline]);
            command
        }
    };
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Runs a guest to its end and takes what it measures: `measure NAME VALUE UNIT`.
fn measure(mut command: Command, patience: Duration) -> Result<BTreeMap<String, (f64, String)>> {
    let start = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let console = BufReader::new(child.stdout.take().context("no pipe")?);
    let (send, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in console.lines().map_while(Result::ok) {
            if send.send((start.elapsed(), line)).is_err() {
                break;
            }
        }
    });
    let mut measured = BTreeMap::new();
    let mut seen = String::new();
    loop {
        let left = patience.saturating_sub(start.elapsed());
        match lines.recv_timeout(left) {
            Ok((at, line)) => {
                let words: Vec<&str> = line.split_whitespace().collect();
                if let ["measure", name, value, unit] = words[..] {
                    if measured.is_empty() {
                        measured.insert("wall-userland".into(), (millis(at), "ms".into()));
                    }
                    measured.insert(name.to_owned(), (value.parse()?, unit.to_owned()));
                }
                seen = line;
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                qemu::end(&mut child);
                bail!("no end within {} s; its last line: {seen}", patience.as_secs());
            }
        }
    }
    let status = child.wait()?;
    measured.insert("wall-end".into(), (millis(start.elapsed()), "ms".into()));
    ensure!(
        measured.contains_key("sleep-10ms"),
        "it ended with {status}; its last line: {seen}"
    );
    Ok(measured)
}

fn merge(figures: &mut Figures, measured: BTreeMap<String, (f64, String)>) {
    for (name, (value, unit)) in measured {
        let figure = figures.entry(name).or_insert(Figure {
            values: Vec::new(),
            unit,
        });
        figure.values.push(value);
    }
}

/// The wall time of a command in a guest of its own, as a user types it.
fn through_cluster(lock: Lock) -> Result<Vec<f64>> {
    let cluster = Cluster::start(lock, &Shape::default());
    let run = || {
        let start = Instant::now();
        let output = cluster.shoal.output(&["run", "linux", "--", "true"]);
        ensure!(output.status.success(), "shoal run linux -- true: {output:?}");
        Ok(millis(start.elapsed()))
    };
    run()?; // the node fetches the image
    (0..RUNS_THROUGH_CLUSTER).map(|_| run()).collect()
}

fn print(columns: &[Column], run_true_ms: &[f64], skipped: &[String]) {
    let mut header = format!("{:<46}", "a Linux guest of 256 MiB, medians");
    for column in columns {
        header += &format!("{:>24}", column.side.name());
    }
    println!("\n{header}");
    let value = |column: &Column, name: &str| {
        let figure = column.figures.get(name)?;
        Some((median(&figure.values), figure.unit.clone()))
    };
    for (name, words) in ROWS {
        let mut line = format!("{words:<46}");
        let own = columns.first().and_then(|column| value(column, name));
        for column in columns {
            let cell = match (value(column, name), &own) {
                (None, _) => "-".to_owned(),
                (Some((found, unit)), Some((own, _))) if column.side != Side::Shoal => {
                    format!("{found:.2} {unit} ({:.2} x)", found / own)
                }
                (Some((found, unit)), _) => format!("{found:.2} {unit}"),
            };
            line += &format!("{cell:>24}");
        }
        println!("{line}");
    }
    println!(
        "kernels: {}",
        columns
            .iter()
            .map(|column| format!("{}: {}", column.side.name(), column.kernel))
            .collect::<Vec<_>>()
            .join(", ")
    );
    let (least, most) = run_true_ms.iter().fold((f64::MAX, 0.0f64), |(least, most), &ms| {
        (least.min(ms), most.max(ms))
    });
    println!(
        "shoal run linux -- true, wall: {least:.0} / {:.0} / {most:.0} ms (least, median, most of {})",
        median(run_true_ms),
        run_true_ms.len()
    );
    for what in skipped {
        println!("SKIPPED {what}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_for_a_host_is_chosen_as_the_agent_does() {
        let both: Manifest = toml::from_str(
            "name = 'l'\nkernel = 'a'\ninitrd = 'i'\ncmdline = 'quiet'\n[software_kvm]\nkernel = 'b'\ncmdline = 'x'\n",
        )
        .expect("a manifest");
        let kernel = |file: &str, cmdline: &str| Kernel {
            file: file.into(),
            cmdline: cmdline.into(),
        };
        assert_eq!(both.plain(), Some(kernel("a", "quiet")));
        assert_eq!(both.software_kvm(), Some(kernel("b", "quiet x")));
        let one: Manifest = toml::from_str("kernel = 'a'\ninitrd = 'i'\n").expect("a manifest");
        assert_eq!(
            (one.plain(), one.software_kvm()),
            (Some(kernel("a", "")), Some(kernel("a", "")))
        );
    }
}
