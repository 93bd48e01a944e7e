//! Where results go: tables for people, JSON for scripts, errors on stderr.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::Serialize;

use crate::error::CliError;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For people with wide terminals: more columns of nodes and VMs.
    Wide,
    /// For scripts.
    Json,
}

/// Standard output in the chosen format, and standard error.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    format: Format,
}

impl Output {
    /// Output in this format.
    #[must_use]
    pub fn new(format: Format) -> Self {
        Self { format }
    }

    /// True if results are JSON.
    #[must_use]
    pub fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// True if people asked for more columns.
    #[must_use]
    pub fn is_wide(self) -> bool {
        self.format == Format::Wide
    }

    /// Writes one result: as pretty JSON, or as the text that `human` makes of it.
    pub fn show<T: Serialize + ?Sized>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        let text = match self.format {
            Format::Json => serde_json::to_string_pretty(value).map_err(json_error)?,
            Format::Table | Format::Wide => human(value),
        };
        self.line(&text)
    }

    /// Writes one result of a stream: as JSON on one line, or as the text that `human` makes of it.
    pub fn show_line<T: Serialize + ?Sized>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        let text = match self.format {
            Format::Json => serde_json::to_string(value).map_err(json_error)?,
            Format::Table | Format::Wide => human(value),
        };
        self.line(&text)
    }

    /// Writes a line to stdout.
    pub fn line(self, text: &str) -> Result<(), CliError> {
        self.bytes(format!("{text}\n").as_bytes())
    }

    /// Writes bytes to stdout, at once.
    pub fn bytes(self, data: &[u8]) -> Result<(), CliError> {
        let mut out = io::stdout().lock();
        out.write_all(data)
            .and_then(|()| out.flush())
            .map_err(CliError::Output)
    }

    /// Writes bytes to stderr; nothing can be done if that fails.
    pub fn error_bytes(self, data: &[u8]) {
        drop(io::stderr().lock().write_all(data));
    }

    /// A word to the person at the terminal, beside the result.
    pub fn note(self, text: &str) {
        self.error_bytes(format!("{text}\n").as_bytes());
    }

    /// True if a person may be watching stderr.
    #[must_use]
    pub fn is_watched(self) -> bool {
        io::stderr().is_terminal()
    }

    /// Says an error and answers the exit code.
    #[must_use]
    pub fn error(self, error: &CliError) -> ExitCode {
        if error.is_broken_pipe() {
            return error.exit_code();
        }
        self.note(&format!("error: {error}"));
        if self.is_json() && !error.is_reported() {
            drop(self.line(&error.to_json().to_string()));
        }
        error.exit_code()
    }
}

fn json_error(error: serde_json::Error) -> CliError {
    CliError::Output(error.into())
}

/// A table in the manner of `ps`: no lines, columns two spaces apart.
#[must_use]
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_plain_columns() {
        let text = table(
            ["NAME", "N"],
            [
                ["a".to_owned(), "1".to_owned()],
                ["long".to_owned(), "2".to_owned()],
            ],
        );
        assert_eq!(text, "NAME  N\na     1\nlong  2");
    }
}
