//! The `shoal` command line.
//!
//! - [`args`]: what can be typed; one enum variant per command
//! - [`commands`]: one file per command
//! - [`client`]: the connection to the cluster API, the only door there is
//! - [`error`]: every failure, with its exit code and its JSON form
//! - [`output`], [`view`], [`format`]: tables for people, JSON for scripts
//! - [`page`]: lines that are safe for a terminal, whoever wrote what is in them
//! - [`certificates`]: an authority and what it issues, for migrations
//! - [`image_source`]: reads an image directory or tar
//! - [`ring3`]: what is said of guests whose kernel runs in ring 3
//! - [`local`]: a whole cluster on this machine (`up` and `down`)
//!
//! Exit codes: 0 done, 1 failed, 2 usage, 3 nothing fits, 4 cluster unreachable. `run` without `--detach` exits with
//! the workload's own status, and with 1 if there is none. Errors are said on stderr; with `-o json` an object `{"error": {...}}` is also written
//! to stdout, so that a script always finds JSON there.
#![forbid(unsafe_code)]

mod args;
mod certificates;
mod client;
mod commands;
mod daemon;
mod error;
mod format;
mod image_source;
mod local;
mod output;
mod page;
mod policy_args;
mod ring3;
mod rule_args;
mod view;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, wants_json};
use crate::error::CliError;
use crate::output::{Format, Output};

fn main() -> ExitCode {
    // Daemons and VMMs live on, and are not to keep open what whoever called this had open.
    close_fds::set_fds_cloexec(3, &[]);
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version, too, come as errors.
            if error.use_stderr() && wants_json(std::env::args_os().skip(1)) {
                Output::new(Format::Json).error_object(&CliError::from(&error));
            }
            error.exit();
        }
    };
    let output = cli.global.output();
    match commands::run(cli) {
        Ok(code) => code,
        Err(error) => output.error(&error),
    }
}
