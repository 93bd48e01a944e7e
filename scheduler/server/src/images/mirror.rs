//! Blobs that other schedulers have: fetched by every scheduler, so that each can lead.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use shoal_proto::node::FetchBlobRequest;
use shoal_proto::node::registry_client::RegistryClient;
use shoal_secret::Prove;
use tonic::transport::Endpoint;

use super::{STAGING_PREFIX, blob_path, hex, is_sha256};
use crate::schedulers::Schedulers;
use crate::server::ServerError;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// For the next piece of a blob.
const PIECE_TIME: Duration = Duration::from_secs(10);
/// A blob that is larger is not taken.
const MAX_BLOB: u64 = 4 << 30;

/// Fetches what is missing as long as it is polled. `needed` names all blobs that should be there.
pub async fn run<F, W>(directory: PathBuf, schedulers: Schedulers, prove: Prove, needed: F)
where
    F: Fn() -> W + Send,
    W: Future<Output = Result<Vec<String>, ServerError>> + Send,
{
    loop {
        tokio::time::sleep(INTERVAL).await;
        let needed = match needed().await {
            Ok(needed) => needed,
            Err(error) => {
                tracing::debug!(%error, "blobs: what is needed is not known");
                continue;
            }
        };
        let missing: Vec<&String> = needed
            .iter()
            .filter(|sha256| is_sha256(sha256) && !blob_path(&directory, sha256).exists())
            .collect();
        if missing.is_empty() {
            continue;
        }
        let mut others = schedulers.list(0).await.unwrap_or_default();
        others.retain(|other| !other.answers);
        others.sort_by_key(|other| !other.leads);
        for sha256 in missing {
            for other in &others {
                match fetch(&directory, &other.address, &prove, sha256).await {
                    Ok(()) => {
                        tracing::info!(sha256, from = other.address, "fetched a blob");
                        break;
                    }
                    Err(error) => tracing::debug!(sha256, from = other.address, error, "blob"),
                }
            }
        }
    }
}

async fn fetch(directory: &Path, address: &str, prove: &Prove, sha256: &str) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|e| text(&e))?;
    let connected = endpoint.connect_timeout(CONNECT_TIME).connect().await;
    let connected = connected.map_err(|e| text(&e))?;
    let mut client = RegistryClient::with_interceptor(connected, prove.clone());
    let request = FetchBlobRequest {
        sha256: sha256.to_owned(),
    };
    let mut pieces = client
        .fetch_blob(request)
        .await
        .map_err(|status| status.message().to_owned())?
        .into_inner();
    std::fs::create_dir_all(directory).map_err(|e| text(&e))?;
    let staged = tempfile::Builder::new()
        .prefix(STAGING_PREFIX)
        .tempfile_in(directory)
        .map_err(|e| text(&e))?;
    let file = staged.as_file().try_clone().map_err(|e| text(&e))?;
    let mut file = tokio::fs::File::from_std(file);
    let (mut hash, mut length) = (Sha256::new(), 0u64);
    loop {
        let piece = tokio::time::timeout(PIECE_TIME, pieces.message())
            .await
            .map_err(|_| "it stopped half-way".to_owned())?
            .map_err(|status| status.message().to_owned())?;
        let Some(piece) = piece else { break };
        length += piece.data.len() as u64;
        if length > MAX_BLOB {
            return Err("it is too large".to_owned());
        }
        hash.update(&piece.data);
        tokio::io::AsyncWriteExt::write_all(&mut file, &piece.data)
            .await
            .map_err(|e| text(&e))?;
    }
    file.sync_all().await.map_err(|e| text(&e))?;
    if hex(&hash.finalize()) != sha256 {
        return Err("what came has another digest".to_owned());
    }
    staged
        .persist(blob_path(directory, sha256))
        .map(drop)
        .map_err(|e| text(&e))
}
