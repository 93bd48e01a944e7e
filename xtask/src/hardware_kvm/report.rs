//! What the machine says on its second serial port (init.sh), and how it is shown: as any test run.

use std::time::{Duration, Instant};

use crate::hardware_kvm::selection::Test;

/// How often something that lasts is told.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// A line from the machine.
#[derive(Debug, Clone, PartialEq)]
enum Line<'a> {
    /// It runs tests from now on.
    Ready { uptime: f64, clocksource: &'a str },
    /// It cannot run any.
    Error(&'a str),
    /// A test begins.
    Start(usize),
    /// It has run for too long, and is ended.
    Late,
    /// Output of a test that failed.
    Output(&'a str),
    /// A test has ended, with this exit status.
    End { test: usize, status: u32, seconds: f64 },
    /// All have.
    Done,
}

impl<'a> Line<'a> {
    /// `None` for what is none of them: the firmware may have written, too.
    fn parse(text: &'a str) -> Option<Self> {
        let text = text.trim_end_matches(['\r', '\n']);
        if let Some(output) = text.strip_prefix("| ") {
            return Some(Self::Output(output));
        }
        let text = text.strip_prefix("shoal: ")?;
        let (kind, rest) = text.split_once(' ').unwrap_or((text, ""));
        let mut words = rest.split(' ');
        Some(match kind {
            "ready" => Self::Ready {
                uptime: words.next()?.parse().ok()?,
                clocksource: words.next()?,
            },
            "error" => Self::Error(rest),
            "start" => Self::Start(words.next()?.parse().ok()?),
            "late" => Self::Late,
            "end" => {
                let (test, status) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
                let (start, end): (f64, f64) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
                Self::End {
                    test,
                    status,
                    seconds: end - start,
                }
            }
            "done" => Self::Done,
            _ => return None,
        })
    }
}

/// How far the machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It does not yet run tests.
    Booting,
    /// It is between two tests, or before the first.
    Ready,
    /// It runs the test with this number.
    Testing(usize),
    /// It has run all.
    Done,
    /// It said that it cannot run any.
    Failed,
}

/// A run as it goes.
#[derive(Debug)]
pub struct Report<'a> {
    tests: &'a [Test],
    began: Instant,
    stage: Stage,
    /// When `stage` began.
    since: Instant,
    told: Instant,
    is_late: bool,
    output: Vec<String>,
    failures: Vec<(usize, Vec<String>)>,
    passed: usize,
}

impl<'a> Report<'a> {
    /// Of a machine that has just been started.
    #[must_use]
    pub fn new(tests: &'a [Test]) -> Self {
        let now = Instant::now();
        Self {
            tests,
            began: now,
            stage: Stage::Booting,
            since: now,
            told: now,
            is_late: false,
            output: Vec::new(),
            failures: Vec::new(),
            passed: 0,
        }
    }

    /// How far it is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Takes a line from the machine, and shows what it means.
    pub fn line(&mut self, text: &str) {
        match Line::parse(text) {
            Some(Line::Ready { uptime, clocksource }) => {
                println!("    the machine is up after {uptime:.0} s; its clock is {clocksource}\n");
                println!("running {} tests", self.tests.len());
                self.enter(Stage::Ready);
            }
            Some(Line::Error(error)) => {
                println!("    the machine says: {error}");
                self.enter(Stage::Failed);
            }
            Some(Line::Start(test)) if test < self.tests.len() => {
                self.is_late = false;
                self.output.clear();
                self.enter(Stage::Testing(test));
            }
            Some(Line::Late) => self.is_late = true,
            Some(Line::Output(line)) => self.output.push(line.to_owned()),
            Some(Line::End {
                test,
                status,
                seconds,
            }) if self.stage == Stage::Testing(test) => {
                self.end(test, status, seconds);
                self.enter(Stage::Ready);
            }
            Some(Line::Done) => self.enter(Stage::Done),
            Some(Line::Start(_) | Line::End { .. }) | None => {}
        }
    }

