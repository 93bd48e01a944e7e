//! The `shoal` command, used as a script would use it.

use std::ffi::OsStr;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::paths;

/// A `shoal` command for one cluster.
#[derive(Debug, Clone)]
pub struct Shoal {
    endpoint: String,
    /// A command to run it under, such as `ip netns exec NAME`.
    prefix: Vec<String>,
}

/// A command that failed, as it should.
#[derive(Debug)]
pub struct Failure {
    /// Its exit code.
    pub code: i32,
    /// What it said to people.
    pub stderr: String,
    /// What it said to scripts, if they asked.
    pub json: Value,
}

impl Shoal {
    /// For the cluster at `endpoint`.
    #[must_use]
    pub fn new(endpoint: &str) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            prefix: Vec::new(),
        }
    }

    /// Runs under another command.
    #[must_use]
    pub fn under(mut self, prefix: &[&str]) -> Self {
        self.prefix = prefix.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Where the cluster answers.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The command with these arguments, ready to run.
    #[must_use]
    pub fn command<A: AsRef<OsStr>>(&self, args: &[A]) -> Command {
        let program = paths::program("shoal");
        let mut words = self.prefix.iter();
        let mut command = match words.next() {
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(program);
                command
            }
            None => Command::new(program),
        };
        command
            .args(args)
            .env("SHOAL_ENDPOINT", &self.endpoint)
            .env_remove("SHOAL_VMM")
            // It keeps nothing for the user who runs the tests: what is said once to a user is said each time.
            .env("XDG_STATE_HOME", "/dev/null")
            .stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    #[must_use]
    pub fn output<A: AsRef<OsStr>>(&self, args: &[A]) -> Output {
        self.command(args).output().expect("shoal starts")
    }

    /// Runs it; it must succeed. Answers what it wrote.
    pub fn ok<A: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[A]) -> String {
        let output = self.output(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "shoal {args:?} failed with {}: {stderr}",
            output.status
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs it with `-o json`; it must succeed.
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&json_args(args));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("shoal {args:?}: {error} in {text}"))
    }

    /// Runs it with `-o json`; it must fail.
    #[must_use]
    pub fn fails(&self, args: &[&str]) -> Failure {
        let output = self.output(&json_args(args));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success(),
            "shoal {args:?} succeeded although it should not"
        );
        let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        Failure {
            code: output.status.code().unwrap_or(-1),
            stderr,
            json,
        }
    }

    /// Starts it with `-o json` and goes on.
    #[must_use]
    pub fn start(&self, args: &[&str]) -> Child {
        self.command(&json_args(args))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("shoal starts")
    }
}

/// `-o json` goes before a `--` that begins the workload's arguments.
fn json_args<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["-o", "json"];
    all.extend(args);
    all
}
