//! One import, step by step: manifest, then each file in pieces, then all of it is kept, or nothing.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bytesize::ByteSize;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use super::manifest::{Manifest, ManifestError};
use super::{blob_path, hex};
use crate::limits::shorten;
use crate::record::{BlobRef, ImageRecord, now_unix_ms};

/// The largest kernel or initrd.
const MAX_FILE_BYTES: u64 = 4 << 30;
/// How long the VMM may look at an image.
const CHECK_TIME: Duration = Duration::from_secs(30);

/// Why an image was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The manifest is bad.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A file came that the manifest does not name.
    #[error("file '{0}' is not named by image.toml as kernel or initrd")]
    UnexpectedFile(String),
    /// A file came twice.
    #[error("file '{0}' was sent twice")]
    Repeated(String),
    /// A file the manifest names did not come.
    #[error("image.toml names {field} = '{file}', but there is no such file in the image")]
    Missing {
        /// The manifest's key.
        field: &'static str,
        /// The file's name.
        file: String,
    },
    /// A file is too large or empty.
    #[error(
        "file '{file}' has {size}; 1 byte to {} are allowed",
        ByteSize::b(MAX_FILE_BYTES)
    )]
    Size {
        /// The file's name.
        file: String,
        /// What was announced.
        size: ByteSize,
    },
    /// More or fewer bytes came than were announced.
    #[error("file '{file}' was announced with {announced} bytes, but {came} came")]
    Length {
        /// The file's name.
        file: String,
        /// Announced.
        announced: u64,
        /// Came.
        came: u64,
    },
    /// Parts came in an impossible order.
    #[error("import stream: {0}")]
    Order(&'static str),
    /// The VMM cannot boot it.
    #[error("{0}")]
    NotBootable(String),
    /// The image store cannot be written.
    #[error("image store")]
    Io(#[from] std::io::Error),
}

#[derive(Debug)]
struct Incoming {
    name: String,
    announced: u64,
    came: u64,
    hash: Sha256,
    file: NamedTempFile,
}

#[derive(Debug)]
struct Staged {
    blob: BlobRef,
    file: NamedTempFile,
}

/// An import under way. Dropping it leaves nothing behind.
#[derive(Debug)]
pub struct Import {
    directory: PathBuf,
    manifest: Manifest,
    incoming: Option<Incoming>,
    kernel: Option<Staged>,
    initrd: Option<Staged>,
}

impl Import {
    /// Begins with the manifest's text. `directory` is where blobs are kept.
    pub fn begin(directory: &Path, toml: &str, name: &str) -> Result<Self, ImportError> {
        let manifest = Manifest::parse(toml, name)?;
        Ok(Self {
            directory: directory.to_owned(),
            manifest,
            incoming: None,
            kernel: None,
            initrd: None,
        })
    }

    /// Begins a file.
    pub fn start_file(&mut self, name: &str, size: u64) -> Result<(), ImportError> {
        self.finish_file()?;
        let taken = if name == self.manifest.kernel {
            self.kernel.is_some()
        } else if Some(name) == self.manifest.initrd.as_deref() {
            self.initrd.is_some()
        } else {
            return Err(ImportError::UnexpectedFile(shorten(name)));
        };
        if taken {
            return Err(ImportError::Repeated(shorten(name)));
        }
        if !(1..=MAX_FILE_BYTES).contains(&size) {
            return Err(ImportError::Size {
                file: shorten(name),
                size: ByteSize::b(size),
            });
        }
        let file = tempfile::Builder::new()
            .prefix(super::STAGING_PREFIX)
            .tempfile_in(&self.directory)?;
        let name = name.to_owned();
        self.incoming = Some(Incoming {
            name,
            announced: size,
            came: 0,
            hash: Sha256::new(),
            file,
        });
        Ok(())
    }

    /// Takes bytes of the present file.
    pub fn data(&mut self, data: &[u8]) -> Result<(), ImportError> {
        let incoming = self
            .incoming
            .as_mut()
            .ok_or(ImportError::Order("data before any file"))?;
        incoming.came += data.len() as u64;
        if incoming.came > incoming.announced {
            return Err(incoming.wrong_length());
        }
        incoming.hash.update(data);
        incoming.file.write_all(data)?;
        Ok(())
    }

    /// Ends the stream: every file the manifest names has to be complete.
    pub fn finish_files(&mut self) -> Result<(), ImportError> {
        self.finish_file()?;
        let missing = |field, file: &str| {
            Err(ImportError::Missing {
                field,
                file: file.to_owned(),
            })
        };
        if self.kernel.is_none() {
            return missing("kernel", &self.manifest.kernel);
        }
        match &self.manifest.initrd {
            Some(file) if self.initrd.is_none() => missing("initrd", file),
            _ => Ok(()),
        }
    }

    /// Has the VMM look at what is to be booted.
    pub async fn check(&self, vmm_binary: &Path) -> Result<(), ImportError> {
        let Some(kernel) = &self.kernel else {
            return Err(ImportError::Order("check before the files"));
        };
        let mut command = tokio::process::Command::new(vmm_binary);
        command.arg("check-image").arg("--kernel").arg(kernel.file.path());
        if let Some(initrd) = &self.initrd {
            command.arg("--initrd").arg(initrd.file.path());
        }
        let run = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(CHECK_TIME, run).await.map_err(|_| {
            ImportError::NotBootable(format!("looking at the image took over {CHECK_TIME:?}"))
        })??;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let line = said
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("the image cannot be booted");
        Err(ImportError::NotBootable(shorten(&self.in_user_terms(line))))
    }

    /// The user knows the files by their names in the image, not by those they have here.
    fn in_user_terms(&self, line: &str) -> String {
        let kernel = self.kernel.as_ref().zip(Some(&self.manifest.kernel));
        let initrd = self.initrd.as_ref().zip(self.manifest.initrd.as_ref());
        let line = line.trim_start_matches("shoal-vmm: ").to_owned();
        kernel
            .into_iter()
            .chain(initrd)
            .fold(line, |line, (staged, name)| {
                line.replace(&staged.file.path().display().to_string(), &format!("'{name}'"))
            })
    }

    /// Keeps the files; the caller stores the record.
    pub fn keep(self) -> Result<ImageRecord, ImportError> {
        let Some(kernel) = self.kernel else {
            return Err(ImportError::Order("end before the files"));
        };
        let kernel = keep_blob(&self.directory, kernel)?;
        let initrd = self
            .initrd
            .map(|initrd| keep_blob(&self.directory, initrd))
            .transpose()?;
        std::fs::File::open(&self.directory)?.sync_all()?;
        let manifest = self.manifest;
        let mut record = ImageRecord {
            name: manifest.name,
            digest: String::new(),
            kernel,
            initrd,
            cmdline: manifest.cmdline,
            cmdline_software_kvm: manifest.cmdline_software_kvm,
            cpus: manifest.cpus,
            memory_bytes: manifest.memory_bytes,
            created_unix_ms: 0,
        };
        let canonical = serde_json::to_vec(&record).map_err(std::io::Error::other)?;
        record.digest = hex(&Sha256::digest(canonical));
        record.created_unix_ms = now_unix_ms();
        Ok(record)
    }

    fn finish_file(&mut self) -> Result<(), ImportError> {
        let Some(incoming) = self.incoming.take() else {
            return Ok(());
        };
        if incoming.came != incoming.announced {
            return Err(incoming.wrong_length());
        }
        let blob = BlobRef {
            sha256: hex(&incoming.hash.finalize()),
            size_bytes: incoming.came,
        };
        let staged = Some(Staged {
            blob,
            file: incoming.file,
        });
        if incoming.name == self.manifest.kernel {
            self.kernel = staged;
        } else {
            self.initrd = staged;
        }
        Ok(())
    }
}

impl Incoming {
    fn wrong_length(&self) -> ImportError {
        ImportError::Length {
            file: shorten(&self.name),
            announced: self.announced,
            came: self.came,
        }
    }
}

fn keep_blob(directory: &Path, staged: Staged) -> Result<BlobRef, ImportError> {
    staged.file.as_file().sync_all()?;
    staged
        .file
        .persist(blob_path(directory, &staged.blob.sha256))
        .map_err(|error| error.error)?;
    Ok(staged.blob)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = "name = 'x'\nkernel = 'k'\ninitrd = 'i'";

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().expect("temporary directory")
    }

    fn files(directory: &Path) -> usize {
        std::fs::read_dir(directory).expect("directory").count()
    }

    #[test]
    fn a_good_image_is_kept_by_content() {
        let directory = directory();
        let mut digests = Vec::new();
        for _ in 0..2 {
            let mut import = Import::begin(directory.path(), TOML, "").expect("manifest");
            import.start_file("i", 3).expect("initrd");
            import.data(b"abc").expect("data");
            import.start_file("k", 6).expect("kernel");
            import.data(b"ker").expect("data");
            import.data(b"nel").expect("data");
            import.finish_files().expect("complete");
            let record = import.keep().expect("kept");
            assert_eq!(
                record.initrd.as_ref().map(|blob| blob.sha256.as_str()),
                Some("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
            );
            digests.push(record.digest);
        }
        assert_eq!(
            digests[0], digests[1],
            "the time of import is not part of the digest"
        );
        assert_eq!(files(directory.path()), 2);
    }

    #[test]
    fn hostile_streams_are_refused_and_leave_nothing() {
        type Steps = fn(&mut Import) -> Result<(), ImportError>;
        let cases: [(&str, Steps); 9] = [
            ("data before any file", |import| import.data(b"x")),
            ("not named", |import| import.start_file("other", 1)),
            ("not named", |import| import.start_file("../k", 1)),
            ("0 B", |import| import.start_file("k", 0)),
            ("16.0 EiB", |import| import.start_file("k", u64::MAX)),
            ("announced with 1 bytes, but 2", |import| {
                import.start_file("k", 1)?;
                import.data(b"xy")
            }),
            ("announced with 2 bytes, but 1", |import| {
                import.start_file("k", 2)?;
                import.data(b"x")?;
                import.finish_files()
            }),
            ("sent twice", |import| {
                import.start_file("k", 1)?;
                import.data(b"x")?;
                import.start_file("k", 1)
            }),
            ("initrd = 'i', but there is no such file", |import| {
                import.start_file("k", 1)?;
                import.data(b"x")?;
                import.finish_files()
            }),
        ];
        for (expected, steps) in cases {
            let directory = directory();
            let mut import = Import::begin(directory.path(), TOML, "").expect("manifest");
            let error = steps(&mut import).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
            drop(import);
            assert_eq!(files(directory.path()), 0, "{expected}");
        }
    }

    #[tokio::test]
    async fn the_vmm_has_the_last_word() {
        let directory = directory();
        let mut import = Import::begin(directory.path(), "name = 'x'\nkernel = 'k'", "").expect("manifest");
        import.start_file("k", 1).expect("kernel");
        import.data(b"x").expect("data");
        import.finish_files().expect("complete");
        import.check(Path::new("/bin/true")).await.expect("accepted");
        let error = import.check(Path::new("/bin/false")).await.expect_err("refused");
        assert!(error.to_string().contains("cannot be booted"), "{error}");
    }
}
