//! `shoal restore FILE`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::client::Context;
use crate::commands::backup::location;
use crate::daemon;
use crate::error::CliError;

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// What `shoal backup` wrote.
    pub file: PathBuf,
    /// Into etcd: etcd://HOST:PORT[,HOST:PORT...][/PREFIX].
    #[arg(long, value_name = "URL", conflicts_with = "state_dir")]
    pub store: Option<String>,
    /// Into the state directory of a scheduler; otherwise `scheduler` in $XDG_STATE_HOME/shoal or ~/.local/state/shoal.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Replace what is there. A file that is replaced is kept beside the new one as shoal.replaced.
    #[arg(long)]
    pub force: bool,
}

/// Restores while no scheduler runs. The backup is checked to its end before anything is changed.
pub async fn run(context: &Context, args: RestoreArgs) -> Result<(), CliError> {
    let default = || daemon::default_state_dir().map(|dir| Some(dir.join("scheduler")));
    let state_dir = match (&args.store, args.state_dir) {
        (None, None) => default()?,
        (_, said) => said,
    };
    let Some(store) = location(args.store, state_dir) else {
        return Err(CliError::Usage("--store or --state-dir: say where to".into()));
    };
    let restored = shoal_server::restore(&args.file, &store, args.force).await;
    let restored = restored.map_err(|error| CliError::Daemon(Box::new(error)))?;
    let result = json!({
        "file": args.file, "records": restored.records, "vms": restored.vms, "nodes": restored.nodes,
    });
    context.output.show(&result, |_| {
        format!(
            "restored {} records, {} VMs and {} nodes among them",
            restored.records, restored.vms, restored.nodes
        )
    })
}
