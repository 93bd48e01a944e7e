//! `cargo xtask check`: what needs no guest.

use std::process::Command;

use anyhow::Result;

use crate::build::cargo;
use crate::context::{Context, run, step};
use crate::{images, packages};

/// Formatting and lints; unit tests too, unless `lints_only`.
///
/// # Errors
/// The first that does not pass.
pub fn run_checks(context: &Context, lints_only: bool) -> Result<()> {
    step("formatting", || {
        run(cargo(context).args(["fmt", "--all", "--check"]))?;
        run(guests(context).args(["fmt", "--all", "--check"]))
    })?;
    // As the programs are built, so that both have one set of macros and build scripts.
    let clippy = |mut clippy: Command, targets: &[&str]| {
        clippy.args(["clippy", "--release", "--workspace"]).args(targets);
        run(clippy.args(["--", "-D", "warnings"]))
    };
    step("lints", || {
        clippy(cargo(context), &["--all-targets"])?;
        clippy(cargo(context), &["--test", "e2e"])?;
        clippy(guests(context), &["--all-targets"])
    })?;
    if lints_only {
        return Ok(());
    }
    packages::ensure(packages::TESTS)?;
    step("unit tests", || {
        run(cargo(context).args(["test", "--workspace"]))?;
        images::test_guest_programs(context, None)
    })
}

/// `cargo` for the guest programs, which are a workspace of their own.
fn guests(context: &Context) -> Command {
    let mut command = cargo(context);
    command.current_dir(context.root().join("images"));
    command
}
