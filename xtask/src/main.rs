//! Everything that a developer does with this repository: `cargo xtask COMMAND`. One command per file.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod context;
mod cpio;
mod images;
mod kernel;
mod packages;

use clap::{Parser, Subcommand};

use context::Context;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Build, demo, test and check Shoal")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build the guest images
    Images {
        /// Only this one
        only: Option<images::Image>,
    },
    /// Install the system packages that building and testing need, or say which
    Packages,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let context = Context::new()?;
    match arguments.command {
        Command::Images { only: None } => images::build_all(&context),
        Command::Images { only: Some(image) } => images::build(&context, image),
        Command::Packages => packages::ensure_all(),
    }
}
