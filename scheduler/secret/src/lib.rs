//! The secret that the daemons of a cluster share: every call between scheduler and agent carries it, until each daemon has
//! a certificate. It keeps out who can reach a port, not who can read the network.
//!
//! - [`ClusterSecret`]: from a file that only its owner can read
//! - [`Prove`] adds it to calls, [`Demand`] refuses calls without it before anything else of them is looked at
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shoal_proto::SECRET_HEADER;
use subtle::ConstantTimeEq as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// Characters of a secret, at least and at most.
const LENGTH: std::ops::RangeInclusive<usize> = 32..=1024;

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read or written.
    #[error("cluster secret {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// Others may read it.
    #[error(
        "cluster secret {path}: others than its owner may use the file (mode {mode:o}); `chmod 600 {path}`"
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// What is in the file is no secret.
    #[error(
        "cluster secret {path}: is not one line of {} to {} printable ASCII characters without spaces",
        LENGTH.start(),
        LENGTH.end()
    )]
    Content {
        /// The file.
        path: PathBuf,
    },
}

/// The secret. It is never printed.
#[derive(Clone)]
pub struct ClusterSecret(Arc<str>);

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterSecret")
    }
}

impl ClusterSecret {
    /// From a file of mode 0600 or less.
    ///
    /// # Errors
    /// If it cannot be read, others may use it, or it holds no secret.
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let failed = |source| SecretError::File {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            let path = path.to_owned();
            return Err(SecretError::Mode { path, mode });
        }
        let mut text = Vec::new();
        let limit = u64::try_from(*LENGTH.end() + 2).unwrap_or(u64::MAX);
        file.take(limit).read_to_end(&mut text).map_err(failed)?;
        let text = text.trim_ascii_end();
        let printable = text.iter().all(u8::is_ascii_graphic);
        match str::from_utf8(text) {
            Ok(text) if printable && LENGTH.contains(&text.len()) => Ok(Self(text.into())),
            _ => Err(SecretError::Content {
                path: path.to_owned(),
            }),
        }
    }

    /// The one in the file; a new one of 244 random bits is written to it, with mode 0600, if there is no such file.
    ///
    /// # Errors
    /// As [`Self::read`], or if the file cannot be written.
    pub fn read_or_create(path: &Path) -> Result<Self, SecretError> {
        let failed = |source| SecretError::File {
            path: path.to_owned(),
            source,
        };
        let mut new = OpenOptions::new();
        match new.write(true).create_new(true).mode(0o600).open(path) {
            Ok(mut file) => {
                let half = || uuid::Uuid::new_v4().simple();
                writeln!(file, "{}{}", half(), half())
                    .and_then(|()| file.sync_all())
                    .map_err(failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
        Self::read(path)
    }

    /// In a time that says nothing of where the two differ.
    fn is(&self, said: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(said).into()
    }
}

/// Adds the secret to each call, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Prove(Option<MetadataValue<Ascii>>);

impl Prove {
    /// With this secret.
    #[must_use]
    pub fn new(secret: Option<&ClusterSecret>) -> Self {
        // What is printable ASCII is a value.
        let value = secret.and_then(|secret| secret.0.parse::<MetadataValue<Ascii>>().ok());
        Self(value.map(|mut value| {
            value.set_sensitive(true);
            value
        }))
    }
}

impl Interceptor for Prove {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(secret) = &self.0 {
            request.metadata_mut().insert(SECRET_HEADER, secret.clone());
        }
        Ok(request)
    }
}

/// Refuses calls without the secret, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Demand(Option<ClusterSecret>);

impl Demand {
    /// This secret.
    #[must_use]
    pub fn new(secret: Option<ClusterSecret>) -> Self {
        Self(secret)
    }
}

impl Interceptor for Demand {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(secret) = &self.0 else {
            return Ok(request);
        };
        let said = request.metadata().get(SECRET_HEADER);
        match said.map(|said| secret.is(said.as_encoded_bytes())) {
            Some(true) => Ok(request),
            Some(false) => Err(Status::unauthenticated(
                "this call carries another cluster's secret; all daemons of a cluster need the same file (--cluster-secret)",
            )),
            None => Err(Status::unauthenticated(
                "this call needs the cluster's secret: start the daemon that made it with --cluster-secret",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn file(content: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("secret");
        fs::write(&path, content).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
        (directory, path)
    }

    #[test]
    fn a_secret_is_made_once_and_for_its_owner_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("secret");
        let made = ClusterSecret::read_or_create(&path).expect("made");
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, 0o600);
        let again = ClusterSecret::read_or_create(&path).expect("read");
        assert_eq!(made.0, again.0);
        assert_eq!(
            (made.0.len(), format!("{made:?}")),
            (64, "ClusterSecret".to_owned())
        );
    }

    #[test]
    fn what_others_may_read_or_is_no_secret_is_refused() {
        let good = "x".repeat(32);
        let (_directory, path) = file(&good, 0o640);
        let error = ClusterSecret::read(&path).expect_err("refused").to_string();
        assert!(error.contains("mode 640"), "{error}");
        for bad in [
            "",
            "short",
            &format!("{good} {good}"),
            &"ä".repeat(40),
            &"x".repeat(1025),
        ] {
            let (_directory, path) = file(bad, 0o600);
            let error = ClusterSecret::read(&path).expect_err("refused").to_string();
            assert!(error.contains("printable"), "{bad}: {error}");
        }
        let (_directory, path) = file(&format!("{good}\n"), 0o400);
        assert_eq!(&*ClusterSecret::read(&path).expect("read").0, good);
    }

    #[test]
    fn calls_without_it_are_refused() {
        let secret = ClusterSecret("a".repeat(40).into());
        let other = ClusterSecret("b".repeat(40).into());
        let mut demand = Demand::new(Some(secret.clone()));
        let call = |secret: Option<&ClusterSecret>| Prove::new(secret).call(Request::new(()));
        assert!(demand.call(call(Some(&secret)).expect("said")).is_ok());
        for wrong in [None, Some(&other), Some(&ClusterSecret("a".repeat(41).into()))] {
            let refused = demand.call(call(wrong).expect("said")).expect_err("refused");
            assert_eq!(refused.code(), tonic::Code::Unauthenticated);
            assert!(!refused.message().contains("aaaa"), "it is not given away");
        }
        let mut open = Demand::new(None);
        assert!(open.call(Request::new(())).is_ok());
    }
}
