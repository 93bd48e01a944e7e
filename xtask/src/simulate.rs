//! `cargo xtask simulate`: every scenario of scheduler/simulate, tables and pictures to target/simulate. docs/simulation.md
//! explains them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::build::{cargo, program};
use crate::context::{Context, run, step};

/// Builds the simulator and runs all scenarios, or those among `options`.
///
/// # Errors
/// If it cannot be built, or a scenario or trace cannot be read.
pub fn run_simulations(context: &Context, options: &[String]) -> Result<()> {
    step("building shoal-simulate", || {
        run(cargo(context).args(["build", "--release", "--package", "shoal-simulate"]))
    })?;
    let mut command = Command::new(program(context, "shoal-simulate"));
    command
        .arg("--out")
        .arg(context.target_dir("simulate")?)
        .args(options);
    // The word after --traces is a folder, not a scenario.
    let words = options.iter().scan(false, |is_value, word| {
        let value = std::mem::replace(is_value, word == "--traces");
        Some((!value && !word.starts_with('-')).then_some(word))
    });
    if words.flatten().next().is_none() {
        command.args(scenarios(context)?);
    }
    run(&mut command)
}

fn scenarios(context: &Context) -> Result<Vec<PathBuf>> {
    let folder = context.root().join("scheduler/simulate/scenarios");
    let entries = fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        files.push(entry?.path());
    }
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    Ok(files)
}
