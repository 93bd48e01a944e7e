//! `shoal down`

use std::path::PathBuf;

use clap::Args;

use crate::client::Context;
use crate::daemon;
use crate::error::CliError;
use crate::local::record::StateLock;
use crate::local::stop::{Stopped, stop};

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
    let state_dir = args.state_dir.map_or_else(daemon::default_state_dir, Ok)?;
    // The lock would make it.
    if !state_dir.exists() {
        return context.output.show(&Stopped::default(), |_| {
            format!("nothing was up: there is no {}", state_dir.display())
        });
    }
    let lock = StateLock::take(&state_dir)?;
    let stopped = stop(&state_dir, args.purge).await?;
    drop(lock);
    context
        .output
        .show(&stopped.unwrap_or_default(), |stopped| text(stopped, args.purge))
}

fn text(stopped: &Stopped, purged: bool) -> String {
    let Stopped {
        vms,
        daemons,
        killed_vmms,
    } = stopped;
    let what = if daemons + killed_vmms == 0 {
        "nothing was up".to_owned()
    } else {
        format!("down: {vms} VMs removed, {daemons} daemons ended, {killed_vmms} VMMs killed")
    };
    if purged {
        format!("{what}; state purged")
    } else {
        what
    }
}
