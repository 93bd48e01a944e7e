//! What `drain`, `expel` and `bring` have in common: VMs that move one after another, and a stream that tells of it.

use serde_json::json;
use shoal_proto::cluster::{DrainNodeResponse, MoveVmsResponse};
use tonic::Streaming;

use crate::client::{Client, Context};
use crate::error::CliError;

/// How far it is.
#[derive(Debug)]
pub struct Step {
    moved: u32,
    remaining: u32,
    done: bool,
    message: String,
}

impl From<DrainNodeResponse> for Step {
    fn from(step: DrainNodeResponse) -> Self {
        Self {
            moved: step.moved,
            remaining: step.remaining,
            done: step.done,
            message: step.message,
        }
    }
}

impl From<MoveVmsResponse> for Step {
    fn from(step: MoveVmsResponse) -> Self {
        Self {
            moved: step.moved,
            remaining: step.remaining,
            done: step.done,
            message: step.message,
        }
    }
}

/// Follows what `ask` asks for to its end, from one scheduler to the next should one that leads go away: it is in the store.
pub async fn follow<S: Into<Step>>(
    context: &Context,
    client: &mut Client,
    ask: impl AsyncFn(&mut Client) -> Result<Streaming<S>, CliError>,
) -> Result<Step, CliError> {
    let mut moved_before = 0;
    loop {
        let mut moved = 0;
        let error = match follow_one(context, client, &ask, &mut moved).await {
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

async fn follow_one<S: Into<Step>>(
    context: &Context,
    client: &mut Client,
    ask: &impl AsyncFn(&mut Client) -> Result<Streaming<S>, CliError>,
    moved: &mut u32,
) -> Result<Step, CliError> {
    let mut stream = ask(client).await?;
    while let Some(step) = stream.message().await? {
        let step: Step = step.into();
        *moved = step.moved;
        if step.done {
            return Ok(step);
        }
        context.output.note(&step.message);
    }
    Err(CliError::Lost("the stream ended before all VMs had moved".into()))
}

/// Shows how it ended; an error in the words of `failed` if VMs remain.
pub fn show(context: &Context, node: &str, last: &Step, failed: &str) -> Result<(), CliError> {
    let Step {
        moved,
        remaining,
        message,
        ..
    } = last;
    let result = json!({ "node": node, "moved": moved, "remaining": remaining, "message": message });
    context.output.show(&result, |_| {
        format!("{node}: {moved} moved, {remaining} remaining")
    })?;
    if *remaining == 0 {
        Ok(())
    } else {
        let vms = if *remaining == 1 { "VM" } else { "VMs" };
        Err(CliError::Reported(format!(
            "{remaining} {vms} {failed}: {message}"
        )))
    }
}
