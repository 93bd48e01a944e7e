//! `cargo xtask soak`: migrations in a row, of every kind, and what they left.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this program's output")]

use std::process::ExitCode;

use clap::Parser;
use shoal_tests::machine::Machine;
use shoal_tests::soak::{self, Options, linux};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask soak",
    about = "Migrate a guest again and again, by every policy"
)]
struct Arguments {
    /// Linux guests: boots in a row, and moves amid stress
    #[arg(long)]
    linux: bool,
    /// How many migrations; 500, or 200 of a Linux guest
    #[arg(long)]
    migrations: Option<u32>,
    /// Of a Linux guest: how long the stress goes on at least
    #[arg(long, default_value_t = 30, requires = "linux")]
    minutes: u32,
    /// Of a Linux guest: how often it is booted
    #[arg(long, default_value_t = 500, requires = "linux")]
    boots: u32,
    /// Decides what they are like: the same seed, the same migrations
    #[arg(long, default_value_t = soak::SEED)]
    seed: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Some(machine) = Machine::alone_with_kvm("the soak") else {
        return ExitCode::SUCCESS;
    };
    let seed = arguments.seed;
    if arguments.linux {
        let options = linux::Options {
            boots: arguments.boots,
            migrations: arguments.migrations.unwrap_or(200),
            minutes: arguments.minutes,
            seed,
        };
        return soak_linux(machine, options);
    }
    let migrations = arguments.migrations.unwrap_or(500);
    println!("{migrations} migrations by seed {seed}");
    let summary = soak::run(machine, Options { migrations, seed });
    println!("{summary}");
    println!("no page was harmed, and nothing was left behind");
    ExitCode::SUCCESS
}

fn soak_linux(machine: Machine, options: linux::Options) -> ExitCode {
    println!("Linux guests: {options:?}");
    let (boots, summary) = linux::run(machine, options);
    println!("{summary}");
    println!("{boots}");
    println!("no check failed, no heartbeat is missing");
    let moved = summary.counted("result completed");
    if !boots.failures.is_empty() || moved < options.migrations {
        println!("but not every boot or move went well");
        return ExitCode::FAILURE;
    }
    println!("every boot and every move went well");
    ExitCode::SUCCESS
}
