//! Reads an image directory, or a tar of one. Only what the manifest names is read; nothing is unpacked to disk.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::error::CliError;

const MANIFEST: &str = "image.toml";
/// A manifest is a few lines; more is not one.
const MANIFEST_LIMIT: u64 = 64 << 10;
/// An image has a few files; a tar with more entries than this was not made of an image directory.
const ENTRY_LIMIT: usize = 10_000;

/// The files that a manifest may name. The scheduler checks the rest of it.
#[derive(Debug, Deserialize)]
struct Names {
    kernel: Option<String>,
    initrd: Option<String>,
    #[serde(default)]
    software_kvm: SoftwareNames,
}

#[derive(Debug, Default, Deserialize)]
struct SoftwareNames {
    kernel: Option<String>,
}

/// An image on disk: the text of its manifest and where its files are.
#[derive(Debug)]
pub struct ImageSource {
    manifest: String,
    files: Vec<ImageFile>,
}

/// One file of an image.
#[derive(Debug, Clone)]
pub struct ImageFile {
    /// As the manifest names it.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    path: PathBuf,
    offset: u64,
}

impl ImageSource {
    /// Reads the manifest and finds the files that it names.
    pub fn open(path: &Path) -> Result<Self, CliError> {
        let metadata =
            fs::metadata(path).map_err(|source| file_error(path, "cannot read the image", source))?;
        if metadata.is_dir() {
            Self::open_directory(path)
        } else {
            Self::open_tar(path)
        }
    }

    /// The text of image.toml.
    #[must_use]
    pub fn manifest(&self) -> &str {
        &self.manifest
    }

    /// The files that it names.
    #[must_use]
    pub fn files(&self) -> Vec<ImageFile> {
        self.files.clone()
    }

    /// Reads a file in pieces of at most `limit` bytes, until `put` answers false.
    pub fn read(
        &mut self,
        file: &ImageFile,
        limit: usize,
        mut put: impl FnMut(Vec<u8>) -> bool,
    ) -> Result<(), CliError> {
        let failed = |source| file_error(&file.path, "cannot read", source);
        let mut input = File::open(&file.path).map_err(failed)?;
        input.seek(SeekFrom::Start(file.offset)).map_err(failed)?;
        let mut left = file.size_bytes;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(limit).min(limit);
            let mut data = vec![0; length];
            input.read_exact(&mut data).map_err(failed)?;
            left -= length as u64;
            if !put(data) {
                break;
            }
        }
        Ok(())
    }

    fn open_directory(directory: &Path) -> Result<Self, CliError> {
        let path = directory.join(MANIFEST);
        let file =
            File::open(&path).map_err(|source| file_error(&path, "cannot read the manifest", source))?;
        let manifest = read_manifest(&path, file)?;
        let find = |key: &str, name: &str| {
            let path = directory.join(name);
            let metadata = fs::metadata(&path)
                .map_err(|source| file_error(&path, &format!("named by '{key}' in {MANIFEST}"), source))?;
            if !metadata.is_file() {
                return Err(CliError::Failed(format!(
                    "{}: '{key}' must name a regular file",
                    path.display()
                )));
            }
            Ok(ImageFile {
                name: name.to_owned(),
                size_bytes: metadata.len(),
                path,
                offset: 0,
            })
        };
        let files = named_files(&path, &manifest, find)?;
        Ok(Self { manifest, files })
    }

    fn open_tar(path: &Path) -> Result<Self, CliError> {
        let entries = tar_entries(path)?;
        let manifest_entry = entries
            .iter()
            .filter(|entry| {
                Path::new(&entry.name)
                    .file_name()
                    .is_some_and(|name| name == MANIFEST)
            })
            .min_by_key(|entry| Path::new(&entry.name).components().count())
            .ok_or_else(|| {
                CliError::Failed(format!(
                    "{}: no {MANIFEST} in it; an image is a directory or a tar of one (not compressed)",
                    path.display()
                ))
            })?;
        let mut file = File::open(path).map_err(|source| file_error(path, "cannot read", source))?;
        file.seek(SeekFrom::Start(manifest_entry.offset))
            .map_err(|source| file_error(path, "cannot read", source))?;
        let manifest = read_manifest(path, file.take(manifest_entry.size_bytes))?;
        let root = Path::new(&manifest_entry.name)
            .parent()
            .unwrap_or(Path::new(""))
            .to_owned();
        let find = |key: &str, name: &str| {
            let wanted = root.join(name);
            let found = entries.iter().find(|entry| Path::new(&entry.name) == wanted);
            let entry = found.ok_or_else(|| {
                CliError::Failed(format!(
                    "{}: '{key}' in {MANIFEST} names '{name}', which is not in the tar",
                    path.display()
                ))
            })?;
            Ok(ImageFile {
                name: name.to_owned(),
                ..entry.clone()
            })
        };
        let files = named_files(path, &manifest, find)?;
        Ok(Self { manifest, files })
    }
}

