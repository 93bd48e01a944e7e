//! `cargo xtask test`: every test there is, the end-to-end tests on real guests last.

use anyhow::Result;

use crate::build::{cargo, programs_and_tests};
use crate::context::{Context, run, step};
use crate::{images, packages, slowest};

/// Builds what the tests need and runs those whose name contains `filter`.
///
/// # Errors
/// If something cannot be built or a test fails.
pub fn run_tests(context: &Context, filter: Option<&str>) -> Result<()> {
    packages::ensure_all()?;
    images::build_all_beside(context, || programs_and_tests(context))?;
    step("unit tests", || {
        let mut command = cargo(context);
        command.args(["test", "--release", "--workspace"]);
        run(command.args(filter))?;
        images::test_guest_programs(context, filter)
    })?;
    step("end-to-end tests", || {
        let mut command = cargo(context);
        command
            .args(["test", "--release", "--workspace", "--test", "e2e", "--"])
            .args(filter);
        // Three at a time: most of them wait most of the time. Those that need the whole machine lock it.
        slowest::run(context, command.arg("--test-threads=3"))
    })
}
