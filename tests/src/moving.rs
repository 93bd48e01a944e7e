//! A migration that was begun with the `shoal` command, and is looked at and changed with it while it runs.

use std::process::Child;

use serde_json::Value;

use crate::shoal::{Failure, Shoal};
use crate::wait::{self, seconds};

/// `shoal migrate` of a VM that goes on.
#[derive(Debug)]
pub struct Moving {
    shoal: Shoal,
    vm: String,
    command: Child,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// The command's exit code.
    pub code: i32,
    /// What it said to people.
    pub stderr: String,
    /// What it said to scripts: the report, or an error.
    pub report: Value,
}

impl Moving {
    /// Begins it: `shoal migrate VM` with more arguments.
    #[must_use]
    pub fn start(shoal: &Shoal, vm: &str, more: &[&str]) -> Self {
        let mut args = vec!["migrate", vm];
        args.extend(more);
        Self {
            shoal: shoal.clone(),
            vm: vm.to_owned(),
            command: shoal.start(&args),
        }
    }

    /// Waits until what `shoal migrations` says of it is as wanted. It must not end before.
    pub fn wait_for(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait::until(what, seconds(60), || {
            if let Some(ended) = self.command.try_wait().expect("its state") {
                panic!("the migration of {} ended before {what}: {ended}", self.vm);
            }
            self.now().filter(|now| wanted(now))
        })
    }

    /// What `shoal migrations` says of it, if it is under way.
    #[must_use]
    pub fn now(&self) -> Option<Value> {
        let running = self.shoal.json(&["migrations", "--vm", &self.vm, "--running"]);
        running.get(0).cloned()
    }

    /// Waits until it is in pre-copy and has sent so many bytes.
    pub fn wait_until_sent(&mut self, bytes: u64) -> Value {
        self.wait_for("pages to be sent in pre-copy", |now| {
            let progress = &now["progress"];
            progress["phase"] == "pre-copy" && progress["bytes_sent"].as_u64() >= Some(bytes)
        })
    }

    /// Waits until the VM runs at its destination, and makes the rest of its memory come slowly.
    pub fn hold_in_post_copy(&mut self) {
        self.wait_for("post-copy", |now| now["progress"]["phase"] == "post-copy");
        self.set(&["--bandwidth", "1MiB"]);
    }

    /// `shoal migrations set` with these arguments; answers the policy that holds.
    pub fn set(&self, more: &[&str]) -> Value {
        let mut args = vec!["migrations", "set", &self.vm];
        args.extend(more);
        self.shoal.json(&args)
    }

    /// `shoal migrations cancel`, which must work.
    pub fn cancel(&self) -> Value {
        self.shoal.json(&["migrations", "cancel", &self.vm])
    }

    /// `shoal migrations cancel`, which must be refused.
    #[must_use]
    pub fn cancel_fails(&self) -> Failure {
        self.shoal.fails(&["migrations", "cancel", &self.vm])
    }

    /// Waits for its end.
    #[must_use]
    pub fn end(self) -> Ended {
        let output = self.command.wait_with_output().expect("an end of the migration");
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Ended {
            code: output.status.code().unwrap_or(-1),
            report: serde_json::from_str(&stdout).unwrap_or_else(|error| {
                panic!("the migration of {}: {error} in '{stdout}': {stderr}", self.vm)
            }),
            stderr,
        }
    }

    /// Waits for its end, which must be a good one. Answers the report.
    pub fn completes(self) -> Value {
        let ended = self.end();
        assert!(
            ended.code == 0 && ended.report["result"] == "completed",
            "{ended:?}"
        );
        ended.report
    }
}
