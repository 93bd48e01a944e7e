//! `shoal drain NODE`

use clap::Args;
use serde_json::json;
use shoal_proto::cluster::{DrainNodeRequest, DrainNodeResponse};

use crate::client::{Client, Context, until_interrupted};
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
    let Some(last) = until_interrupted(watch(context, &mut client, &node)).await? else {
        context.output.note(&format!(
            "\n{node} goes on draining: `shoal nodes` shows it, `shoal uncordon {node}` ends it"
        ));
        return Ok(());
    };
    let result =
        json!({ "node": node, "moved": last.moved, "remaining": last.remaining, "message": last.message });
    context.output.show(&result, |_| {
        format!("{node}: {} moved, {} remaining", last.moved, last.remaining)
    })?;
    if last.remaining == 0 {
        Ok(())
    } else {
        Err(CliError::Reported(format!(
            "{} VMs cannot leave {node}: {}",
            last.remaining, last.message
        )))
    }
}

/// Follows it from one scheduler to the next, should one that leads go away: the drain is in the store.
async fn watch(context: &Context, client: &mut Client, node: &str) -> Result<DrainNodeResponse, CliError> {
    let mut moved_before = 0;
    loop {
        let mut moved = 0;
        let error = match watch_one(context, client, node, &mut moved).await {
            Ok(mut last) => {
                last.moved += moved_before;
                return Ok(last);
            }
            Err(error) => error,
        };
        moved_before += moved;
        match context.again(&error).await {
            Some(next) => *client = next,
            None => return Err(error),
        }
    }
}

async fn watch_one(
    context: &Context,
    client: &mut Client,
    node: &str,
    moved: &mut u32,
) -> Result<DrainNodeResponse, CliError> {
    let mut stream = client
        .drain_node(DrainNodeRequest {
            node: node.to_owned(),
        })
        .await?
        .into_inner();
    while let Some(step) = stream.message().await? {
        *moved = step.moved;
        if step.done {
            return Ok(step);
        }
        context.output.note(&step.message);
    }
    Err(CliError::Lost(
        "the stream ended before the node was drained".into(),
    ))
}
