//! The image store: records by name, blobs by content.

mod import;
mod manifest;
pub mod mirror;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

pub use import::{Import, ImportError};

use crate::record::ImageRecord;

/// Files of imports that have not ended begin with this.
const STAGING_PREFIX: &str = "import-";

/// All images, and the directory of their blobs.
#[derive(Debug)]
pub struct ImageStore {
    directory: PathBuf,
    images: RwLock<BTreeMap<String, Arc<ImageRecord>>>,
}

impl ImageStore {
    /// Opens the store; drops blobs that neither an image nor `used` names, and what broken imports left.
    pub fn open(directory: PathBuf, images: Vec<ImageRecord>, used: &[String]) -> io::Result<Self> {
        std::fs::create_dir_all(&directory)?;
        let mut keep: HashSet<&str> = used.iter().map(String::as_str).collect();
        for image in &images {
            keep.extend(image.blobs().map(|blob| blob.sha256.as_str()));
        }
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with(STAGING_PREFIX) || (is_sha256(name) && !keep.contains(name)) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(Self::view(directory, images))
    }

    /// The images as they are stored; what is in the directory is left alone.
    pub fn view(directory: PathBuf, images: Vec<ImageRecord>) -> Self {
        let images = images
            .into_iter()
            .map(|image| (image.name.clone(), Arc::new(image)))
            .collect();
        Self {
            directory,
            images: RwLock::new(images),
        }
    }

    /// Where blobs are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// An image by name.
    pub fn get(&self, name: &str) -> Option<Arc<ImageRecord>> {
        self.images
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// All images by name.
    pub fn list(&self) -> Vec<Arc<ImageRecord>> {
        self.images
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// Publishes a record that has been stored.
    pub fn insert(&self, image: Arc<ImageRecord>) {
        self.images
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(image.name.clone(), image);
    }

    /// The file of a blob; None if the text is no SHA-256.
    pub fn blob(&self, sha256: &str) -> Option<PathBuf> {
        is_sha256(sha256).then(|| blob_path(&self.directory, sha256))
    }
}

fn blob_path(directory: &Path, sha256: &str) -> PathBuf {
    directory.join(sha256)
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opening_sweeps_what_nothing_names() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let used = "a".repeat(64);
        let unused = "b".repeat(64);
        for name in [used.as_str(), unused.as_str(), "import-123", "notes.txt"] {
            std::fs::write(directory.path().join(name), b"x").expect("written");
        }
        let store = ImageStore::open(
            directory.path().to_owned(),
            Vec::new(),
            std::slice::from_ref(&used),
        )
        .expect("opened");
        let left = std::fs::read_dir(directory.path()).expect("directory").count();
        assert_eq!(left, 2, "the used blob and the stranger's file");
        assert!(store.blob("../../etc/passwd").is_none() && store.blob(&used).is_some());
    }
}
