//! The kernels of the Linux image, from Debian's source package, our configuration and our patches. Each is built once: what it
//! was built from is kept beside it, and compared.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, bail};

use crate::context::{Context, Progress, run_logged, run_long, step};

/// Where the Debian package `linux-source-6.12` puts its sources.
pub const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";
/// Lines that make prints when it builds all of either kernel, for the progress that is shown.
const LINES: usize = 1_535;
/// The directory in that archive.
const SOURCE_DIRECTORY: &str = "linux-source-6.12";

/// One of the two kernels (docs/linux-guest.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// For hosts with hardware virtualization
    Plain,
    /// For hosts without: the kernel itself runs at CPL 3
    Ring3,
}

impl Kernel {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Plain, Self::Ring3];

    /// The one that guests get on this host. The module that brings hardware virtualization shows in sysfs, also when it is built in.
    #[must_use]
    pub fn of_this_host() -> Self {
        let has = |module: &str| Path::new("/sys/module").join(module).exists();
        if has("kvm_intel") || has("kvm_amd") {
            Self::Plain
        } else {
            Self::Ring3
        }
    }

    /// What it is called in the image.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Plain => "vmlinux",
            Self::Ring3 => "vmlinux-ring3",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Ring3 => "ring3",
        }
    }
}

/// All that a kernel depends on.
struct Recipe {
    package_version: String,
    config: String,
    patches: Vec<(PathBuf, String)>,
}

impl Recipe {
    fn read(context: &Context, kernel: Kernel) -> Result<Self> {
        let directory = context.root().join("images/linux");
        let mut patches = Vec::new();
        let patch_directory = directory.join("patches");
        for entry in fs::read_dir(&patch_directory)
            .with_context(|| format!("cannot read {}", patch_directory.display()))?
        {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "patch") {
                let text = read(&path)?;
                patches.push((path, text));
            }
        }
        patches.sort();
        Ok(Self {
            package_version: package_version()?,
            config: read(&directory.join("config"))?
                + &read(&directory.join(format!("config.{}", kernel.name())))?,
            patches,
        })
    }

    /// What the patched source tree depends on.
    fn source_stamp(&self) -> String {
        let mut stamp = format!("{}\n", self.package_version);
        stamp.extend(self.patches.iter().map(|(_, text)| text.as_str()));
        stamp
    }

    fn stamp(&self) -> String {
        format!("{}\n{}", self.source_stamp(), self.config)
    }
}

/// Builds a kernel unless it is there, and gives the path of its stripped ELF.
///
/// # Errors
/// If a step fails; its log is named.
pub fn build(context: &Context, kernel: Kernel) -> Result<PathBuf> {
    let recipe = Recipe::read(context, kernel)?;
    let directory = context.target_dir("linux-build")?;
    let (name, stamp) = (kernel.name(), directory.join(format!("stamp-{}", kernel.name())));
    let kernel = directory.join(kernel.file());
    if kernel.is_file() && is_current(&stamp, &recipe.stamp()) {
        println!("    {name} kernel: up to date");
        return Ok(kernel);
    }
    let source = prepare_source(&recipe, &directory)?;
    let output = directory.join(name);
    configure(&recipe, &output, &source)?;
    fs::write(&stamp, "")?;
    step(
        &format!("building the {name} kernel (takes minutes, once)"),
        || {
            let jobs = thread::available_parallelism().map_or(1, usize::from);
            let mut make = make(&source, &output);
            let progress = Progress {
                name: &format!("{name} kernel"),
                lines: LINES,
            };
            run_long(
                make.arg(format!("-j{jobs}")).arg("vmlinux"),
                &output.join("build.log"),
                Some(progress),
            )?;
            let mut strip = Command::new("strip");
            run_logged(
                strip.arg("-o").arg(&kernel).arg(output.join("vmlinux")),
                &output.join("strip.log"),
            )
        },
    )?;
    fs::write(&stamp, recipe.stamp())?;
    Ok(kernel)
}

/// Unpacks and patches the sources, unless that has been done.
fn prepare_source(recipe: &Recipe, directory: &Path) -> Result<PathBuf> {
    let (source, stamp) = (directory.join(SOURCE_DIRECTORY), directory.join("source-stamp"));
    if source.is_dir() && is_current(&stamp, &recipe.source_stamp()) {
        return Ok(source);
    }
    step("unpacking and patching the kernel source", || {
        // No stamp until all is done: whatever interrupts this, the next run starts afresh.
        fs::write(&stamp, "")?;
        // Objects too: a file that is no longer patched is older than what was built from it, and make would keep that.
        let outputs = Kernel::ALL.map(|kernel| directory.join(kernel.name()));
        for old in outputs.iter().chain([&source]) {
            if old.exists() {
                fs::remove_dir_all(old).with_context(|| format!("cannot remove {}", old.display()))?;
            }
        }
        let mut tar = Command::new("tar");
        run_logged(
            tar.args(["-xJf", SOURCE, "-C"]).arg(directory),
            &directory.join("unpack.log"),
        )?;
        for (path, _) in &recipe.patches {
            let mut patch = Command::new("patch");
            patch
                .args(["--strip=1", "--batch", "--forward", "--fuzz=0", "--directory"])
                .arg(&source)
                .arg("--input")
                .arg(path);
            run_logged(&mut patch, &directory.join("patch.log"))?;
        }
        fs::write(&stamp, recipe.source_stamp())?;
        Ok(source)
    })
}

/// Writes the configuration and lets the kernel complete it. What we ask for must survive: it does not if the kernel no longer has
/// an option, or wants another one for it.
fn configure(recipe: &Recipe, output: &Path, source: &Path) -> Result<()> {
    step("configuring the kernel", || {
        fs::create_dir_all(output)?;
        let config = output.join(".config");
        fs::write(&config, &recipe.config)?;
        run_logged(
            make(source, output).arg("olddefconfig"),
            &output.join("config.log"),
        )?;
        let completed = read(&config)?;
        let lost: Vec<_> = recipe
            .config
            .lines()
            .filter(|line| line.contains('=') && !completed.lines().any(|other| other == *line))
            .collect();
        if !lost.is_empty() {
            bail!(
                "this kernel does not take these lines of its configuration in images/linux: {}",
                lost.join(", ")
            );
        }
        Ok(())
    })
}

fn make(source: &Path, output: &Path) -> Command {
    let mut command = Command::new("make");
    command
        .arg("-C")
        .arg(source)
        .arg(format!("O={}", output.display()));
    // The same recipe gives the same kernel wherever and whenever it is built, and whatever make or cargo runs this.
    command.args([
        "KBUILD_BUILD_USER=shoal",
        "KBUILD_BUILD_HOST=shoal",
        "KBUILD_BUILD_TIMESTAMP=2000-01-01",
    ]);
    command
        .env_remove("MAKEFLAGS")
        .env_remove("MFLAGS")
        .env_remove("MAKELEVEL")
        .env("LC_ALL", "C");
    command
}

/// The installed version of the source package; where dpkg does not know it, the archive's size and time.
fn package_version() -> Result<String> {
    let query = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Version}", SOURCE_DIRECTORY])
        .output();
    if let Some(output) = query.ok().filter(|output| output.status.success()) {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let metadata = fs::metadata(SOURCE).with_context(|| format!("cannot find {SOURCE}"))?;
    Ok(format!("{} bytes, {:?}", metadata.len(), metadata.modified()?))
}

fn is_current(stamp: &Path, wanted: &str) -> bool {
    fs::read_to_string(stamp).is_ok_and(|stamp| stamp == wanted)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
