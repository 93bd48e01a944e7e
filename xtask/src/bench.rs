//! `cargo xtask bench`: what migrations cost on this machine. The method is in docs/benchmarks.md.

use std::process::Command;

use anyhow::Result;

use crate::build::{cargo, program, programs};
use crate::context::{Context, run, step};
use crate::images::{self, Image};

/// Builds what is measured and measures it. `options` are those of the measuring program.
///
/// # Errors
/// If something cannot be built, a migration fails or a guest is harmed.
pub fn run_benchmarks(context: &Context, options: &[String]) -> Result<()> {
    programs(context)?;
    images::build(context, Image::Probe)?;
    step("building shoal-bench", || {
        let package = ["--package", "shoal-tests", "--bin", "shoal-bench"];
        run(cargo(context).args(["build", "--release"]).args(package))
    })?;
    let results = context.target_dir("bench")?.join("bench.json");
    run(Command::new(program(context, "shoal-bench"))
        .arg("--out")
        .arg(results)
        .args(options))
}
