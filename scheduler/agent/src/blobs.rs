//! The node's cache of image blobs: content-addressed files, filled from the scheduler and verified on the way in.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use shoal_proto::node;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

use crate::keyed_lock::KeyedLocks;
use crate::schedulers::{Registry, Schedulers};

/// How long the scheduler may be silent in the middle of a blob.
const SILENCE_LIMIT: Duration = Duration::from_secs(15);

/// Why a blob cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlobError {
    #[error("{field}.sha256: '{value}' is not 64 lower-case hexadecimal digits")]
    BadDigest { field: &'static str, value: String },
    #[error("blob {sha256}: the scheduler did not send it: {status}")]
    Fetch { sha256: String, status: Box<Status> },
    #[error("blob {sha256}: the scheduler sent nothing for {} s", SILENCE_LIMIT.as_secs())]
    Silence { sha256: String },
    #[error("blob {sha256}: {got} bytes came and {expected} were announced")]
    WrongSize { sha256: String, expected: u64, got: u64 },
    #[error("blob {sha256}: what came has the digest {got}; it was damaged on the way")]
    WrongDigest { sha256: String, got: String },
    #[error("blob {sha256}: cannot be stored on this node: {source}")]
    Io { sha256: String, source: io::Error },
}

/// A blob that a message names, checked: the digest is also a file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlobId {
    sha256: String,
    size: u64,
}

impl BlobId {
    pub(crate) fn parse(field: &'static str, blob: &node::Blob) -> Result<Self, BlobError> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if blob.sha256.len() == 64 && blob.sha256.bytes().all(hex) {
            Ok(Self {
                sha256: blob.sha256.clone(),
                size: blob.size_bytes,
            })
        } else {
            Err(BlobError::BadDigest {
                field,
                value: blob.sha256.chars().take(80).collect(),
            })
        }
    }
}

/// The cache.
#[derive(Debug)]
pub(crate) struct BlobCache {
    dir: PathBuf,
    fetching: KeyedLocks<String>,
}

