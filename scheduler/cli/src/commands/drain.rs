//! `shoal drain NODE`

use clap::Args;
use shoal_proto::cluster::DrainNodeRequest;

use crate::client::{Client, Context, until_interrupted};
use crate::commands::moving;
use crate::error::CliError;

/// Arguments of `drain`.
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Its name.
    pub node: String,
}

/// Moves every VM off a node. Ctrl-C stops watching, not the draining; `uncordon` ends that.
pub async fn run(context: &Context, args: DrainArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let node = args.node;
    let ask = async |client: &mut Client| {
        let request = DrainNodeRequest { node: node.clone() };
        Ok(client.drain_node(request).await?.into_inner())
    };
    let goes_on =
        || format!("{node} goes on draining: `shoal nodes` shows it, `shoal uncordon {node}` ends it");
    let last = until_interrupted(moving::follow(context, &mut client, ask), goes_on).await?;
    moving::show(context, &node, &last, &format!("cannot leave {node}"))
}
