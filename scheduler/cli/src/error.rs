//! Every failure of a command, with its exit code and its JSON form.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use prost::Message;
use serde_json::{Value, json};
use shoal_proto::LEADER_HEADER;
use shoal_proto::cluster::{NodeRejection, PlacementFailure};
use tonic::{Code, Status};

/// A shell gives a command that a signal ended this and the signal's number.
const OF_SIGNAL: u8 = 128;
const SIGPIPE: u8 = 13;

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// What was typed cannot be.
    #[error("{0}")]
    Usage(String),
    /// Nothing answers at the endpoint.
    #[error(
        "cannot reach the cluster at {endpoint}: {reason}\nstart one with `shoal up`, or say where it is with --scheduler or SHOAL_ENDPOINT"
    )]
    Unreachable {
        /// Where it was looked for.
        endpoint: String,
        /// What the connection said.
        reason: String,
    },
    /// The connection broke during a call.
    #[error(
        "lost the cluster during the call: {0}\nwhat was asked may have been done: look with `shoal ps` and `shoal events`"
    )]
    Lost(String),
    /// The connection broke while something was watched that goes on.
    #[error("lost the cluster ({reason}); {goes_on}")]
    LostSight {
        /// What the connection said.
        reason: String,
        /// What goes on, and how to see it again.
        goes_on: String,
    },
    /// No node can take the VM.
    #[error("{}", nothing_fits_text(.message, .rejections))]
    NothingFits {
        /// The scheduler's words.
        message: String,
        /// Why not, node by node.
        rejections: Vec<NodeRejection>,
    },
    /// The cluster refused.
    #[error("{message}")]
    Refused {
        /// The gRPC code.
        code: Code,
        /// The scheduler's words.
        message: String,
    },
    /// It was tried and ended badly.
    #[error("{0}")]
    Failed(String),
    /// It was tried and ended badly, and the result on stdout already says so to a script.
    #[error("{0}")]
    Reported(String),
    /// A file could not be read or written.
    #[error("{path}: {what}: {source}", path = .path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A daemon ended with an error.
    #[error("{}", chain(.0.as_ref()))]
    Daemon(Box<dyn Error + Send + Sync>),
    /// A signal ended the watching of something that goes on.
    #[error("interrupted; {goes_on}")]
    Interrupted {
        /// Which signal.
        signal: u8,
        /// What goes on, and how to see it or end it.
        goes_on: String,
    },
    /// Standard output is closed or full.
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
}

impl CliError {
    /// The process's exit code for this failure.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::NothingFits { .. } => ExitCode::from(3),
            Self::Unreachable { .. } | Self::Lost(_) | Self::LostSight { .. } => ExitCode::from(4),
            Self::Interrupted { signal, .. } => ExitCode::from(signal.saturating_add(OF_SIGNAL)),
            _ if self.is_broken_pipe() => ExitCode::from(OF_SIGNAL + SIGPIPE),
            _ => ExitCode::FAILURE,
        }
    }

    /// The scheduler has gone, or does not lead any more: another may answer.
    #[must_use]
    pub fn is_interruption(&self) -> bool {
        matches!(
            self,
            Self::Lost(_)
                | Self::Unreachable { .. }
                | Self::Refused {
                    code: Code::Unavailable,
                    ..
                }
        )
    }

    /// The same, told by one who watched something that goes on.
    #[must_use]
    pub fn while_watching(self, goes_on: impl FnOnce() -> String) -> Self {
        match self {
            Self::Lost(reason) => Self::LostSight {
                reason,
                goes_on: goes_on(),
            },
            other => other,
        }
    }

    /// One word for scripts.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::NothingFits { .. } => "nothing-fits",
            Self::Unreachable { .. } => "unreachable",
            Self::Lost(_) | Self::LostSight { .. } => "lost",
            Self::Interrupted { .. } => "interrupted",
            Self::Refused {
                code: Code::NotFound, ..
            } => "not-found",
            Self::Refused {
                code: Code::AlreadyExists,
                ..
            } => "already-exists",
            Self::Refused {
                code: Code::InvalidArgument,
                ..
            } => "invalid-argument",
            Self::Refused {
                code: Code::FailedPrecondition,
                ..
            } => "failed-precondition",
            Self::Refused { .. } => "refused",
            Self::File { .. } => "file",
            Self::Failed(_) | Self::Reported(_) | Self::Daemon(_) | Self::Output(_) => "failed",
        }
    }

    /// `{"error": {"kind", "message", "rejections"}}`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut error = json!({ "kind": self.kind(), "message": self.to_string() });
        if let Self::NothingFits { message, rejections } = self {
            error["message"] = json!(nothing_fits_line(message, rejections));
            error["rejections"] = rejections
                .iter()
                .map(|r| json!({ "node": r.node, "reason": r.reason }))
                .collect();
        }
        json!({ "error": error })
    }

    /// True if standard output has its result already, so that an error object would be a second one.
    #[must_use]
    pub fn is_reported(&self) -> bool {
        matches!(self, Self::Reported(_))
    }

    /// True if the reader of standard output went away. Others are ended by SIGPIPE then, and say nothing.
    #[must_use]
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Without the colours, and without the usage that follows on standard error.
impl From<&clap::Error> for CliError {
    fn from(error: &clap::Error) -> Self {
        if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            return Self::Usage("a subcommand or an argument is missing: --help lists them".to_owned());
        }
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let said = text.split("\n\nUsage:").next().unwrap_or(text);
        Self::Usage(
            said.split("\n\nFor more information")
                .next()
                .unwrap_or(said)
                .trim()
                .to_owned(),
        )
    }
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        // A status made by the transport, not by the scheduler, carries the transport's error as its source.
        if let Some(source) = status.source() {
            return Self::Lost(chain(source));
        }
        let message = status.message().to_owned();
        if status.metadata().contains_key(LEADER_HEADER) {
            return Self::Lost(message);
        }
        match status.code() {
            Code::ResourceExhausted => {
                let rejections = PlacementFailure::decode(status.details())
                    .map(|f| f.rejections)
                    .unwrap_or_default();
                Self::NothingFits { message, rejections }
            }
            code => Self::Refused { code, message },
        }
    }
}

