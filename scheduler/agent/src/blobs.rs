//! The node's cache of image blobs: content-addressed files, filled from the scheduler and verified on the way in.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

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

/// Bytes that the cache may hold. What is used is not counted out, so it may be more for a while.
const LIMIT: u64 = 8 << 30;

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

/// What is known of a blob here.
#[derive(Debug, Default)]
struct Known {
    /// Length and time of the file whose content was found to be right.
    verified: Option<(u64, SystemTime)>,
    /// Its path, as long as someone uses it.
    used: Weak<PathBuf>,
}

/// The cache.
#[derive(Debug)]
pub(crate) struct BlobCache {
    dir: PathBuf,
    limit: u64,
    fetching: KeyedLocks<String>,
    known: Arc<Mutex<HashMap<String, Known>>>,
}

impl BlobCache {
    /// Opens, or creates, the cache, and clears away what an interrupted fetch left.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        Self::open_with(dir, LIMIT)
    }

    fn open_with(dir: PathBuf, limit: u64) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if is_partial(&path) {
                fs::remove_file(path)?;
            }
        }
        Ok(Self {
            dir,
            limit,
            fetching: KeyedLocks::default(),
            known: Arc::default(),
        })
    }

    /// The blob's file; fetched first if it is not here. It stays as long as the path is held. Several who want the same blob
    /// share one fetch.
    pub(crate) async fn get(
        &self,
        blob: &BlobId,
        schedulers: &Schedulers,
    ) -> Result<Arc<PathBuf>, BlobError> {
        let path = Arc::new(self.dir.join(&blob.sha256));
        let _turn = self.fetching.lock(&blob.sha256).await;
        // One after the other has it, so the first may still use it.
        let used = {
            let mut known = lock(&self.known);
            let known = known.entry(blob.sha256.clone()).or_default();
            let used = known.used.upgrade().unwrap_or_else(|| Arc::clone(&path));
            known.used = Arc::downgrade(&used);
            used
        };
        if !self.holds(blob, &path).await {
            self.fetch_from_any(blob, schedulers, &path).await?;
            self.trim().await;
        }
        Ok(used)
    }

    async fn fetch_from_any(
        &self,
        blob: &BlobId,
        schedulers: &Schedulers,
        path: &Path,
    ) -> Result<(), BlobError> {
        tracing::info!(sha256 = blob.sha256, bytes = blob.size, "fetching an image blob");
        let mut first_error = None;
        for registry in schedulers.all() {
            match self.fetch(blob, registry, path).await {
                Ok(()) => return Ok(()),
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

    /// Whether the blob is here: by its content, which is read again where the file is not the one that was read last.
    async fn holds(&self, blob: &BlobId, path: &Path) -> bool {
        let (blob, path, known) = (blob.clone(), path.to_owned(), Arc::clone(&self.known));
        let look = move || {
            let Ok(length) = fs::metadata(&path).map(|metadata| metadata.len()) else {
                return Ok(false);
            };
            let seen = lock(&known).get(&blob.sha256).and_then(|known| known.verified);
            let as_before = seen.is_some_and(|seen| stamp(&path).is_ok_and(|now| now == seen));
            if length != blob.size || !(as_before || hash(&path)? == blob.sha256) {
                tracing::warn!(
                    sha256 = blob.sha256,
                    "a blob in the cache is damaged; it is fetched again"
                );
                fs::remove_file(&path)?;
                return Ok(false);
            }
            // By this the cache knows which was used last.
            fs::File::options()
                .append(true)
                .open(&path)?
                .set_modified(SystemTime::now())?;
            lock(&known).entry(blob.sha256).or_default().verified = Some(stamp(&path)?);
            io::Result::Ok(true)
        };
        match tokio::task::spawn_blocking(look).await {
            Ok(Ok(holds)) => holds,
            Ok(Err(error)) => {
                tracing::warn!(%error, "a blob in the cache cannot be read");
                false
            }
            Err(_) => false,
        }
    }

    /// Removes those that were used longest ago, while all together are too large; none that is used.
    async fn trim(&self) {
        let (dir, limit, known) = (self.dir.clone(), self.limit, Arc::clone(&self.known));
        let trimmed = tokio::task::spawn_blocking(move || trim(&dir, limit, &known)).await;
        if let Ok(Err(error)) = trimmed {
            tracing::warn!(%error, "the cache of blobs cannot be trimmed");
        }
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

// Plain data, which no panic can leave half changed.
fn lock(known: &Mutex<HashMap<String, Known>>) -> MutexGuard<'_, HashMap<String, Known>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_partial(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "part")
}

fn stamp(path: &Path) -> io::Result<(u64, SystemTime)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.len(), metadata.modified()?))
}

