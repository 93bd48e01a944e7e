//! Runs the end-to-end tests, and says which took longest.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::context::{Context, succeeded};

/// So many are named.
const NAMED: usize = 10;

/// Runs a test program with its output on ours, and names the slowest tests: those that write how long they took to the file
/// that `SHOAL_TEST_TIMES` names (`tests/src/machine.rs`).
///
/// # Errors
/// If it cannot be run or fails.
pub fn run(context: &Context, command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let times = context.target_dir("test")?.join("times");
    fs::write(&times, "").with_context(|| format!("cannot write {}", times.display()))?;
    let status = command
        .env("SHOAL_TEST_TIMES", &times)
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    let written = fs::read_to_string(&times).with_context(|| format!("cannot read {}", times.display()))?;
    println!("    the slowest:");
    for (seconds, name) in slowest(&written) {
        println!("    {seconds:6.1} s  {name}");
    }
    succeeded(status, &program)
}

/// The slowest first. A test may use the machine several times.
fn slowest(written: &str) -> Vec<(f64, &str)> {
    let mut times: Vec<(f64, &str)> = written
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(seconds, name)| Some((seconds.parse().ok()?, name)))
        .collect();
    times.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    times.truncate(NAMED);
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_come_first_and_torn_lines_are_passed_over() {
        let written = "1.5 a::quick\n30.25 b::slow\n2\nx c::odd\n";
        assert_eq!(slowest(written), [(30.25, "b::slow"), (1.5, "a::quick")]);
    }
}
