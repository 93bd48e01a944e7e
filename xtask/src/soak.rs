//! `cargo xtask soak`: migrations in a row, of every kind, and what they left.

use std::process::Command;

use anyhow::Result;

use crate::build::{program, programs};
use crate::context::{Context, run};
use crate::images::{self, Image};
use crate::kernel::Kernel;

/// Builds what it needs and runs it. `options` are those of the soaking program.
///
/// # Errors
/// If something cannot be built, a guest is harmed or something is left behind.
pub fn run_soak(context: &Context, options: &[String]) -> Result<()> {
    programs(context)?;
    let linux = options.iter().any(|option| option == "--linux");
    let image = if linux { Image::LinuxChecks } else { Image::Probe };
    images::build(context, image, &[Kernel::of_this_host()])?;
    run(Command::new(program(context, "shoal-soak")).args(options))
}
