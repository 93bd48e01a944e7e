//! Builds the programs: always in release, because guests and clusters are measured.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Deserializer, Value};

use crate::context::{Context, run, step};

/// `cargo`, in the repository and with its target directory.
#[must_use]
pub fn cargo(context: &Context) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(context.root())
        .env("CARGO_TARGET_DIR", context.target());
    // Of xtask itself. Build scripts look at some of them (ring's does), and would build again what a plain cargo has built.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Builds `shoal`, `shoal-vmm` and the other programs of the workspace.
///
/// Always the whole workspace, here and for the tests: cargo builds a dependency again for every other set of features that
/// a choice of packages asks of it.
///
/// # Errors
/// If they do not build.
pub fn programs(context: &Context) -> Result<()> {
    step("building shoal and shoal-vmm", || {
        run(cargo(context).args(["build", "--release", "--workspace", "--bins"]))
    })
}

/// The same and all tests.
///
/// # Errors
/// If they do not build.
pub fn programs_and_tests(context: &Context) -> Result<()> {
    step("building programs and tests", || {
        run(cargo(context).args(["build", "--release", "--workspace", "--all-targets"]))?;
        // Not among all targets, as it is run by name only.
        run(cargo(context).args(["build", "--release", "--workspace", "--test", "e2e"]))
    })
}

/// The program of the tests of one target, built as all of the workspace. `kind` chooses its like, such as `--lib`.
///
/// # Errors
/// If it does not build.
pub fn test_program(context: &Context, kind: &[&str], target: &str) -> Result<PathBuf> {
    let output = cargo(context)
        .args(["test", "--release", "--workspace", "--no-run", "--quiet"])
        .arg("--message-format=json-render-diagnostics")
        .args(kind)
        .stderr(Stdio::inherit())
        .output()
        .context("cargo")?;
    ensure!(
        output.status.success(),
        "cargo test --no-run ended with {}",
        output.status
    );
    Deserializer::from_slice(&output.stdout)
        .into_iter::<Value>()
        .map_while(Result::ok)
        .filter(|message| message["target"]["name"] == target && message["profile"]["test"] == true)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo builds no tests of {target}"))
}

/// A program that was built.
#[must_use]
pub fn program(context: &Context, name: &str) -> PathBuf {
    context.target().join("release").join(name)
}
