//! `shoal events`

use clap::Args;
use shoal_proto::cluster::{Event, StreamEventsRequest};

use crate::client::Context;
use crate::error::CliError;
use crate::view::EventView;

/// Arguments of `events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on as things happen; with `-o json`, one object a line.
    #[arg(long, short)]
    pub follow: bool,
    /// Only what came after this sequence number.
    #[arg(long, value_name = "SEQUENCE", default_value_t = 0)]
    pub after: u64,
}

/// Shows what the cluster did, and why, oldest first.
pub async fn run(context: &Context, args: EventsArgs) -> Result<(), CliError> {
    let request = StreamEventsRequest {
        follow: args.follow,
        after_sequence: args.after,
    };
    let mut stream = context.client().await?.stream_events(request).await?.into_inner();
    let as_array = context.output.is_json() && !args.follow;
    let mut all = Vec::new();
    while let Some(event) = stream.message().await? {
        if as_array {
            all.push(EventView::from(&event));
        } else {
            context
                .output
                .show_line(&EventView::from(&event), |_| text(&event))?;
        }
    }
    if as_array {
        context.output.show(&all, |_| String::new())
    } else {
        Ok(())
    }
}

fn text(event: &Event) -> String {
    let subject = [event.vm.as_str(), event.node.as_str()]
        .into_iter()
        .filter(|s| !s.is_empty())
        .collect::<Vec<_>>();
    format!(
        "{}  {:22}  {:20}  {}",
        crate::format::time(event.time_unix_ms),
        event.kind,
        subject.join("@"),
        event.message
    )
}
