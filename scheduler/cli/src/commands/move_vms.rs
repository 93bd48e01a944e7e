//! `shoal expel NODE` and `shoal bring NODE`

use clap::Args;
use serde_json::json;
use shoal_proto::cluster::move_vms_request::Direction;
use shoal_proto::cluster::{MoveVmsRequest, MoveVmsResponse};

use crate::client::{Client, Context, until_interrupted};
use crate::error::CliError;

/// Arguments of `expel` and `bring`.
#[derive(Debug, Args)]
pub struct MoveVmsArgs {
    /// Its name.
    pub node: String,
}

/// Moves the VMs. Ctrl-C stops watching, not the moving.
pub async fn run(context: &Context, args: MoveVmsArgs, direction: Direction) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let node = args.node;
    let request = MoveVmsRequest {
        node: node.clone(),
        direction: direction.into(),
    };
    let Some(last) = until_interrupted(watch(context, &mut client, request)).await? else {
        context
            .output
            .note("\nthe VMs go on moving: `shoal migrations` shows them");
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
        let remaining = last.remaining;
        Err(CliError::Reported(format!(
            "{remaining} VMs did not move: {}",
            last.message
        )))
    }
}

/// Follows them from one scheduler to the next, should one that leads go away: what was asked for is in the store.
async fn watch(
    context: &Context,
    client: &mut Client,
    request: MoveVmsRequest,
) -> Result<MoveVmsResponse, CliError> {
    let mut moved_before = 0;
    loop {
        let mut moved = 0;
        let error = match watch_one(context, client, request.clone(), &mut moved).await {
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
    request: MoveVmsRequest,
    moved: &mut u32,
) -> Result<MoveVmsResponse, CliError> {
    let mut stream = client.move_vms(request).await?.into_inner();
    while let Some(step) = stream.message().await? {
        *moved = step.moved;
        if step.done {
            return Ok(step);
        }
        context.output.note(&step.message);
    }
    Err(CliError::Lost("the stream ended before the VMs had moved".into()))
}
