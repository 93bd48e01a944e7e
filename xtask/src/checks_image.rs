//! The image `linux-checks`: the Linux image, and one more program in its root.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};

use crate::context::{Context, run, step};
use crate::cpio::Archive;
use crate::images::{self, Image};

/// A kernel unpacks one archive after the other.
const INITRAMFS: &str = "initramfs.cpio";
const MANIFEST: &str = "image.toml";
const NAME: &str = "name = \"linux\"";

/// Makes it of the Linux image, which must have been built.
///
/// # Errors
/// If a step fails.
pub fn assemble(context: &Context) -> Result<()> {
    let (from, to) = (
        images::directory(context, Image::Linux),
        images::directory(context, Image::LinuxChecks),
    );
    fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
    let program = program(context)?;
    for entry in fs::read_dir(&from).with_context(|| format!("cannot read {}", from.display()))? {
        let path = entry?.path();
        let Some(name) = path.file_name().filter(|_| path.is_file()) else {
            continue;
        };
        let mut content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if name == INITRAMFS {
            let mut more = Archive::default();
            more.file("bin/checks", 0o755, &program);
            content.extend(more.finish());
        } else if name == MANIFEST {
            let manifest = String::from_utf8(content)?;
            ensure!(manifest.contains(NAME), "{} has no line '{NAME}'", path.display());
            content = manifest.replace(NAME, "name = \"linux-checks\"").into_bytes();
        }
        images::replace(&to.join(name), &content)?;
    }
    println!("    image linux-checks: {}", to.display());
    Ok(())
}

/// Built where its own cargo configuration is read: it has the standard library and is linked statically.
fn program(context: &Context) -> Result<Vec<u8>> {
    step("building checks (guest-checks)", || {
        let mut cargo = images::guest_cargo(context, "build");
        cargo.current_dir(context.root().join("images/linux/checks"));
        run(cargo.args(["--quiet", "--release"]))
    })?;
    let path: PathBuf = images::guest_target(context).join("release/checks");
    let program = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    if !images::is_static_elf(&program) {
        bail!(
            "{} is not statically linked; install the package libc6-dev",
            path.display()
        );
    }
    Ok(program)
}