/// Where each regular file of a tar lies. Names are only compared, never opened.
fn tar_entries(path: &Path) -> Result<Vec<ImageFile>, CliError> {
    let failed = |source| file_error(path, "not a readable tar", source);
    let file = File::open(path).map_err(|source| file_error(path, "cannot read", source))?;
    let length = file.metadata().map_err(failed)?.len();
    let mut archive = tar::Archive::new(file);
    let mut found = Vec::new();
    for entry in archive.entries_with_seek().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if found.len() == ENTRY_LIMIT {
            return Err(CliError::Failed(format!(
                "{}: more than {ENTRY_LIMIT} entries",
                path.display()
            )));
        }
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = clean(&entry.path().map_err(failed)?);
        let (offset, size_bytes) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(size_bytes).is_none_or(|end| end > length) {
            return Err(CliError::Failed(format!(
                "{}: cut short in the middle of '{name}'",
                path.display()
            )));
        }
        found.push(ImageFile {
            name,
            size_bytes,
            path: path.to_owned(),
            offset,
        });
    }
    Ok(found)
}

/// A tar's path without "./" in front.
fn clean(path: &Path) -> String {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    parts.collect::<PathBuf>().to_string_lossy().into_owned()
}

fn read_manifest(path: &Path, input: impl Read) -> Result<String, CliError> {
    let mut text = String::new();
    let mut limited = input.take(MANIFEST_LIMIT + 1);
    limited
        .read_to_string(&mut text)
        .map_err(|source| file_error(path, "cannot read the manifest", source))?;
    if text.len() as u64 > MANIFEST_LIMIT {
        return Err(CliError::Failed(format!(
            "{}: {MANIFEST} is larger than 64 KiB",
            path.display()
        )));
    }
    Ok(text)
}

fn named_files(
    path: &Path,
    manifest: &str,
    find: impl Fn(&str, &str) -> Result<ImageFile, CliError>,
) -> Result<Vec<ImageFile>, CliError> {
    let names: Names = toml::from_str(manifest)
        .map_err(|error| CliError::Failed(format!("{}: {MANIFEST}: {error}", path.display())))?;
    if names.kernel.is_none() && names.software_kvm.kernel.is_none() {
        return Err(CliError::Failed(format!(
            "{}: {MANIFEST}: no kernel: set 'kernel', or 'kernel' under [software_kvm], or both; their values are file names",
            path.display()
        )));
    }
    let mut files = Vec::new();
    for (key, name) in [
        ("kernel", names.kernel),
        ("initrd", names.initrd),
        ("software_kvm.kernel", names.software_kvm.kernel),
    ] {
        let Some(name) = name else { continue };
        if name.is_empty()
            || !Path::new(&name)
                .components()
                .all(|part| matches!(part, Component::Normal(_)))
        {
            return Err(CliError::Failed(format!(
                "{}: {MANIFEST}: '{key}' is '{name}'; it must be a path inside the image",
                path.display()
            )));
        }
        files.push(find(key, &name)?);
    }
    Ok(files)
}

