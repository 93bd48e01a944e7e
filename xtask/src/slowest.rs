//! Runs tests one at a time, and says which took longest.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::context::succeeded;

/// So many are named.
const NAMED: usize = 10;

/// Runs a test program that prints `test NAME ... ok` for each test in turn, with its output on ours, and names the slowest.
///
/// # Errors
/// If it cannot be run or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let mut output = BufReader::new(child.stdout.take().context("its output")?);
    let mut times: Vec<(Duration, String)> = vec![];
    let mut before = Instant::now();
    let mut line = vec![];
    loop {
        line.clear();
        if output.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        std::io::stdout().lock().write_all(&line)?;
        if let Some(name) = name_of(&String::from_utf8_lossy(&line)) {
            times.push((before.elapsed(), name));
            before = Instant::now();
        }
    }
    let status = child.wait()?;
    times.sort();
    println!("    the slowest:");
    for (time, name) in times.iter().rev().take(NAMED) {
        println!("    {:6.1} s  {name}", time.as_secs_f64());
    }
    succeeded(status, &program)
}

fn name_of(line: &str) -> Option<String> {
    let (name, _) = line.trim_start().strip_prefix("test ")?.split_once(" ... ")?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_tests() {
        assert_eq!(name_of("test a::b ... ok\n").as_deref(), Some("a::b"));
        assert_eq!(name_of("test result: ok. 3 passed"), None);
        assert_eq!(name_of("running 3 tests"), None);
    }
}
