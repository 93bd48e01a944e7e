//! `shoal backup FILE`

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use shoal_proto::cluster::BackupRequest;
use shoal_server::StoreLocation;

use crate::client::Context;
use crate::error::CliError;
use crate::format;

/// Arguments of `backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// Must not be there yet.
    pub file: PathBuf,
    /// Read this store instead of asking a scheduler: etcd://HOST:PORT[,HOST:PORT...][/PREFIX].
    #[arg(long, value_name = "URL", conflicts_with = "state_dir")]
    pub store: Option<String>,
    /// Read the store in the state directory of a scheduler that does not run, instead of asking one.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// Which store two options name.
pub fn location(store: Option<String>, state_dir: Option<PathBuf>) -> Option<StoreLocation> {
    store
        .map(StoreLocation::Etcd)
        .or(state_dir.map(StoreLocation::StateDir))
}

/// Writes all records, as they are at one moment. Images' files and console logs are not among them.
pub async fn run(context: &Context, args: BackupArgs) -> Result<(), CliError> {
    let bytes = match location(args.store, args.state_dir) {
        Some(store) => {
            let written = shoal_server::back_up(&store, &args.file).await;
            written.map_err(|error| CliError::Daemon(Box::new(error)))?.bytes
        }
        None => from_scheduler(context, &args.file).await?,
    };
    let result = json!({ "file": args.file, "bytes": bytes });
    context.output.show(&result, |_| {
        format!(
            "{}: {}; images' files and console logs are not in it",
            args.file.display(),
            format::size(bytes)
        )
    })
}

async fn from_scheduler(context: &Context, path: &Path) -> Result<u64, CliError> {
    let mut client = context.client().await?;
    let mut chunks = client.backup(BackupRequest {}).await?.into_inner();
    let file_error = |source| CliError::File {
        path: path.to_owned(),
        what: "cannot write".into(),
        source,
    };
    let mut file = File::create_new(path).map_err(file_error)?;
    let copy = async {
        let mut bytes = 0;
        while let Some(chunk) = chunks.message().await? {
            bytes += chunk.data.len() as u64;
            file.write_all(&chunk.data).map_err(file_error)?;
        }
        file.sync_all().map_err(file_error)?;
        Ok(bytes)
    };
    let copied = copy.await;
    if copied.is_err() {
        // What is there is not whole.
        drop(std::fs::remove_file(path));
    }
    copied
}
