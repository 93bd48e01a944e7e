//! One import, step by step: manifest, then each file in pieces, then all of it is kept, or nothing.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bytesize::ByteSize;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use super::manifest::{Manifest, ManifestError, Role};
use super::{blob_path, hex};
use crate::limits::shorten;
use crate::record::{BlobRef, ImageRecord, SoftwareKvm, now_unix_ms};

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
    #[error("file '{0}' is not named by image.toml as kernel, initrd or software_kvm.kernel")]
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
    role: Role,
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
    /// One of each role at most.
    staged: Vec<(Role, Staged)>,
}

impl Import {
    /// Begins with the manifest's text. `directory` is where blobs are kept.
    pub fn begin(directory: &Path, toml: &str, name: &str) -> Result<Self, ImportError> {
        let manifest = Manifest::parse(toml, name)?;
        Ok(Self {
            directory: directory.to_owned(),
            manifest,
            incoming: None,
            staged: Vec::new(),
        })
    }

    /// Begins a file.
    pub fn start_file(&mut self, name: &str, size: u64) -> Result<(), ImportError> {
        self.finish_file()?;
        let Some(role) = self.manifest.role(name) else {
            return Err(ImportError::UnexpectedFile(shorten(name)));
        };
        if self.staged(role).is_some() {
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
            role,
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
        for role in Role::ALL {
            let Some(file) = self.manifest.file(role) else {
                continue;
            };
            if self.staged(role).is_none() {
                return Err(ImportError::Missing {
                    field: role.key(),
                    file: file.to_owned(),
                });
            }
        }
        Ok(())
    }

    fn staged(&self, role: Role) -> Option<&Staged> {
        let found = self.staged.iter().find(|(other, _)| *other == role);
        found.map(|(_, staged)| staged)
    }

    /// Has the VMM look at what is to be booted.
    pub async fn check(&self, vmm_binary: &Path) -> Result<(), ImportError> {
        for kernel in [Role::Kernel, Role::SoftwareKernel] {
            if let Some(kernel) = self.staged(kernel) {
                self.check_kernel(vmm_binary, kernel).await?;
            }
        }
        Ok(())
    }

    async fn check_kernel(&self, vmm_binary: &Path, kernel: &Staged) -> Result<(), ImportError> {
        let mut command = tokio::process::Command::new(vmm_binary);
        command.arg("check-image").arg("--kernel").arg(kernel.file.path());
        if let Some(initrd) = self.staged(Role::Initrd) {
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
        let line = line.trim_start_matches("shoal-vmm: ").to_owned();
        self.staged.iter().fold(line, |line, (role, staged)| {
            let name = self.manifest.file(*role).unwrap_or_default();
            line.replace(&staged.file.path().display().to_string(), &format!("'{name}'"))
        })
    }

    /// Keeps the files; the caller stores the record.
    pub fn keep(self) -> Result<ImageRecord, ImportError> {
        let (mut kernel, mut initrd, mut software_kernel) = (None, None, None);
        for (role, staged) in self.staged {
            let blob = keep_blob(&self.directory, staged)?;
            match role {
                Role::Kernel => kernel = Some(blob),
                Role::Initrd => initrd = Some(blob),
                Role::SoftwareKernel => software_kernel = Some(blob),
            }
        }
        if kernel.is_none() && software_kernel.is_none() {
            return Err(ImportError::Order("end before the files"));
        }
        std::fs::File::open(&self.directory)?.sync_all()?;
        let manifest = self.manifest;
        let mut record = ImageRecord {
            name: manifest.name,
            digest: String::new(),
            kernel,
            initrd,
            cmdline: manifest.cmdline,
            software_kvm: manifest.software_kvm.map(|software| SoftwareKvm {
                kernel: software_kernel,
                cmdline: software.cmdline,
                max_cpus: software.max_cpus,
            }),
            cpus: manifest.cpus,
            max_cpus: manifest.max_cpus,
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
        let staged = Staged {
            blob,
            file: incoming.file,
        };
        self.staged.push((incoming.role, staged));
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
    fn the_kernel_for_software_kvm_is_kept_like_the_other() {
        let toml = format!("{TOML}\n[software_kvm]\nkernel = 's'\nmax_cpus = 1");
        let directory = directory();
        let mut import = Import::begin(directory.path(), &toml, "").expect("manifest");
        for name in ["k", "i"] {
            import.start_file(name, 1).expect("named");
            import.data(name.as_bytes()).expect("data");
        }
        let error = import.finish_files().expect_err("one is missing").to_string();
        assert!(
            error.contains("names software_kvm.kernel = 's', but there is no such file"),
            "{error}"
        );
        import.start_file("s", 1).expect("named");
        import.data(b"s").expect("data");
        import.finish_files().expect("complete");
        let record = import.keep().expect("kept");
        assert_eq!((record.blobs().count(), files(directory.path())), (3, 3));
        let kernels = record.kernels();
        assert_eq!(kernels.software, Some(shoal_plan::SoftwareKernel::Ring3));
        assert_eq!((kernels.hardware, kernels.software_cpus), (true, Some(1)));
        // It is not swept away, and a record of before there was such a thing still loads.
        let mut old = serde_json::to_value(&record).expect("JSON");
        let images = super::super::ImageStore::open(directory.path().to_owned(), vec![record], &[]);
        images.expect("opened");
        assert_eq!(files(directory.path()), 3);
        let fields = old.as_object_mut().expect("an object");
        fields.remove("software_kvm");
        fields.insert("cmdline_software_kvm".to_owned(), "noapic".into());
        let old: ImageRecord = serde_json::from_value(old).expect("an old record");
        assert!(old.software_kvm.is_none() && old.kernel.is_some());
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
