//! Which tests run, and where their programs are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::build;
use crate::context::Context;

/// How long one test may take, by the machine's own clock.
const UNIT_TEST_LIMIT: Duration = Duration::from_secs(120);
const END_TO_END_TEST_LIMIT: Duration = Duration::from_secs(300);

/// What runs if no name is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// All that meets KVM and ends within its time on such a machine.
    Whole,
    /// A few that meet most of it, in about three minutes.
    Quick,
}

impl Selection {
    /// Beginnings of names of unit tests of `shoal-vmm`.
    fn unit_tests(self) -> &'static [&'static str] {
        match self {
            Self::Whole => &["arch::", "control::", "memory::", "throttle::", "vcpu::"],
            Self::Quick => &["control::", "throttle::tests::a_"],
        }
    }

    /// Beginnings of names of end-to-end tests. Others fill hundreds of MiB, or are about speed, networks or daemons.
    fn end_to_end_tests(self) -> &'static [&'static str] {
        match self {
            Self::Whole => &[
                "clock::",
                "linux::",
                "memory_backing::",
                "postcopy::",
                "previous_protocol::a_recorded",
                "suspend::a_suspended",
                "upgrade::",
            ],
            Self::Quick => &[
                "linux::",
                "memory_backing::",
                "postcopy::a_vm_that_is_stopped",
                "previous_protocol::a_recorded",
            ],
        }
    }
}

/// A test to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// As its program lists it.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Where it is to be run.
    pub directory: PathBuf,
    /// How long it may take.
    pub limit: Duration,
}

/// The tests whose name contains `filter`; without one those of `selection`.
///
/// # Errors
/// If the programs do not build or there is no such test.
pub fn tests(context: &Context, selection: Selection, filter: Option<&str>) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    for (program, directory, beginnings, limit) in [
        (
            build::test_program(context, &["--lib"], "shoal_vmm")?,
            "vmm",
            selection.unit_tests(),
            UNIT_TEST_LIMIT,
        ),
        (
            build::test_program(context, &["--test", "e2e"], "e2e")?,
            "tests",
            selection.end_to_end_tests(),
            END_TO_END_TEST_LIMIT,
        ),
    ] {
        let names = list(&program)?;
        for beginning in beginnings {
            ensure!(
                names.iter().any(|name| name.starts_with(beginning)),
                "no test in {} is called {beginning}... any more; see {}",
                program.display(),
                file!()
            );
        }
        let wanted = names.into_iter().filter(|name| match filter {
            Some(filter) => name.contains(filter),
            None => beginnings.iter().any(|beginning| name.starts_with(beginning)),
        });
        tests.extend(wanted.map(|name| Test {
            name,
            program: program.clone(),
            directory: context.root().join(directory),
            limit,
        }));
    }
    match (filter, tests.is_empty()) {
        (Some(filter), true) => {
            bail!("no unit test of shoal-vmm and no end-to-end test has '{filter}' in its name")
        }
        _ => Ok(tests),
    }
}

/// Names of the tests in a program.
fn list(program: &Path) -> Result<Vec<String>> {
    let output = Command::new(program)
        .args(["--list", "--format", "terse"])
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(output.status.success(), "{} --list failed", program.display());
    let text = String::from_utf8(output.stdout).context("names of tests")?;
    Ok(parse_list(&text))
}

/// Lines as `some::name: test`; benchmarks are not wanted.
fn parse_list(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| Some(line.strip_suffix(": test")?.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_from_a_terse_list() {
        let list = parse_list("a::b: test\nc: benchmark\nd: test\n");
        assert_eq!(list, ["a::b", "d"]);
    }
}
