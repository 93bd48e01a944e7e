//! `shoal record FILE`

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use shoal_proto::cluster::RecordClusterRequest;
use shoal_simulate::recording::Writer;

use crate::client::Context;
use crate::daemon;
use crate::error::CliError;
use crate::format;

/// Of the text of one moment: a million VMs have less.
const MOST_BYTES: usize = 512 << 20;

/// Arguments of `record`.
#[derive(Debug, Args)]
pub struct RecordArgs {
    /// Must not be there yet.
    pub file: PathBuf,
    /// Stop after so long; otherwise at Ctrl-C.
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub length: Option<Duration>,
}

/// Writes what the planner is shown each second. Names and labels of nodes and VMs are in it, and nothing of what VMs hold.
pub async fn run(context: &Context, args: RecordArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let mut records = client.record_cluster(RecordClusterRequest {}).await?.into_inner();
    let file_error = |source| CliError::File {
        path: args.file.clone(),
        what: "cannot write".into(),
        source,
    };
    let file = File::create_new(&args.file).map_err(file_error)?;
    let mut writer = Writer::new(BufWriter::new(file));
    let end = async {
        match args.length {
            Some(length) => tokio::time::sleep(length).await,
            None => std::future::pending().await,
        }
    };
    let mut signal = daemon::shutdown()?;
    tokio::pin!(end);
    let (mut text, mut seconds) = (String::new(), 0_u64);
    let ended = loop {
        let record = tokio::select! {
            record = records.message() => match record {
                Ok(Some(record)) => record,
                Ok(None) => break Ok(()),
                Err(status) => break Err(status),
            },
            () = &mut end => break Ok(()),
            () = &mut signal => break Ok(()),
        };
        if text.len() + record.text.len() > MOST_BYTES {
            return Err(CliError::Failed(format!(
                "the scheduler sends more than {MOST_BYTES} bytes for one moment"
            )));
        }
        text.push_str(&record.text);
        if record.complete {
            writer.moment(record.unix_ms, &text).map_err(file_error)?;
            (seconds, text) = (seconds + 1, String::new());
        }
    };
    let file = writer.finish().map_err(file_error)?;
    let file = file
        .into_inner()
        .map_err(|error| file_error(error.into_error()))?;
    file.sync_all().map_err(file_error)?;
    ended?;
    let bytes = std::fs::metadata(&args.file).map_err(file_error)?.len();
    let result = json!({ "file": args.file, "moments": seconds, "bytes": bytes });
    context.output.show(&result, |_| {
        format!(
            "{}: {seconds} moments, {}; `shoal simulate {0}` says what would be done now",
            args.file.display(),
            format::size(bytes)
        )
    })
}
