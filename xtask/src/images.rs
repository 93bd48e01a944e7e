//! The guest images: directories with an `image.toml` and the files it names (docs/images.md).

use std::fs;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::context::{Context, give_up, run, step};
use crate::cpio::Archive;
use crate::kernel::{self, Kernel};
use crate::{checks_image, packages};

/// The program that is most of the Linux image's root: Debian's `busybox-static`.
pub const BUSYBOX: &str = "/bin/busybox";

/// Commands that have a name of their own in the Linux image. Few: unpacking each costs time at every boot. All others are
/// `busybox NAME`, and the shell knows them by name anyway.
const COMMANDS: &[&str] = &[
    "sh",
    "ash",
    "cat",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "dmesg",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "free",
    "grep",
    "head",
    "hostname",
    "ip",
    "kill",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mount",
    "mv",
    "nc",
    "ping",
    "ps",
    "pwd",
    "rm",
    "sed",
    "seq",
    "sha256sum",
    "sleep",
    "sort",
    "stty",
    "sync",
    "tail",
    "test",
    "time",
    "top",
    "touch",
    "tr",
    "true",
    "umount",
    "uname",
    "uptime",
    "vi",
    "wc",
    "wget",
    "xargs",
    "yes",
];

/// An image that this workspace builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Image {
    /// The bare-metal guest that dirties, checks and reports memory
    Probe,
    /// Linux with busybox
    Linux,
    /// The same with `checks`, which tries from within what a Linux guest must do right
    LinuxChecks,
}

impl Image {
    fn name(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Linux => "linux",
            Self::LinuxChecks => "linux-checks",
        }
    }
}

/// Where an image is, once it has been built.
#[must_use]
pub fn directory(context: &Context, image: Image) -> PathBuf {
    context.target().join("images").join(image.name())
}

/// Builds every image, with these kernels for Linux; `linux` is built with `linux-checks`.
///
/// # Errors
/// As [`build`].
pub fn build_all(context: &Context, kernels: &[Kernel]) -> Result<()> {
    [Image::Probe, Image::LinuxChecks]
        .into_iter()
        .try_for_each(|image| build(context, image, kernels))
}

/// Builds every image for this host, and `others` beside the kernel, which takes the longest.
///
/// # Errors
/// As [`build`] and `others`.
pub fn build_all_beside(context: &Context, others: impl FnOnce() -> Result<()>) -> Result<()> {
    packages::ensure(&[packages::BASIC, packages::LINUX].concat())?;
    let host = Kernel::of_this_host();
    thread::scope(|scope| {
        let kernel = scope.spawn(|| kernel::build(context, host));
        let others = others();
        if others.is_err() {
            give_up();
        }
        let kernel = kernel.join().unwrap_or_else(|panic| resume_unwind(panic));
        others.and(kernel)
    })?;
    build_all(context, &[host])
}

/// Builds one image. What has not changed is not built again.
///
/// # Errors
/// If a package is missing or a step fails.
pub fn build(context: &Context, image: Image, kernels: &[Kernel]) -> Result<()> {
    packages::ensure(packages::BASIC)?;
    match image {
        Image::Probe => {
            let program = guest_program(context, "probe", "probe")?;
            assemble(context, image, None, &[("probe", fs::read(program)?)])
        }
        Image::Linux => {
            packages::ensure(packages::LINUX)?;
            let mut files = Vec::new();
            for &kernel in kernels {
                files.push((kernel.file(), fs::read(kernel::build(context, kernel)?)?));
            }
            let init = guest_program(context, "guest-init", "init")?;
            let busybox = fs::read(BUSYBOX).with_context(|| format!("cannot read {BUSYBOX}"))?;
            if !is_static_elf(&busybox) {
                bail!("{BUSYBOX} is not statically linked; install the package busybox-static");
            }
            files.push(("initramfs.cpio", initramfs(&fs::read(init)?, &busybox)));
            assemble(context, image, Some(kernels), &files)
        }
        Image::LinuxChecks => {
            build(context, Image::Linux, kernels)?;
            checks_image::assemble(context)
        }
    }
}

/// Runs the unit tests of the programs that run inside guests, or those whose name contains `filter`.
///
/// # Errors
/// If one fails.
pub fn test_guest_programs(context: &Context, filter: Option<&str>) -> Result<()> {
    run(guest_cargo(context, "test")
        .args(["--workspace", "--lib"])
        .args(filter))
}

/// Builds a program of the guests' own workspace and gives its path.
fn guest_program(context: &Context, package: &str, program: &str) -> Result<PathBuf> {
    step(&format!("building {program} ({package})"), || {
        run(guest_cargo(context, "build").args(["--quiet", "--release", "--package", package]))
    })?;
    Ok(guest_target(context).join("release").join(program))
}

/// Where the guest programs are built.
#[must_use]
pub fn guest_target(context: &Context) -> PathBuf {
    context.target().join("guests")
}

/// `cargo` in the guests' own workspace.
#[must_use]
pub fn guest_cargo(context: &Context, command: &str) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args([command, "--locked", "--target-dir"])
        .arg(guest_target(context));
    cargo.current_dir(context.root().join("images"));
    // Flags meant for host programs (coverage, sanitizers) cannot work without the standard library.
    cargo
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET");
    cargo
}