    fn end(&mut self, test: usize, status: u32, seconds: f64) {
        let name = &self.tests[test].name;
        if status == 0 && !self.is_late {
            self.passed += 1;
            println!("test {name} ... ok ({seconds:.1} s)");
            return;
        }
        let why = if self.is_late {
            format!("no end in {} s", self.tests[test].limit.as_secs())
        } else {
            format!("exit status {status}, {seconds:.1} s")
        };
        println!("test {name} ... FAILED ({why})");
        self.failures.push((test, std::mem::take(&mut self.output)));
    }

    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.since = Instant::now();
        self.told = self.since;
    }

    /// Shows that something goes on, if nothing was shown for a while.
    pub fn sign_of_life(&mut self) {
        if self.told.elapsed() < SIGN_OF_LIFE {
            return;
        }
        self.told = Instant::now();
        let seconds = self.since.elapsed().as_secs();
        match self.stage {
            Stage::Booting => println!("    ... {seconds} s, the machine boots"),
            Stage::Testing(test) => println!("    ... {seconds} s, {}", self.tests[test].name),
            Stage::Ready | Stage::Done | Stage::Failed => {}
        }
    }

    /// Shows the output of tests that failed and the sum. Answers whether all tests have run and passed.
    #[must_use]
    pub fn summary(&self) -> bool {
        if !self.failures.is_empty() {
            println!("\nfailures:");
        }
        for (test, output) in &self.failures {
            println!("\n---- {} ----\n{}", self.tests[*test].name, output.join("\n"));
        }
        let not_run = self.tests.len() - self.passed - self.failures.len();
        let all_is_well = self.passed == self.tests.len();
        println!(
            "\ntest result: {}. {} passed; {} failed; {not_run} not run to an end; finished in {:.0} s\n",
            if all_is_well { "ok" } else { "FAILED" },
            self.passed,
            self.failures.len(),
            self.began.elapsed().as_secs_f64()
        );
        all_is_well
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tests(count: usize) -> Vec<Test> {
        let test = |n| Test {
            name: format!("test{n}"),
            program: "program".into(),
            directory: "directory".into(),
            limit: Duration::from_secs(1),
        };
        (0..count).map(test).collect()
    }

    #[test]
    fn lines_of_the_machine_are_read() {
        let end = Line::End {
            test: 3,
            status: 101,
            seconds: 2.5,
        };
        assert_eq!(Line::parse("shoal: end 3 101 10.25 12.75\r\n"), Some(end));
        assert_eq!(Line::parse("| a line"), Some(Line::Output("a line")));
        assert_eq!(
            Line::parse("shoal: error no /dev/kvm"),
            Some(Line::Error("no /dev/kvm"))
        );
        for other in ["", "SeaBIOS", "shoal: start", "shoal: end 3 x 1 2", "shoal: what"] {
            assert_eq!(Line::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_run_is_well_only_if_each_test_has_passed() {
        let tests = tests(2);
        let run = |lines: &[&str]| {
            let mut report = Report::new(&tests);
            lines.iter().for_each(|line| report.line(line));
            (report.stage(), report.summary())
        };
        let first = ["shoal: ready 9.5 tsc", "shoal: start 0", "shoal: end 0 0 1.0 2.0"];
        let with = |more: &[&'static str]| [&first[..], more].concat();
        assert_eq!(run(&first), (Stage::Ready, false));
        assert_eq!(run(&with(&["shoal: done"])), (Stage::Done, false));
        assert_eq!(run(&with(&["shoal: start 1"])), (Stage::Testing(1), false));
        let ended = ["shoal: start 1", "shoal: end 1 0 2.0 3.0", "shoal: done"];
        assert_eq!(run(&with(&ended)), (Stage::Done, true));
        let failed = ["shoal: start 1", "shoal: end 1 101 2.0 3.0", "shoal: done"];
        assert_eq!(run(&with(&failed)), (Stage::Done, false));
        let late = [
            "shoal: start 1",
            "shoal: late",
            "shoal: end 1 0 2.0 3.0",
            "shoal: done",
        ];
        assert_eq!(run(&with(&late)), (Stage::Done, false));
        // Of a test that the machine was not told of, or of one that has not begun.
        let strange = ["shoal: start 7", "shoal: end 1 0 2.0 3.0", "shoal: done"];
        assert_eq!(run(&with(&strange)), (Stage::Done, false));
    }
}
