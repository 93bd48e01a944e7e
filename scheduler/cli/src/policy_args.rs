//! How a migration is to go, as it is typed.

use std::time::Duration;

use clap::{Args, ValueEnum};
use shoal_proto::vm::{self, MigrationPolicy};

use crate::format::{millis, parse_duration, parse_rate};

/// What can be changed while a migration runs.
#[derive(Debug, Clone, Default, Args)]
pub struct ChangeArgs {
    /// Pause the guest once the pause is predicted to be no longer than this, such as 50ms. At four times this, at least 1 s, it is
    /// given up.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub max_downtime: Option<Duration>,
    /// Give up if it has not come to the pause after this long, such as 2m.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Use at most this much of the network per second, such as 100MiB, at least 1MiB; 0: all there is.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub bandwidth: Option<u64>,
    /// When the guest writes faster than memory is sent: slow it down, let it run at the destination and fetch the rest,
    /// go on until the timeout and stay, or pause for as long as it takes.
    #[arg(long, value_name = "WHAT")]
    pub on_stall: Option<OnStall>,
    /// Larger gets more of a cap that several migrations share.
    #[arg(long, value_name = "0..9", value_parser = clap::value_parser!(u32).range(0..=9))]
    pub priority: Option<u32>,
}

/// All of a policy.
#[derive(Debug, Clone, Default, Args)]
pub struct PolicyArgs {
    #[command(flatten)]
    change: ChangeArgs,
    /// Connections for memory; 0: chosen by the link.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=16))]
    connections: Option<u32>,
    /// Whether memory is compressed; auto: where it pays.
    #[arg(long, value_name = "HOW")]
    compress: Option<Compression>,
    /// Compare memory at both ends while the VM is paused: all of it, or a sample.
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "full")]
    verify: Option<Verify>,
}

/// What to do when pre-copy does not converge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnStall {
    /// Slow the vCPUs by as much as is needed.
    Throttle,
    /// Run it at the destination and fetch what is missing.
    PostCopy,
    /// Go on until the timeout, then stay.
    Cancel,
    /// Pause for as long as it takes.
    Force,
}

/// Whether memory is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// Where it pays.
    Auto,
    /// Never.
    Off,
    /// By LZ4.
    Lz4,
    /// By Zstandard.
    Zstd,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// Nothing.
    Off,
    /// One page in 64.
    Sampled,
    /// All memory.
    Full,
}

impl From<&ChangeArgs> for MigrationPolicy {
    fn from(args: &ChangeArgs) -> Self {
        let on_stall = match args.on_stall {
            None => vm::OnStall::Unspecified,
            Some(OnStall::Throttle) => vm::OnStall::Throttle,
            Some(OnStall::PostCopy) => vm::OnStall::PostCopy,
            Some(OnStall::Cancel) => vm::OnStall::Cancel,
            Some(OnStall::Force) => vm::OnStall::Force,
        };
        Self {
            max_downtime_ms: args.max_downtime.map(millis),
            timeout_ms: args.timeout.map(millis),
            on_stall: on_stall.into(),
            bandwidth_bytes_per_second: args.bandwidth,
            priority: args.priority,
            ..Self::default()
        }
    }
}

impl From<&PolicyArgs> for MigrationPolicy {
    fn from(args: &PolicyArgs) -> Self {
        let compression = match args.compress {
            None => vm::Compression::Unspecified,
            Some(Compression::Auto) => vm::Compression::Auto,
            Some(Compression::Off) => vm::Compression::Off,
            Some(Compression::Lz4) => vm::Compression::Lz4,
            Some(Compression::Zstd) => vm::Compression::Zstd,
        };
        let verify = match args.verify {
            None => vm::Verify::Unspecified,
            Some(Verify::Off) => vm::Verify::Off,
            Some(Verify::Sampled) => vm::Verify::Sampled,
            Some(Verify::Full) => vm::Verify::Full,
        };
        Self {
            connections: args.connections,
            compression: compression.into(),
            verify: verify.into(),
            ..Self::from(&args.change)
        }
    }
}
