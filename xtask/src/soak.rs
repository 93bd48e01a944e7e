//! `cargo xtask soak`: migrations in a row, of every kind, and what they left.

use std::process::Command;

use anyhow::Result;

use crate::build::{program, programs};
use crate::context::{Context, run};
use crate::images::{self, Image};

/// Builds what it needs and runs it. `options` are those of the soaking program.
///
/// # Errors
/// If something cannot be built, a guest is harmed or something is left behind.
pub fn run_soak(context: &Context, options: &[String]) -> Result<()> {
    programs(context)?;
    let linux = options.iter().any(|option| option == "--linux");
    images::build(context, if linux { Image::LinuxChecks } else { Image::Probe })?;
    run(Command::new(program(context, "shoal-soak")).args(options))
}
