//! What the two daemons share: logs, the end, where things are.

use std::env;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use clap::builder::{OsStringValueParser, TypedValueParser};
use shoal_secret::ClusterSecret;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::error::CliError;

/// Name of the VMM's executable.
const VMM: &str = "shoal-vmm";

/// Logs to stderr; RUST_LOG chooses what, as in `info,shoal_server=debug`.
pub fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Fails only if a subscriber is set already, which then serves as well.
    drop(
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            // A line that cannot be written is lost. To complain of it on stderr, which is where it went, would panic.
            .log_internal_errors(false)
            .try_init(),
    );
}

/// Completes at SIGTERM or Ctrl-C.
pub fn shutdown() -> Result<Pin<Box<dyn Future<Output = ()> + Send>>, CliError> {
    let failed = |error| CliError::Failed(format!("cannot wait for signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(Box::pin(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }))
}

/// Completes at a signal, with its number.
pub type Signals = Pin<Box<dyn Future<Output = u8> + Send>>;

/// What ends `up`, from its first moment on: Ctrl-C, SIGTERM, and the end of its terminal.
pub fn signals_to_up() -> Result<Signals, CliError> {
    let failed = |error| CliError::Failed(format!("cannot wait for signals: {error}"));
    let number = |kind: SignalKind| u8::try_from(kind.as_raw_value()).unwrap_or(u8::MAX);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
    Ok(Box::pin(async move {
        tokio::select! {
            _ = terminate.recv() => number(SignalKind::terminate()),
            _ = interrupt.recv() => number(SignalKind::interrupt()),
            _ = hangup.recv() => number(SignalKind::hangup()),
        }
    }))
}

/// Takes an empty path, too: a variable that is set to nothing is not set.
pub fn path_or_nothing() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// The VMM's executable: as said, or beside this one.
pub fn vmm_binary(said: Option<PathBuf>) -> Result<PathBuf, CliError> {
    if let Some(path) = said.filter(|path| !path.as_os_str().is_empty()) {
        return Ok(path);
    }
    let own = own_binary()?;
    let beside = own.with_file_name(VMM);
    if beside.is_file() {
        return Ok(beside);
    }
    Err(CliError::Failed(format!(
        "no {VMM} in {}: build it, or say where it is with --vmm-binary or SHOAL_VMM",
        own.parent().unwrap_or(&own).display()
    )))
}

/// From the file, if one is said.
pub fn cluster_secret(said: Option<&Path>) -> Result<Option<ClusterSecret>, CliError> {
    let read = said.map(ClusterSecret::read).transpose();
    read.map_err(|error| CliError::Usage(format!("--cluster-secret: {error}")))
}

/// This executable.
pub fn own_binary() -> Result<PathBuf, CliError> {
    env::current_exe()
        .map_err(|error| CliError::Failed(format!("cannot tell where this program is: {error}")))
}

/// Where state is kept unless said otherwise: `$XDG_STATE_HOME/shoal` or `~/.local/state/shoal`.
pub fn default_state_dir() -> Result<PathBuf, CliError> {
    let absolute = |name: &str| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    base.map(|base| base.join("shoal")).ok_or_else(|| {
        CliError::Usage("--state-dir: neither HOME nor XDG_STATE_HOME is set, so say where".into())
    })
}