fn file_error(path: &Path, what: &str, source: io::Error) -> CliError {
    CliError::File {
        path: path.to_owned(),
        what: what.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "name = \"x\"\nkernel = \"k\"\ninitrd = \"sub/i\"\n[software_kvm]\nkernel = \"s\"\n";

    fn directory(manifest: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::write(dir.path().join(MANIFEST), manifest).expect("written");
        fs::write(dir.path().join("k"), b"kernel bytes").expect("written");
        fs::write(dir.path().join("s"), b"another kernel").expect("written");
        fs::create_dir(dir.path().join("sub")).expect("made");
        fs::write(dir.path().join("sub/i"), b"initrd").expect("written");
        dir
    }

    fn content(source: &mut ImageSource, index: usize) -> Vec<u8> {
        let mut all = Vec::new();
        let file = source.files()[index].clone();
        source
            .read(&file, 5, |data| {
                all.extend(data);
                true
            })
            .expect("readable");
        all
    }

    fn error(path: &Path) -> String {
        ImageSource::open(path).expect_err("refused").to_string()
    }

    #[test]
    fn a_directory_and_a_tar_of_it_are_the_same_image() {
        let dir = directory(TEXT);
        let out = tempfile::tempdir().expect("a temporary directory");
        for prefix in [".", "some-image"] {
            let tar_path = out.path().join("image.tar");
            let mut tar = tar::Builder::new(File::create(&tar_path).expect("made"));
            tar.append_dir_all(prefix, dir.path()).expect("packed");
            tar.finish().expect("written");
            for path in [dir.path(), &tar_path] {
                let mut source = ImageSource::open(path).expect("an image");
                assert_eq!(source.manifest(), TEXT);
                assert_eq!(source.files()[1].name, "sub/i");
                assert_eq!(content(&mut source, 0), b"kernel bytes");
                assert_eq!(content(&mut source, 1), b"initrd");
                assert_eq!(content(&mut source, 2), b"another kernel");
            }
        }
    }

    #[test]
    fn errors_name_the_key_and_the_file() {
        let dir = directory("kernel = \"gone\"");
        assert!(
            error(dir.path()).contains("gone: named by 'kernel' in image.toml"),
            "{}",
            error(dir.path())
        );
        let dir = directory("[software_kvm]\nkernel = \"gone\"");
        let text = error(dir.path());
        assert!(
            text.contains("gone: named by 'software_kvm.kernel' in image.toml"),
            "{text}"
        );
        let dir = directory("[software_kvm]\nkernel = \"s\"");
        assert_eq!(ImageSource::open(dir.path()).expect("an image").files().len(), 1);
        let dir = directory("initrd = \"k\"");
        assert!(error(dir.path()).contains("no kernel: set 'kernel'"));
        let dir = directory("kernel = [");
        assert!(error(dir.path()).contains("image.toml"));
        let dir = directory(&"#".repeat(70_000));
        assert!(error(dir.path()).contains("larger than 64 KiB"));
        assert!(error(Path::new("no/such/image")).contains("no/such/image"));
    }

    #[test]
    fn paths_that_leave_the_image_are_refused() {
        for name in ["../k", "/etc/passwd", "sub/../../k", ""] {
            let dir = directory(&format!("kernel = \"{name}\""));
            assert!(
                error(dir.path()).contains("must be a path inside the image"),
                "{name}: {}",
                error(dir.path())
            );
        }
    }

    #[test]
    fn a_tar_cut_short_is_refused() {
        let dir = directory(TEXT);
        fs::write(dir.path().join("k"), vec![7; 100_000]).expect("written");
        let out = tempfile::tempdir().expect("a temporary directory");
        let tar_path = out.path().join("image.tar");
        let mut tar = tar::Builder::new(File::create(&tar_path).expect("made"));
        tar.append_path_with_name(dir.path().join(MANIFEST), MANIFEST)
            .expect("packed");
        tar.append_path_with_name(dir.path().join("k"), "k")
            .expect("packed");
        tar.finish().expect("written");
        File::options()
            .write(true)
            .open(&tar_path)
            .expect("opened")
            .set_len(50_000)
            .expect("cut");
        assert!(!error(&tar_path).is_empty());
        fs::write(&tar_path, vec![0x5a; 1 << 20]).expect("written");
        assert!(!error(&tar_path).is_empty());
    }
}