impl BlobCache {
    /// Opens, or creates, the cache, and clears away what an interrupted fetch left.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "part") {
                fs::remove_file(path)?;
            }
        }
        Ok(Self {
            dir,
            fetching: KeyedLocks::default(),
        })
    }

    /// The blob's file; fetched first if it is not here. Several who want the same blob share one fetch.
    pub(crate) async fn get(&self, blob: &BlobId, schedulers: &Schedulers) -> Result<PathBuf, BlobError> {
        let path = self.dir.join(&blob.sha256);
        let _turn = self.fetching.lock(&blob.sha256).await;
        if holds(&path, blob.size).await {
            return Ok(path);
        }
        tracing::info!(sha256 = blob.sha256, bytes = blob.size, "fetching an image blob");
        let mut first_error = None;
        for registry in schedulers.all() {
            match self.fetch(blob, registry, &path).await {
                Ok(()) => return Ok(path),
                // The others may have it. What the one that leads has said is what matters.
                Err(error @ BlobError::Fetch { .. }) => {
                    first_error.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        let nobody = || blob.fetch_error(Status::unavailable("there is no scheduler"));
        Err(first_error.unwrap_or_else(nobody))
    }

    async fn fetch(&self, blob: &BlobId, mut from: Registry, path: &Path) -> Result<(), BlobError> {
        let request = node::FetchBlobRequest {
            sha256: blob.sha256.clone(),
        };
        let response = from.fetch_blob(request).await;
        let chunks = response.map_err(|status| blob.fetch_error(status))?.into_inner();
        self.store(blob, chunks.map(|chunk| chunk.map(|chunk| chunk.data)), path)
            .await
    }

    /// Writes the chunks beside the final file and gives it its name once size and digest are right.
    async fn store(
        &self,
        blob: &BlobId,
        chunks: impl Stream<Item = Result<Vec<u8>, Status>> + Unpin,
        path: &Path,
    ) -> Result<(), BlobError> {
        let part = path.with_extension("part");
        let written = write_verified(blob, chunks, &part).await;
        let named = match written {
            Ok(()) => tokio::fs::rename(&part, path)
                .await
                .map_err(|error| blob.io_error(error)),
            Err(error) => Err(error),
        };
        if named.is_err()
            && let Err(error) = tokio::fs::remove_file(&part).await
        {
            tracing::debug!(%error, "no partial blob to remove");
        }
        named
    }
}

impl BlobId {
    fn fetch_error(&self, status: Status) -> BlobError {
        BlobError::Fetch {
            sha256: self.sha256.clone(),
            status: Box::new(status),
        }
    }

    fn io_error(&self, source: io::Error) -> BlobError {
        BlobError::Io {
            sha256: self.sha256.clone(),
            source,
        }
    }

    fn size_error(&self, got: u64) -> BlobError {
        BlobError::WrongSize {
            sha256: self.sha256.clone(),
            expected: self.size,
            got,
        }
    }
}

/// The content was verified when it came; the size is looked at again because it costs nothing.
async fn holds(path: &Path, size: u64) -> bool {
    tokio::fs::metadata(path)
        .await
        .is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
}

async fn write_verified(
    blob: &BlobId,
    mut chunks: impl Stream<Item = Result<Vec<u8>, Status>> + Unpin,
    part: &Path,
) -> Result<(), BlobError> {
    let mut file = File::create(part).await.map_err(|error| blob.io_error(error))?;
    let mut digest = Sha256::new();
    let mut got = 0_u64;
    loop {
        let next = tokio::time::timeout(SILENCE_LIMIT, chunks.next()).await;
        let Some(chunk) = next.map_err(|_| BlobError::Silence {
            sha256: blob.sha256.clone(),
        })?
        else {
            break;
        };
        let chunk = chunk.map_err(|status| blob.fetch_error(status))?;
        got = got.saturating_add(chunk.len() as u64);
        if got > blob.size {
            return Err(blob.size_error(got));
        }
        digest.update(&chunk);
        file.write_all(&chunk)
            .await
            .map_err(|error| blob.io_error(error))?;
    }
    if got != blob.size {
        return Err(blob.size_error(got));
    }
    let got = hex(&digest.finalize());
    if got != blob.sha256 {
        return Err(BlobError::WrongDigest {
            sha256: blob.sha256.clone(),
            got,
        });
    }
    file.sync_all().await.map_err(|error| blob.io_error(error))
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|&b| [b >> 4, b & 15])
        .map(|nibble| char::from(DIGITS[usize::from(nibble)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob_of(content: &[u8]) -> BlobId {
        BlobId {
            sha256: hex(&Sha256::digest(content)),
            size: content.len() as u64,
        }
    }

    fn chunks(parts: &[&[u8]]) -> impl Stream<Item = Result<Vec<u8>, Status>> + Unpin + use<> {
        let parts: Vec<_> = parts.iter().map(|part| Ok(part.to_vec())).collect();
        tokio_stream::iter(parts)
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).expect("readable").count()
    }

    #[test]
    fn digests_are_checked_before_they_are_file_names() {
        let bad = [
            "",
            "../../etc/passwd",
            &"A".repeat(64),
            &"a".repeat(63),
            &"a".repeat(65),
        ];
        for sha256 in bad {
            let blob = node::Blob {
                sha256: sha256.to_owned(),
                size_bytes: 1,
            };
            assert!(
                BlobId::parse("kernel", &blob)
                    .expect_err("refused")
                    .to_string()
                    .starts_with("kernel.sha256: ")
            );
        }
        let good = node::Blob {
            sha256: "0a".repeat(32),
            size_bytes: 1,
        };
        assert!(BlobId::parse("kernel", &good).is_ok());
    }

    #[tokio::test]
    async fn a_blob_is_stored_under_its_digest() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = BlobCache::open(dir.path().to_owned()).expect("opened");
        let blob = blob_of(b"hello world");
        let path = dir.path().join(&blob.sha256);
        cache
            .store(&blob, chunks(&[b"hello ", b"", b"world"]), &path)
            .await
            .expect("stored");
        assert_eq!(fs::read(&path).expect("there"), b"hello world");
        assert!(holds(&path, 11).await && !holds(&path, 12).await);
        assert_eq!(files(dir.path()), 1);
    }

    #[tokio::test]
    async fn damaged_short_and_long_blobs_leave_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = BlobCache::open(dir.path().to_owned()).expect("opened");
        let blob = blob_of(b"hello world");
        let path = dir.path().join(&blob.sha256);
        let damaged = cache.store(&blob, chunks(&[b"hello", b" World"]), &path).await;
        assert!(
            matches!(damaged, Err(BlobError::WrongDigest { .. })),
            "{damaged:?}"
        );
        for wrong in [&[b"hello" as &[u8]] as &[&[u8]], &[b"hello world", b"!"], &[]] {
            let result = cache.store(&blob, chunks(wrong), &path).await;
            assert!(matches!(result, Err(BlobError::WrongSize { .. })), "{result:?}");
        }
        let broken = tokio_stream::iter([Ok(b"hello".to_vec()), Err(Status::unavailable("gone"))]);
        let result = cache.store(&blob, broken, &path).await;
        assert!(matches!(result, Err(BlobError::Fetch { .. })), "{result:?}");
        assert_eq!(files(dir.path()), 0);
    }

    #[tokio::test]
    async fn an_interrupted_fetch_is_cleared_away() {
        let dir = tempfile::tempdir().expect("a directory");
        let blob = blob_of(b"x");
        fs::write(dir.path().join(format!("{}.part", blob.sha256)), b"half").expect("written");
        fs::write(dir.path().join(&blob.sha256), b"x").expect("written");
        BlobCache::open(dir.path().to_owned()).expect("opened");
        assert_eq!(files(dir.path()), 1);
    }
}
