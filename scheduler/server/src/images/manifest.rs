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
        "image.toml: {message}; its keys are name, kernel, initrd, cmdline, cpus, max_cpus, memory, and in the table software_kvm: kernel, cmdline, max_cpus"
    )]
    Syntax {
        /// What the parser says.
        message: String,
    },
    /// It can be booted nowhere.
    #[error(
        "image.toml: kernel is missing: name one for hosts with hardware virtualization as kernel, one for others as kernel in the table software_kvm, or both"
    )]
    NoKernel,
    /// A value out of range.
    #[error("image.toml: {0}")]
    Field(#[from] FieldError),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    name: Option<String>,
    kernel: Option<String>,
    initrd: Option<String>,
    #[serde(default)]
    cmdline: String,
    cpus: Option<u32>,
    max_cpus: Option<u32>,
    memory: Option<String>,
    software_kvm: Option<SoftwareText>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SoftwareText {
    kernel: Option<String>,
    #[serde(default)]
    cmdline: String,
    max_cpus: Option<u32>,
}

/// A manifest whose every value is in range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Name of the image.
    pub name: String,
    /// File name of the kernel within the image; none: it has one for hosts without hardware virtualization only.
    pub kernel: Option<String>,
    /// File name of the initrd within the image.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub cmdline: String,
    /// Default vCPUs.
    pub cpus: u32,
    /// The most vCPUs that its kernels use.
    pub max_cpus: Option<u32>,
    /// Default memory.
    pub memory_bytes: u64,
    /// For hosts without hardware virtualization.
    pub software_kvm: Option<SoftwareManifest>,
}

/// The table `software_kvm`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SoftwareManifest {
    /// File name of the kernel that takes the place of the other.
    pub kernel: Option<String>,
    /// Added to the command line.
    pub cmdline: String,
    /// The most vCPUs there.
    pub max_cpus: Option<u32>,
}

/// Which of its files an image's manifest names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `kernel`
    Kernel,
    /// `initrd`
    Initrd,
    /// `software_kvm.kernel`
    SoftwareKernel,
}

impl Role {
    /// All.
    pub const ALL: [Self; 3] = [Self::Kernel, Self::Initrd, Self::SoftwareKernel];

    /// The key in the manifest.
    pub fn key(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::SoftwareKernel => "software_kvm.kernel",
        }
    }
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
        limits::cmdline("cmdline", &text.cmdline)?;
        let memory_bytes = match text.memory {
            None => limits::DEFAULT_MEMORY_BYTES,
            Some(size) => size
                .parse::<ByteSize>()
                .map_err(|_| FieldError::new("memory", &size, "a size such as \"256MiB\""))?
                .as_u64(),
        };
        let cpus = text.cpus.unwrap_or(1);
        limits::cpus(cpus)?;
        if let Some(most) = text.max_cpus {
            limits::max_cpus("max_cpus", most)?;
            limits::at_most("cpus", cpus, most)?;
        }
        limits::memory_bytes(memory_bytes)?;
        let software_kvm = text
            .software_kvm
            .map(|software| software_kvm(software, &text.cmdline));
        let manifest = Self {
            name,
            kernel: text.kernel,
            initrd: text.initrd.filter(|file| !file.is_empty()),
            cmdline: text.cmdline,
            cpus,
            max_cpus: text.max_cpus,
            memory_bytes,
            software_kvm: software_kvm.transpose()?,
        };
        manifest.check_files()?;
        Ok(manifest)
    }

    /// The name of a file within the image.
    pub fn file(&self, role: Role) -> Option<&str> {
        match role {
            Role::Kernel => self.kernel.as_deref(),
            Role::Initrd => self.initrd.as_deref(),
            Role::SoftwareKernel => self.software_kvm.as_ref()?.kernel.as_deref(),
        }
    }

    /// Which of the files has a name.
    pub fn role(&self, name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| self.file(*role) == Some(name))
    }

    fn check_files(&self) -> Result<(), ManifestError> {
        for role in Role::ALL {
            let Some(file) = self.file(role) else { continue };
            file_name(role.key(), file)?;
            if let Some(other) = self.role(file).filter(|other| *other != role) {
                let expected = format!("another file than {}", other.key());
                return Err(FieldError::new(role.key(), file, &expected).into());
            }
        }
        if self.kernel.is_none() && self.file(Role::SoftwareKernel).is_none() {
            return Err(ManifestError::NoKernel);
        }
        Ok(())
    }
}