fn hash(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let (mut digest, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let length = file.read(&mut piece)?;
        if length == 0 {
            return Ok(hex(&digest.finalize()));
        }
        digest.update(&piece[..length]);
    }
}

fn trim(dir: &Path, limit: u64, known: &Mutex<HashMap<String, Known>>) -> io::Result<()> {
    let mut blobs = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if !is_partial(&path) {
            let (length, used) = stamp(&path)?;
            blobs.push((used, length, path));
        }
    }
    blobs.sort();
    let mut total: u64 = blobs.iter().map(|(_, length, _)| length).sum();
    for (_, length, path) in blobs {
        if total <= limit {
            break;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // Nobody begins to use it meanwhile.
        let mut known = lock(known);
        if known
            .get(name.as_ref())
            .is_some_and(|known| known.used.strong_count() > 0)
        {
            continue;
        }
        fs::remove_file(&path)?;
        known.remove(name.as_ref());
        total -= length;
        tracing::info!(sha256 = %name, "removed an image blob that was used longest ago");
    }
    lock(known).retain(|name, known| known.used.strong_count() > 0 || dir.join(name).exists());
    Ok(())
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
        assert!(cache.holds(&blob, &path).await && cache.holds(&blob, &path).await);
        assert_eq!(files(dir.path()), 1);
    }

    #[tokio::test]
    async fn a_blob_that_is_damaged_in_the_cache_is_not_taken() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = BlobCache::open(dir.path().to_owned()).expect("opened");
        let blob = blob_of(b"hello world");
        let path = dir.path().join(&blob.sha256);
        for damaged in [b"hello World" as &[u8], b"hello", b""] {
            fs::write(&path, b"hello world").expect("written");
            assert!(cache.holds(&blob, &path).await);
            fs::write(&path, damaged).expect("written");
            // As large as before, and of another time.
            assert!(!cache.holds(&blob, &path).await, "{damaged:?}");
            assert_eq!(files(dir.path()), 0, "it is fetched again");
        }
    }

    #[tokio::test]
    async fn what_was_used_longest_ago_makes_room_and_what_is_used_does_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = BlobCache::open_with(dir.path().to_owned(), 25).expect("opened");
        let blobs: Vec<BlobId> = (0..4)
            .map(|n| blob_of(format!("0123456-{n}").as_bytes()))
            .collect();
        let path = |blob: &BlobId| dir.path().join(&blob.sha256);
        for (n, blob) in blobs.iter().enumerate() {
            fs::write(path(blob), format!("0123456-{n}")).expect("written");
            assert!(cache.holds(blob, &path(blob)).await);
        }
        let none = Schedulers::new(
            &["http://127.0.0.1:1".to_owned()],
            &shoal_secret::Prove::new(None),
        );
        let first = cache
            .get(&blobs[0], &none.expect("an endpoint"))
            .await
            .expect("here");
        assert!(cache.holds(&blobs[1], &path(&blobs[1])).await);
        cache.trim().await;
        let here: Vec<bool> = blobs.iter().map(|blob| path(blob).exists()).collect();
        assert_eq!(
            here,
            [true, true, false, false],
            "the last two were used before the others"
        );
        drop(first);
        assert!(cache.holds(&blobs[1], &path(&blobs[1])).await);
        fs::write(dir.path().join("f".repeat(64)), b"0123456789").expect("written");
        cache.trim().await;
        assert!(!path(&blobs[0]).exists(), "nobody uses it any more");
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
