//! `shoal logs VM`

use clap::Args;
use serde::Serialize;
use shoal_proto::cluster::{GetVmRequest, LogChunk, StreamLogsRequest, VmPhase};
use tonic::Code;

use crate::client::{Client, Context};
use crate::error::CliError;

/// Arguments of `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on until the VM has ended; with `-o json`, one object a line.
    #[arg(long, short)]
    pub follow: bool,
    /// Name or id.
    pub vm: String,
    /// Start at this byte of the console stream.
    #[arg(long, value_name = "OFFSET", default_value_t = 0)]
    pub from: u64,
}

/// A piece of the console. Bytes that are not UTF-8 are shown as U+FFFD.
#[derive(Debug, Serialize)]
struct LogView {
    offset: u64,
    text: String,
}

impl From<&LogChunk> for LogView {
    fn from(chunk: &LogChunk) -> Self {
        Self {
            offset: chunk.offset,
            text: String::from_utf8_lossy(&chunk.data).into_owned(),
        }
    }
}

/// Shows a VM's console, byte by byte as the guest wrote it.
pub async fn run(context: &Context, args: LogsArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let vm = &args.vm;
    let goes_on = || format!("{vm} goes on: `shoal logs -f {vm}` shows it once the cluster answers");
    let watched = show(context, &mut client, &args).await;
    watched.map_err(|error| {
        if args.follow {
            error.while_watching(goes_on)
        } else {
            error
        }
    })
}

async fn show(context: &Context, client: &mut Client, args: &LogsArgs) -> Result<(), CliError> {
    let request = StreamLogsRequest {
        vm: args.vm.clone(),
        follow: args.follow,
        from_offset: args.from,
    };
    let mut stream = client.stream_logs(request).await?.into_inner();
    let as_array = context.output.is_json() && !args.follow;
    let mut all = Vec::new();
    while let Some(chunk) = stream.message().await? {
        if as_array {
            all.push(LogView::from(&chunk));
        } else if context.output.is_json() {
            context
                .output
                .show_line(&LogView::from(&chunk), |_| String::new())?;
        } else {
            context.output.raw(&chunk.data)?;
        }
    }
    if args.follow {
        check_ended(client, args.vm.clone()).await?;
    }
    if as_array {
        context.output.show(&all, |_| String::new())
    } else {
        Ok(())
    }
}

/// A stream that ends as its scheduler does looks as if the VM had ended.
async fn check_ended(client: &mut Client, vm: String) -> Result<(), CliError> {
    let phase = match client.get_vm(GetVmRequest { vm }).await {
        Ok(vm) => vm.into_inner().phase(),
        // It has ended, and was removed.
        Err(status) if status.code() == Code::NotFound => return Ok(()),
        Err(status) => return Err(status.into()),
    };
    match phase {
        VmPhase::Exited | VmPhase::Failed => Ok(()),
        _ => Err(CliError::Lost(
            "the console's stream ended and the VM goes on".into(),
        )),
    }
}
