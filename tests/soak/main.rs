//! `cargo xtask soak`: migrations in a row, of every kind, and what they left.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this program's output")]

use clap::Parser;
use shoal_tests::machine::Machine;
use shoal_tests::soak::{self, Options};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask soak",
    about = "Migrate a guest again and again, by every policy"
)]
struct Arguments {
    /// How many migrations
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    migrations: u32,
    /// Decides what they are like: the same seed, the same migrations
    #[arg(long, default_value_t = soak::SEED)]
    seed: u64,
}

fn main() {
    let Arguments { migrations, seed } = Arguments::parse();
    let Some(machine) = Machine::with_kvm("the soak") else {
        return;
    };
    println!("{migrations} migrations by seed {seed}");
    let summary = soak::run(machine, Options { migrations, seed });
    println!("{summary}");
    println!("no page was harmed, and nothing was left behind");
}
