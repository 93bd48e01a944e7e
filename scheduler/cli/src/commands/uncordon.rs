//! `shoal uncordon NODE`

use clap::Args;
use shoal_proto::cluster::UncordonNodeRequest;

use crate::client::Context;
use crate::error::CliError;
use crate::view::NodeView;

/// Arguments of `uncordon`.
#[derive(Debug, Args)]
pub struct UncordonArgs {
    /// Its name.
    pub node: String,
}

/// Lets a drained node take VMs again.
pub async fn run(context: &Context, args: UncordonArgs) -> Result<(), CliError> {
    let request = UncordonNodeRequest { node: args.node };
    let node = context.client().await?.uncordon_node(request).await?.into_inner();
    context.output.show(&NodeView::from(&node), |node| {
        format!("{} is {}", node.name, node.state)
    })
}
