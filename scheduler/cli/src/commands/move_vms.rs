//! `shoal expel NODE` and `shoal bring NODE`

use clap::Args;
use shoal_proto::cluster::MoveVmsRequest;
use shoal_proto::cluster::move_vms_request::Direction;

use crate::client::{Client, Context, until_interrupted};
use crate::commands::moving;
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
    let ask = async |client: &mut Client| {
        let request = MoveVmsRequest {
            node: node.clone(),
            direction: direction.into(),
        };
        Ok(client.move_vms(request).await?.into_inner())
    };
    let goes_on = || "the VMs go on moving: `shoal migrations` shows them".to_owned();
    let last = until_interrupted(moving::follow(context, &mut client, ask), goes_on).await?;
    moving::show(context, &node, &last, "did not move")
}