fn software_kvm(text: SoftwareText, cmdline: &str) -> Result<SoftwareManifest, FieldError> {
    limits::cmdline("software_kvm.cmdline", &text.cmdline)?;
    limits::cmdline_with("software_kvm.cmdline", cmdline, &text.cmdline)?;
    if let Some(cpus) = text.max_cpus {
        limits::max_cpus("software_kvm.max_cpus", cpus)?;
    }
    Ok(SoftwareManifest {
        kernel: text.kernel,
        cmdline: text.cmdline,
        max_cpus: text.max_cpus,
    })
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
    fn an_image_may_have_a_kernel_for_each_kind_of_kvm_or_for_one() {
        let both = Manifest::parse(
            "name = 'x'\nkernel = 'k'\n[software_kvm]\nkernel = 's'\ncmdline = 'noapic'\nmax_cpus = 1",
            "",
        );
        let both = both.expect("good");
        assert_eq!(
            (both.role("k"), both.role("s")),
            (Some(Role::Kernel), Some(Role::SoftwareKernel))
        );
        let software = both.software_kvm.expect("there");
        assert_eq!(
            (software.cmdline.as_str(), software.max_cpus),
            ("noapic", Some(1))
        );
        let one = Manifest::parse("name = 'x'\n[software_kvm]\nkernel = 's'", "").expect("good");
        assert_eq!((one.kernel, one.software_kvm.is_some()), (None, true));
        let other = Manifest::parse("name = 'x'\nkernel = 'k'\n[software_kvm]\ncmdline = 'noapic'", "");
        assert_eq!(other.expect("good").file(Role::SoftwareKernel), None);
        let long = "x".repeat(1500);
        let too_long =
            format!("name = 'x'\nkernel = 'k'\ncmdline = '{long}'\n[software_kvm]\ncmdline = '{long}'");
        let error = Manifest::parse(&too_long, "")
            .expect_err("3001 bytes")
            .to_string();
        assert!(error.contains("software_kvm.cmdline: '3001 bytes'"), "{error}");
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
            (
                "name = 'x'\nkernel = 'k'\ninitrd = 'k'",
                "initrd: 'k' is not another file than kernel",
            ),
            ("name = 'x'\n[software_kvm]\ncmdline = 'a'", "kernel is missing"),
            (
                "name = 'x'\nkernel = 'k'\n[software_kvm]\nkernel = 'k'",
                "software_kvm.kernel: 'k' is not another file",
            ),
            (
                "name = 'x'\n[software_kvm]\nkernel = '../k'",
                "software_kvm.kernel",
            ),
            ("name = 'x'\n[software_kvm]\nkernel = ''", "software_kvm.kernel"),
            (
                "name = 'x'\nkernel = 'k'\nmax_cpus = 65",
                "max_cpus: '65' is not 1 to 64",
            ),
            (
                "name = 'x'\nkernel = 'k'\nmax_cpus = 1\ncpus = 2",
                "cpus: '2' is not at most 1, the max_cpus of the image",
            ),
            (
                "name = 'x'\ninitrd = 'k'\n[software_kvm]\nkernel = 'k'",
                "software_kvm.kernel",
            ),
            (
                "name = 'x'\nkernel = 'k'\n[software_kvm]\nmax_cpus = 0",
                "software_kvm.max_cpus: '0' is not 1 to 64",
            ),
            (
                "name = 'x'\nkernel = 'k'\n[software_kvm]\ncmdline = \"a\\nb\"",
                "software_kvm.cmdline",
            ),
            (
                "name = 'x'\nkernel = 'k'\n[software_kvm]\ncolour = 'red'",
                "colour",
            ),
            ("name = 'x'\nkernel = 'k'\nsoftware_kvm = 'k'", "software_kvm"),
            (
                "name = 'x'\nkernel = 'k'\ncmdline_software_kvm = 'a'",
                "its keys are",
            ),
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