/// An error and its sources in one line.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let part = source.to_string();
        if !text.ends_with(&part) {
            text = format!("{text}: {part}");
        }
        next = source.source();
    }
    text
}

/// The scheduler's words without its own account of the rejections, which may be cut: all of them are told here.
fn nothing_fits_head<'a>(message: &'a str, rejections: &[NodeRejection]) -> &'a str {
    match message.split_once(": ") {
        Some((head, _)) if !rejections.is_empty() => head,
        _ => message,
    }
}

fn nothing_fits_line(message: &str, rejections: &[NodeRejection]) -> String {
    let head = nothing_fits_head(message, rejections);
    let each: Vec<String> = rejections
        .iter()
        .map(|rejection| match head.ends_with(&rejection.node) {
            true => rejection.reason.clone(),
            false => format!("{}: {}", rejection.node, rejection.reason),
        })
        .collect();
    match each.as_slice() {
        [] => message.to_owned(),
        each => format!("{head}: {}", each.join("; ")),
    }
}

fn nothing_fits_text(message: &str, rejections: &[NodeRejection]) -> String {
    let head = nothing_fits_head(message, rejections);
    match rejections {
        [] => return message.to_owned(),
        [only] if head.ends_with(&only.node) => return format!("{head}: {}", only.reason),
        _ => {}
    }
    let width = rejections.iter().map(|r| r.node.len()).max().unwrap_or_default();
    let mut text = head.to_owned();
    for rejection in rejections {
        text.push_str(&format!("\n  {:width$}  {}", rejection.node, rejection.reason));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejected() -> Status {
        let failure = PlacementFailure {
            rejections: vec![NodeRejection {
                node: "node1".into(),
                reason: "needs 2.0 GiB, has 1.0 GiB".into(),
            }],
        };
        Status::with_details(
            Code::ResourceExhausted,
            "nothing fits",
            failure.encode_to_vec().into(),
        )
    }

    #[test]
    fn placement_failures_say_why_for_every_node() {
        let error = CliError::from(rejected());
        assert_eq!(
            error.to_string(),
            "nothing fits\n  node1  needs 2.0 GiB, has 1.0 GiB"
        );
        assert_eq!(error.to_json()["error"]["rejections"][0]["node"], "node1");
        assert_eq!(error.kind(), "nothing-fits");
    }

    #[test]
    fn each_rejection_is_told_once_and_whole() {
        let rejection = |node: &str| NodeRejection {
            node: node.into(),
            reason: "it lacks: much".into(),
        };
        let error = |message: &str, nodes: &[&str]| CliError::NothingFits {
            message: message.into(),
            rejections: nodes.iter().map(|node| rejection(node)).collect(),
        };
        let several = error("nothing fits: n1: it lacks: much; n2: it la", &["n1", "n2"]);
        assert_eq!(
            several.to_string(),
            "nothing fits\n  n1  it lacks: much\n  n2  it lacks: much"
        );
        assert_eq!(
            several.to_json()["error"]["message"],
            "nothing fits: n1: it lacks: much; n2: it lacks: much"
        );
        let one = error("VM a does not fit on n1: it lacks: mu", &["n1"]);
        assert_eq!(one.to_string(), "VM a does not fit on n1: it lacks: much");
        assert_eq!(one.to_json()["error"]["message"], one.to_string());
        let none = error("nothing fits: the cluster has no nodes", &[]);
        assert_eq!(none.to_string(), "nothing fits: the cluster has no nodes");
        assert_eq!(none.to_json()["error"]["message"], none.to_string());
    }

    #[test]
    fn usage_errors_are_told_without_the_usage() {
        use clap::Parser as _;
        for (line, words) in [
            ("shoal frobnicate", "unrecognized subcommand 'frobnicate'"),
            ("shoal run x --memory lots", "invalid value 'lots'"),
            ("shoal node", "a subcommand or an argument is missing"),
        ] {
            let error = crate::args::Cli::try_parse_from(line.split(' ')).expect_err("not a command");
            let json = CliError::from(&error).to_json();
            let message = json["error"]["message"].as_str().expect("a message");
            assert!(
                message.starts_with(words) && !message.contains("Usage:"),
                "{message}"
            );
            assert_eq!(json["error"]["kind"], "usage");
        }
    }

    #[test]
    fn details_that_are_no_placement_failure_are_ignored() {
        let status = Status::with_details(Code::ResourceExhausted, "full", vec![0xff; 9].into());
        assert_eq!(CliError::from(status).to_string(), "full");
    }
}
