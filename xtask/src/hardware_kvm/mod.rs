//! `cargo xtask test --hardware-kvm`: tests on KVM with hardware virtualization, on machines that have none. QEMU emulates an AMD CPU
//! with SVM, and Debian's kernel with `kvm_amd` boots on it; tests run in there as they were built here. See docs/testing.md.

mod machine;
mod outfit;
mod report;
mod selection;

pub use selection::Selection;

use std::fs::File;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::build::programs;
use crate::context::{Context, step};
use crate::kernel::Kernel;
use crate::{images, packages};
use machine::Machine;
use outfit::Outfit;
use report::Report;

/// How long the tests of a run may take, together and with the boot.
fn limit(selection: Selection) -> Duration {
    match selection {
        Selection::Quick => Duration::from_secs(30 * 60),
        Selection::Whole => Duration::from_secs(2 * 60 * 60),
    }
}

/// Builds what the tests need and runs those whose name contains `filter`; without one those of `selection`.
///
/// # Errors
/// If something cannot be had or built, another run is going on, or a test fails.
pub fn run_tests(context: &Context, selection: Selection, filter: Option<&str>) -> Result<()> {
    packages::ensure_all()?;
    let directory = context.target_dir("hardware-kvm")?;
    // Released when this process ends, however it does.
    let lock = File::create(directory.join("lock"))?;
    if lock.try_lock().is_err() {
        bail!(
            "another `cargo xtask test --hardware-kvm` is running in {}",
            directory.display()
        );
    }
    let outfit = Outfit::fetch(context)?;
    programs(context)?;
    images::build_all(context, &Kernel::ALL)?;
    let tests = step("building the tests", || {
        selection::tests(context, selection, filter)
    })?;
    step("tests on emulated hardware KVM", || {
        let machine = Machine::start(&outfit, &directory, &tests)?;
        let mut report = Report::new(&tests);
        let watched = machine.watch(&mut report, &tests, limit(selection));
        drop(machine);
        let all_is_well = report.summary();
        watched?;
        if !all_is_well {
            bail!(
                "the console of the machine's kernel is in {}",
                directory.join("console.log").display()
            );
        }
        Ok(())
    })
}
