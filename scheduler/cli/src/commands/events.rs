//! `shoal events`

use clap::Args;
use shoal_proto::cluster::{Event, StreamEventsRequest};

use crate::client::{Client, Context};
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
    let as_array = context.output.is_json() && !args.follow;
    let mut all = Vec::new();
    let mut after = args.after;
    let mut client = context.client().await?;
    loop {
        let request = StreamEventsRequest {
            follow: args.follow,
            after_sequence: after,
        };
        let shown = show(&mut client, request, |event| {
            after = event.sequence;
            if as_array {
                all.push(EventView::from(event));
                return Ok(());
            }
            context.output.show_line(&EventView::from(event), |_| text(event))
        });
        let error = match shown.await {
            Ok(()) if !args.follow => break,
            Ok(()) => CliError::Lost("the stream of events ended".into()),
            Err(error) => error,
        };
        // Another scheduler goes on after the last that was shown.
        match context.again(&error).await {
            Some(next) => client = next,
            None => return Err(error),
        }
    }
    if as_array {
        context.output.show(&all, |_| String::new())
    } else {
        Ok(())
    }
}

async fn show(
    client: &mut Client,
    request: StreamEventsRequest,
    mut take: impl FnMut(&Event) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let mut stream = client.stream_events(request).await?.into_inner();
    while let Some(event) = stream.message().await? {
        take(&event)?;
    }
    Ok(())
}

pub(super) fn text(event: &Event) -> String {
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
