//! `shoal down`

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use crate::client::Context;
use crate::daemon;
use crate::error::CliError;
use crate::local::record::StateLock;
use crate::local::stop::{Stopped, stop};

/// How long a cluster may take to show that it is there.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Arguments of `down`.
#[derive(Debug, Args)]
pub struct DownArgs {
    /// The directory that `up` was given.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Also remove images, logs, events and everything else that the cluster kept there.
    #[arg(long)]
    pub purge: bool,
}

/// Stops the local cluster and removes its VMs. Images stay unless `--purge`. Nothing to stop is no error.
pub async fn run(context: &Context, args: DownArgs) -> Result<(), CliError> {
    let is_said = args.state_dir.is_some();
    let state_dir = args.state_dir.map_or_else(daemon::default_state_dir, Ok)?;
    // The lock would make it.
    if !state_dir.exists() {
        let nothing = format!("nothing was up: there is no {}", state_dir.display());
        check_none_answers(context, is_said, &nothing).await?;
        return context.output.show(&Stopped::default(), |_| nothing);
    }
    let lock = StateLock::take(&state_dir)?;
    let stopped = stop(&state_dir, args.purge).await?.unwrap_or_default();
    drop(lock);
    let text = text(&stopped, &state_dir, args.purge);
    if stopped.is_nothing() {
        check_none_answers(context, is_said, &text).await?;
    }
    context.output.show(&stopped, |_| text)
}

/// Whoever says where a cluster answers, and not where its state is, may mean that one: it was not stopped.
async fn check_none_answers(context: &Context, is_said: bool, nothing: &str) -> Result<(), CliError> {
    if is_said || !context.endpoints_are_said {
        return Ok(());
    }
    match timeout(ANSWER_TIME, context.client()).await {
        Ok(Ok(_)) => Err(CliError::Failed(format!(
            "{nothing}; but a cluster answers at {}: it was started with another --state-dir, which `shoal down` has to be given, or by hand",
            context.endpoints.join(", ")
        ))),
        _ => Ok(()),
    }
}

fn text(stopped: &Stopped, state_dir: &Path, purged: bool) -> String {
    let Stopped {
        vms,
        daemons,
        killed_vmms,
    } = stopped;
    let what = if stopped.is_nothing() {
        format!("nothing was up in {}", state_dir.display())
    } else {
        format!("down: {vms} VMs removed, {daemons} daemons ended, {killed_vmms} VMMs killed")
    };
    if purged {
        format!("{what}; state purged")
    } else {
        what
    }
}
