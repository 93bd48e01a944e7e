//! `cargo xtask bench`: what migrations cost on this machine. The method is in docs/benchmarks.md.

use std::process::Command;

use anyhow::Result;

use crate::build::{program, programs};
use crate::context::{Context, run, step};
use crate::images::{self, Image};
use crate::kernel::Kernel;

const JUDGEMENT: &str = "judgement.json";

/// Words that ask for more than the basic cases, each with a file of its own for its figures.
const COMMANDS: [(&str, &str); 5] = [
    ("migrate", "migrate.json"),
    ("agents", "agents.json"),
    ("judgement", JUDGEMENT),
    ("linux", "linux.json"),
    ("sampling", "sampling.json"),
];

/// Builds what is measured and measures it. `options` are those of the measuring program.
///
/// # Errors
/// If something cannot be built, a migration fails or a guest is harmed.
pub fn run_benchmarks(context: &Context, options: &[String]) -> Result<()> {
    programs(context)?;
    let asked = |(word, _): &&(&str, &str)| options.first().is_some_and(|first| first == word);
    let name = COMMANDS.iter().find(asked).map(|(_, name)| *name);
    let linux = name == Some("linux.json");
    let image = if linux { Image::LinuxChecks } else { Image::Probe };
    // QEMU without KVM is at its best with the plain kernel, whatever this host's KVM is.
    let host = [Kernel::of_this_host()];
    if name == Some(JUDGEMENT) && !options.iter().any(|option| option == "--quick") {
        images::build(context, Image::Linux, &host)?;
    }
    let alone = options.iter().any(|option| option == "--no-qemu");
    images::build(context, image, if linux && !alone { &Kernel::ALL } else { &host })?;
    let (command, options) = options.split_at(usize::from(name.is_some()));
    let name = name.unwrap_or("bench.json");
    run(Command::new(program(context, "shoal-bench"))
        .args(command)
        .arg("--out")
        .arg(context.target_dir("bench")?.join(name))
        .args(options))
}

/// The rows of `bench judgement` that have a short form: does the scheduler leave alone what is well, and relieve a hot node?
///
/// # Errors
/// If something cannot be built, or one of them fails.
#[expect(dead_code, reason = "to be the last step of `cargo xtask test`")]
pub fn judge_quickly(context: &Context) -> Result<()> {
    step("judging what the scheduler does", || {
        run_benchmarks(context, &["judgement".to_owned(), "--quick".to_owned()])
    })
}
