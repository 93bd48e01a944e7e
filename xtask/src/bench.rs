//! `cargo xtask bench`: what migrations cost on this machine. The method is in docs/benchmarks.md.

use std::process::Command;

use anyhow::Result;

use crate::build::{program, programs};
use crate::context::{Context, run};
use crate::images::{self, Image};

/// The word that asks for migrations of every kind.
const MIGRATE: &str = "migrate";

/// Builds what is measured and measures it. `options` are those of the measuring program.
///
/// # Errors
/// If something cannot be built, a migration fails or a guest is harmed.
pub fn run_benchmarks(context: &Context, options: &[String]) -> Result<()> {
    programs(context)?;
    images::build(context, Image::Probe)?;
    let migrate = options.first().is_some_and(|word| word == MIGRATE);
    let (command, options) = options.split_at(usize::from(migrate));
    let name = if migrate { "migrate.json" } else { "bench.json" };
    run(Command::new(program(context, "shoal-bench"))
        .args(command)
        .arg("--out")
        .arg(context.target_dir("bench")?.join(name))
        .args(options))
}
