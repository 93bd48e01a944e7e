//! Everything that a developer does with this repository: `cargo xtask COMMAND`. One command per file.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod build;
mod check;
mod checks_image;
mod context;
mod cpio;
mod demo;
#[allow(dead_code, reason = "what the tests assert, the demo checks")]
#[path = "../../tests/src/guest.rs"]
mod guest;
mod hardware_kvm;
mod images;
mod kernel;
mod packages;
mod shoal;
mod simulate;
mod slowest;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use context::Context;
use demo::Story;
use hardware_kvm::Selection;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Build, demo, test, check and measure Shoal")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a cluster that moves running VMs, with measured figures, and check every claim
    Demo {
        /// Leave the cluster up and say how to talk to it
        #[arg(long)]
        keep: bool,
        /// Without Linux, so that no kernel is built: a node that is relieved before it runs out of memory
        #[arg(long)]
        probe: bool,
    },
    /// Run every test, or those whose name contains FILTER
    Test {
        /// Part of a test's name
        filter: Option<String>,
        /// Run tests on KVM with hardware virtualization, which QEMU emulates: slow, and needs no /dev/kvm. Without FILTER those that
        /// fit (docs/testing.md)
        #[arg(long)]
        hardware_kvm: bool,
        /// With --hardware-kvm: only a few, in about three minutes
        #[arg(long, requires = "hardware_kvm", conflicts_with = "filter")]
        quick: bool,
    },
    /// Check formatting and lints and run the unit tests; needs no KVM
    Check {
        /// Formatting and lints only
        #[arg(long)]
        lints: bool,
    },
    /// Measure start, memory and migration, beside QEMU if it is installed; `bench migrate`: migrations of every kind;
    /// `bench agents`: a scheduler under load; `bench sampling`: what samples of guests cost; `bench linux`: a Linux guest,
    /// in QEMU too
    Bench {
        /// `migrate`, `agents`, `sampling` or `linux`, and options: --runs N, --case NAME, --quick, --no-qemu, --max-downtime-ms N, --cold, --out PATH
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Migrate a guest again and again, by every policy, and check that nothing is harmed or left behind
    Soak {
        /// --migrations N (500), --seed S; `--linux`: boots of a Linux guest, and moves amid its checks: --boots N (500),
        /// --minutes N (30), --migrations N (200), --seed S
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Compare scheduling policies on simulated clusters and recorded traces: tables and pictures; needs no KVM
    Simulate {
        /// `--quick`, `--traces FOLDER` (more days of PlanetLab), or scenario files instead of all
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Build the guest images
    Images {
        /// Only this one
        only: Option<images::Image>,
        /// Both kernels of Linux, not only the one that guests get on this host
        #[arg(long)]
        all: bool,
    },
    /// Install the system packages that building and testing need, or say which
    Packages,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            for cause in error.chain().skip(1) {
                eprintln!("  because: {cause}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let context = Context::new()?;
    match arguments.command {
        Command::Demo { keep, probe } => {
            let story = if probe { Story::ProbeAlone } else { Story::Whole };
            demo::run_demo(&context, story, keep)
        }
        Command::Test {
            filter,
            hardware_kvm: false,
            ..
        } => test::run_tests(&context, filter.as_deref()),
        Command::Test { filter, quick, .. } => {
            let selection = if quick { Selection::Quick } else { Selection::Whole };
            hardware_kvm::run_tests(&context, selection, filter.as_deref())
        }
        Command::Check { lints } => check::run_checks(&context, lints),
        Command::Bench { options } => bench::run_benchmarks(&context, &options),
        Command::Soak { options } => soak::run_soak(&context, &options),
        Command::Simulate { options } => simulate::run_simulations(&context, &options),
        Command::Images { only, all } => {
            let host = [kernel::Kernel::of_this_host()];
            let kernels: &[_] = if all { &kernel::Kernel::ALL } else { &host };
            match only {
                None => images::build_all(&context, kernels),
                Some(image) => images::build(&context, image, kernels),
            }
        }
        Command::Packages => packages::ensure_all(),
    }
}
