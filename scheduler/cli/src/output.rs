//! Where results go: tables for people, JSON for scripts, errors on stderr. Nothing else writes to either: what people read is a
//! [`Page`], whose lines are escaped; only a console is written as it is.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use console::Term;
use serde::Serialize;

use crate::error::CliError;
use crate::page::{Page, escaped};

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

    /// Writes one result: as pretty JSON, or as the page that `human` makes of it.
    pub fn show<T: Serialize + ?Sized, P: Into<Page>>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> P,
    ) -> Result<(), CliError> {
        match self.format {
            Format::Json => self.json(&serde_json::to_string_pretty(value).map_err(json_error)?),
            Format::Table | Format::Wide => self.page(&human(value).into()),
        }
    }

    /// Writes one result of a stream: as JSON on one line, or as the page that `human` makes of it.
    pub fn show_line<T: Serialize + ?Sized, P: Into<Page>>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> P,
    ) -> Result<(), CliError> {
        match self.format {
            Format::Json => self.json(&serde_json::to_string(value).map_err(json_error)?),
            Format::Table | Format::Wide => self.page(&human(value).into()),
        }
    }

    fn json(self, text: &str) -> Result<(), CliError> {
        self.raw(format!("{text}\n").as_bytes())
    }

    fn page(self, page: &Page) -> Result<(), CliError> {
        self.raw(format!("{page}\n").as_bytes())
    }

    /// Writes bytes to stdout as they are, at once: a console, or what this program made itself.
    pub fn raw(self, data: &[u8]) -> Result<(), CliError> {
        let mut out = io::stdout().lock();
        out.write_all(data)
            .and_then(|()| out.flush())
            .map_err(CliError::Output)
    }

    /// Writes bytes to stderr as they are: a console. Nothing can be done if that fails.
    pub fn raw_to_stderr(self, data: &[u8]) {
        drop(io::stderr().lock().write_all(data));
    }

    /// A word to the person at the terminal, beside the result.
    pub fn note(self, text: &str) {
        self.raw_to_stderr(format!("{}\n", Page::message(text)).as_bytes());
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
            self.error_object(error);
        }
        error.exit_code()
    }

    /// Writes what scripts read of an error. Nothing can be done if that fails.
    pub fn error_object(self, error: &CliError) {
        drop(self.json(&error.to_json().to_string()));
    }
}

fn json_error(error: serde_json::Error) -> CliError {
    CliError::Output(error.into())
}

/// A table in the manner of `ps`: no lines, columns two spaces apart. On a terminal it is no wider than that: long cells go on in the
/// next line.
#[must_use]
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> Page {
    let columns = Term::stdout().size_checked().map(|(_, columns)| columns);
    table_within(columns, header, rows)
}

fn table_within<const N: usize>(
    columns: Option<u16>,
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Page {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    if let Some(columns) = columns {
        table
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_width(columns);
    }
    for row in rows {
        // A line break in a cell would be a line of its own.
        table.add_row(row.map(|cell| escaped(&cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_no_wider_than_its_terminal_and_loses_nothing() {
        let words = ["why it did not move"; 8].join(", ");
        let rows = || {
            [
                ["a".to_owned(), words.clone()],
                ["b".to_owned(), "short".to_owned()],
            ]
        };
        let narrow = table_within(Some(40), ["NAME", "MESSAGE"], rows()).to_string();
        assert!(narrow.lines().all(|line| line.chars().count() <= 40), "{narrow}");
        assert_eq!(narrow.matches("move").count(), 8, "{narrow}");
        let free = table_within(None, ["NAME", "MESSAGE"], rows()).to_string();
        assert_eq!(free.lines().count(), 3, "{free}");
    }

    #[test]
    fn tables_are_plain_columns() {
        let text = table(
            ["NAME", "N"],
            [
                ["a".to_owned(), "1".to_owned()],
                ["long".to_owned(), "2".to_owned()],
            ],
        );
        assert_eq!(text.to_string(), "NAME  N\na     1\nlong  2");
    }
}