/// Writes the image's directory: the manifest from the source tree, with no kernel but `kernels` if they are given, and the files.
fn assemble(
    context: &Context,
    image: Image,
    kernels: Option<&[Kernel]>,
    files: &[(&str, Vec<u8>)],
) -> Result<()> {
    let directory = directory(context, image);
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let manifest = context
        .root()
        .join("images")
        .join(image.name())
        .join("image.toml");
    let manifest =
        fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let manifest = match kernels {
        Some(kernels) => with_kernels(&manifest, kernels)?,
        None => manifest,
    }
    .into_bytes();
    for (name, content) in files
        .iter()
        .map(|(name, content)| (*name, content))
        .chain([("image.toml", &manifest)])
    {
        replace(&directory.join(name), content)?;
    }
    // Left by a build with other kernels; the manifest does not name it.
    for other in Kernel::ALL.map(Kernel::file) {
        let path = directory.join(other);
        if files.iter().all(|(name, _)| *name != other) && path.exists() {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    println!("    image {}: {}", image.name(), directory.display());
    Ok(())
}

/// The manifest of an image that has only these kernels.
fn with_kernels(manifest: &str, kernels: &[Kernel]) -> Result<String> {
    let mut manifest: toml::Table = manifest.parse().context("image.toml")?;
    if !kernels.contains(&Kernel::Plain) {
        manifest.remove("kernel");
    }
    if !kernels.contains(&Kernel::Ring3) {
        manifest.remove("software_kvm");
    }
    Ok(toml::to_string(&manifest)?)
}

/// Writes a file so that who opens it meanwhile finds the old or the new one, whole.
///
/// # Errors
/// If it cannot be written.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, content)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The root file system of the Linux image.
fn initramfs(init: &[u8], busybox: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "etc", "mnt", "proc", "root", "sys"] {
        archive.directory(directory, 0o755);
    }
    archive.directory("tmp", 0o1777);
    // The kernel opens it for init before anything is mounted.
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, init);
    archive.file("bin/busybox", 0o755, busybox);
    for command in COMMANDS {
        archive.link(&format!("bin/{command}"), "busybox");
    }
    archive.finish()
}

/// Whether this is an ELF program that needs no dynamic linker: none of its program headers is PT_INTERP.
#[must_use]
pub fn is_static_elf(program: &[u8]) -> bool {
    program.starts_with(b"\x7fELF\x02") && has_interpreter(program) == Some(false)
}

/// `None` if the program headers do not lie in the file.
fn has_interpreter(program: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    let u16_at = |offset| {
        Some(usize::from(u16::from_le_bytes(
            *program.get(offset..)?.first_chunk()?,
        )))
    };
    let start = usize::try_from(u64::from_le_bytes(*program.get(32..)?.first_chunk()?)).ok()?;
    let (size, count) = (u16_at(54)?, u16_at(56)?);
    for index in 0..count {
        let kind = program.get(start.checked_add(index * size)?..)?.first_chunk()?;
        if u32::from_le_bytes(*kind) == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header with one program header of the kind given.
    fn elf(kind: u32) -> Vec<u8> {
        let mut program = vec![0; 64];
        program[..5].copy_from_slice(b"\x7fELF\x02");
        program[32..40].copy_from_slice(&64u64.to_le_bytes());
        program[54..56].copy_from_slice(&56u16.to_le_bytes());
        program[56..58].copy_from_slice(&1u16.to_le_bytes());
        program.extend_from_slice(&kind.to_le_bytes());
        program
    }

    #[test]
    fn programs_with_an_interpreter_are_not_static() {
        assert!(is_static_elf(&elf(1)));
        assert!(!is_static_elf(&elf(3)));
        assert!(!is_static_elf(&elf(1)[..64]));
        assert!(!is_static_elf(b"#!/bin/sh"));
    }

    #[test]
    fn a_manifest_names_the_kernels_that_were_built() {
        let both = "name = 'linux'\nkernel = 'vmlinux'\n[software_kvm]\nkernel = 'vmlinux-ring3'\n";
        let keys = |kernels: &[Kernel]| {
            let manifest = with_kernels(both, kernels).expect("a manifest");
            let table: toml::Table = manifest.parse().expect("TOML");
            table.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(keys(&[Kernel::Plain]), ["kernel", "name"]);
        assert_eq!(keys(&[Kernel::Ring3]), ["name", "software_kvm"]);
        assert_eq!(keys(&Kernel::ALL), ["kernel", "name", "software_kvm"]);
    }

    #[test]
    fn the_root_has_what_init_needs() {
        let archive = initramfs(b"INIT", b"BUSYBOX");
        for name in [
            "init\0",
            "dev/console\0",
            "bin/busybox\0",
            "bin/sh\0",
            "TRAILER!!!\0",
        ] {
            assert!(
                archive
                    .windows(name.len())
                    .any(|window| window == name.as_bytes()),
                "{name}"
            );
        }
    }
}
