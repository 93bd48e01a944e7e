//! `image.toml`: what an image directory says about itself.

use bytesize::ByteSize;
use serde::Deserialize;

use crate::limits::{self, FieldError};

/// A manifest is a few lines.
const MAX_MANIFEST_BYTES: usize = 64 << 10;

/// What is wrong with a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Longer than any real one.
    #[error("image.toml is {0} bytes long; at most {MAX_MANIFEST_BYTES} are allowed")]
    TooLong(usize),
    /// No TOML, an unknown key, a missing one or one of the wrong type.
    #[error(
        "image.toml: {message}; its keys are name, kernel, initrd, cmdline, cmdline_software_kvm, cpus, memory"
    )]
    Syntax {
        /// What the parser says.
        message: String,
    },
    /// A value out of range.
    #[error("image.toml: {0}")]
    Field(#[from] FieldError),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    name: Option<String>,
    kernel: String,
    initrd: Option<String>,
    #[serde(default)]
    cmdline: String,
    #[serde(default)]
    cmdline_software_kvm: String,
    cpus: Option<u32>,
    memory: Option<String>,
}

/// A manifest whose every value is in range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Name of the image.
    pub name: String,
    /// File name of the kernel within the image.
    pub kernel: String,
    /// File name of the initrd within the image.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub cmdline: String,
    /// Appended where KVM emulates ring 0.
    pub cmdline_software_kvm: String,
    /// Default vCPUs.
    pub cpus: u32,
    /// Default memory.
    pub memory_bytes: u64,
}

impl Manifest {
    /// Parses and checks. `name` overrides the manifest's own if it is not empty.
    pub fn parse(toml: &str, name: &str) -> Result<Self, ManifestError> {
        if toml.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLong(toml.len()));
        }
        let text: Text = toml::from_str(toml).map_err(|error| ManifestError::Syntax {
            message: limits::shorten(&error.message().replace('\n', " ")),
        })?;
        let name = if name.is_empty() {
            text.name.unwrap_or_default()
        } else {
            name.to_owned()
        };
        limits::image_name(&name)?;
        let initrd = text.initrd.filter(|file| !file.is_empty());
        for (field, file) in [("kernel", Some(&text.kernel)), ("initrd", initrd.as_ref())] {
            if let Some(file) = file {
                file_name(field, file)?;
            }
        }
        if initrd.as_ref() == Some(&text.kernel) {
            return Err(FieldError::new("initrd", &text.kernel, "another file than the kernel").into());
        }
        limits::cmdline("cmdline", &text.cmdline)?;
        limits::cmdline("cmdline_software_kvm", &text.cmdline_software_kvm)?;
        let memory_bytes = match text.memory {
            None => limits::DEFAULT_MEMORY_BYTES,
            Some(size) => size
                .parse::<ByteSize>()
                .map_err(|_| FieldError::new("memory", &size, "a size such as \"256MiB\""))?
                .as_u64(),
        };
        let cpus = text.cpus.unwrap_or(1);
        limits::cpus(cpus)?;
        limits::memory_bytes(memory_bytes)?;
        Ok(Self {
            name,
            kernel: text.kernel,
            initrd,
            cmdline: text.cmdline,
            cmdline_software_kvm: text.cmdline_software_kvm,
            cpus,
            memory_bytes,
        })
    }
}

/// The scheduler never opens a file by this name, but whoever reads the image does: it must stay inside it.
fn file_name(field: &'static str, file: &str) -> Result<(), FieldError> {
    let inside = file.len() <= 255
        && !file.contains(['\0', '\\'])
        && file
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..");
    if inside {
        Ok(())
    } else {
        Err(FieldError::new(field, file, "a file inside the image directory"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_manifest_gets_defaults() {
        let manifest = Manifest::parse("name = 'probe'\nkernel = 'probe.elf'", "").expect("good");
        assert_eq!((manifest.cpus, manifest.memory_bytes), (1, 256 << 20));
        assert_eq!(manifest.initrd, None);
        let renamed = Manifest::parse("kernel = 'k'\nmemory = '1 GiB'\ncpus = 2", "other").expect("good");
        assert_eq!(
            (renamed.name.as_str(), renamed.cpus, renamed.memory_bytes),
            ("other", 2, 1 << 30)
        );
    }

    #[test]
    fn every_mistake_is_named() {
        let cases = [
            ("kernel = 'k'", "name"),
            ("name = 'x'", "kernel"),
            ("name = 'x'\nkernel = 'k'\ncolour = 'red'", "colour"),
            ("name = 'x'\nkernel = '../../etc/passwd'", "kernel"),
            ("name = 'x'\nkernel = '/boot/vmlinux'", "kernel"),
            ("name = 'x'\nkernel = ''", "kernel"),
            ("name = 'x'\nkernel = 'k'\ninitrd = 'k'", "initrd"),
            ("name = 'x'\nkernel = 'k'\nmemory = '100TiB'", "memory"),
            ("name = 'x'\nkernel = 'k'\nmemory = '0'", "memory"),
            ("name = 'x'\nkernel = 'k'\nmemory = 'much'", "memory"),
            ("name = 'x'\nkernel = 'k'\ncpus = 0", "cpus"),
            ("name = 'x'\nkernel = 'k'\ncpus = -1", "cpus"),
            ("name = 'X x'\nkernel = 'k'", "name"),
            ("name = 'x'\nkernel = 'k'\ncmdline = \"a\\nb\"", "cmdline"),
            ("[[[", "image.toml"),
        ];
        for (toml, expected) in cases {
            let error = Manifest::parse(toml, "").expect_err(toml).to_string();
            assert!(error.contains(expected), "{toml:?}: {error}");
        }
        let long = "x".repeat(MAX_MANIFEST_BYTES + 1);
        assert!(matches!(
            Manifest::parse(&long, ""),
            Err(ManifestError::TooLong(_))
        ));
    }
}
