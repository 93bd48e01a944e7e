//! What the machine is made of: Debian's QEMU and kernel, downloaded and unpacked under the target directory. Nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::context::{Context, run_logged, step};

/// The Debian release that all of it comes from, whatever the host's.
const RELEASE: &str = "bookworm";
/// QEMU 10. The release's own 7.2 does not intercept XSETBV, which takes AVX from guests.
const QEMU_RELEASE: &str = "bookworm-backports";
const QEMU: &str = "qemu-system-x86";
/// Depends on the package with the current kernel.
const KERNEL: &str = "linux-image-amd64";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Kernel modules that the machine loads, in this order, by their place in the package; and their options.
pub const MODULES: &[(&str, &str)] = &[
    ("drivers/virtio/virtio", ""),
    ("drivers/virtio/virtio_ring", ""),
    ("drivers/virtio/virtio_pci_modern_dev", ""),
    ("drivers/virtio/virtio_pci_legacy_dev", ""),
    ("drivers/virtio/virtio_pci", ""),
    ("fs/netfs/netfs", ""),
    ("fs/fscache/fscache", ""),
    ("net/9p/9pnet", ""),
    ("net/9p/9pnet_virtio", ""),
    ("fs/9p/9p", ""),
    ("fs/overlayfs/overlay", ""),
    ("drivers/crypto/ccp/ccp", ""),
    ("virt/lib/irqbypass", ""),
    ("arch/x86/kvm/kvm", ""),
    ("arch/x86/kvm/kvm-amd", "npt=1"),
];

/// Where it is unpacked.
#[derive(Debug)]
pub struct Outfit {
    root: PathBuf,
    kernel_release: String,
}

impl Outfit {
    /// Downloads and unpacks it, unless that has been done.
    ///
    /// # Errors
    /// If this is not Debian, or a step fails; its log is named.
    pub fn fetch(context: &Context) -> Result<Self> {
        let directory = context.target_dir("hardware-kvm")?;
        let (root, stamp) = (directory.join("root"), directory.join("stamp"));
        let recipe = format!("{QEMU} of {QEMU_RELEASE}, {KERNEL} of {RELEASE}, {MODULES:?}");
        if fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == recipe) {
            return Self::at(root);
        }
        let apt = Apt::new(&directory)?;
        step("downloading QEMU and a kernel", || apt.download())?;
        step("unpacking them", || {
            // No stamp until all is done: whatever interrupts this, the next run starts afresh.
            if root.exists() {
                fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
            }
            fs::create_dir_all(&root)?;
            for package in apt.packages()? {
                unpack(&package, &root, &directory.join("unpack.log"))?;
            }
            fs::write(&stamp, recipe)?;
            Self::at(root)
        })
    }

    fn at(root: PathBuf) -> Result<Self> {
        let boot = root.join("boot");
        let names = fs::read_dir(&boot).with_context(|| format!("cannot read {}", boot.display()))?;
        let kernel_release = names
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned()))
            .with_context(|| format!("no kernel in {}", boot.display()))?;
        Ok(Self { root, kernel_release })
    }

    /// The kernel, a bzImage.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.kernel_release))
    }

    /// The file of a module of [`MODULES`].
    #[must_use]
    pub fn module(&self, path: &str) -> PathBuf {
        let file = format!("lib/modules/{}/kernel/{path}.ko", self.kernel_release);
        self.root.join(file)
    }

    /// QEMU, with the libraries that came with it, the C library included. `words` come before it.
    #[must_use]
    pub fn qemu(&self, words: &[&str]) -> Command {
        let at = |path: &str| self.root.join(path).into_os_string();
        let mut libraries = at("lib/x86_64-linux-gnu");
        libraries.push(":");
        libraries.push(at("usr/lib/x86_64-linux-gnu"));
        let loader = at("lib64/ld-linux-x86-64.so.2");
        let mut all = words.iter().map(Into::into).chain([loader]);
        let mut command = Command::new(all.next().unwrap_or_default());
        command.args(all).arg("--library-path").arg(libraries);
        command.arg(at("usr/bin/qemu-system-x86_64"));
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(at(firmware));
        }
        command
    }
}

/// apt with state of its own: it needs no rights, and neither sees nor changes what is installed.
struct Apt {
    directory: PathBuf,
    log: PathBuf,
}

impl Apt {
    fn new(hardware_kvm: &Path) -> Result<Self> {
        let elsewhere = "On other systems run the same command in a container with Debian 12; it needs neither root nor /dev/kvm";
        for file in ["/usr/bin/apt-get", "/usr/bin/dpkg-deb", KEYRING] {
            ensure!(
                Path::new(file).exists(),
                "QEMU and a kernel come from Debian's archive, and {file} is missing. {elsewhere}"
            );
        }
        let Some(mirror) = mirror()? else {
            bail!(
                "QEMU and a kernel come from Debian's archive, and apt's sources on this machine do not name it. {elsewhere}"
            );
        };
        let directory = hardware_kvm.join("apt");
        // Whatever was there may be half of something.
        if directory.exists() {
            fs::remove_dir_all(&directory)
                .with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        for sub in ["lists/partial", "archives/partial", "none"] {
            let path = directory.join(sub);
            fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let sources: String = [RELEASE, QEMU_RELEASE]
            .map(|release| format!("deb [signed-by={KEYRING}] {mirror} {release} main\n"))
            .concat();
        let at = |name: &str| directory.join(name).display().to_string();
        let configuration = format!(
            r#"Dir::State "{directory}"; Dir::State::lists "{lists}"; Dir::State::status "{status}"; Dir::Cache "{directory}";
Dir::Cache::archives "{archives}"; Dir::Etc::sourcelist "{sources}"; Dir::Etc::sourceparts "{none}"; Dir::Etc::preferencesparts "{none}";
Debug::NoLocking "true"; APT::Sandbox::User "root"; APT::Architecture "amd64"; APT::Architectures "amd64";
APT::Default-Release ""; APT::Install-Recommends "false"; Acquire::Languages "none"; Acquire::Retries "3";
"#,
            directory = directory.display(),
            lists = at("lists"),
            status = at("status"),
            archives = at("archives"),
            sources = at("sources.list"),
            none = at("none"),
        );
        for (name, content) in [
            ("sources.list", sources.as_str()),
            ("status", ""),
            ("apt.conf", &configuration),
        ] {
            fs::write(directory.join(name), content)?;
        }
        let log = hardware_kvm.join("apt.log");
        Ok(Self { directory, log })
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir(self.archives())
            .env("APT_CONFIG", self.directory.join("apt.conf"))
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C");
        command
    }

    fn archives(&self) -> PathBuf {
        self.directory.join("archives")
    }

    fn download(&self) -> Result<()> {
        let run = |args: &[&str]| run_logged(&mut self.command("apt-get", args), &self.log);
        run(&["update"])?;
        // With nothing installed, as far as this apt knows, everything that it needs comes along.
        run(&[
            "install",
            "--download-only",
            "--yes",
            "--target-release",
            QEMU_RELEASE,
            QEMU,
        ])?;
        // Its dependencies are of no use here.
        run(&["download", &self.current_kernel()?])
    }

    fn current_kernel(&self) -> Result<String> {
        let output = self
            .command("apt-cache", &["depends", KERNEL])
            .stderr(Stdio::inherit())
            .output()?;
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .find_map(|line| Some(line.trim().strip_prefix("Depends: ")?.to_owned()))
            .with_context(|| format!("apt does not know which kernel {KERNEL} is"))
    }

    fn packages(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.archives())?.collect::<Result<Vec<_>, _>>()?;
        let paths = entries.into_iter().map(|entry| entry.path());
        Ok(paths
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .collect())
    }
}

/// The archive that this machine's apt uses for Debian itself, whichever mirror that is.
fn mirror() -> Result<Option<String>> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(RELEASE)"])
        .args(["Created-By: Packages", "Component: main"])
        .output()
        .context("apt-get")?;
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = debian_codename(&release);
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.rsplit_once(' '))
        .find_map(|(uri, release)| (Some(release) == codename).then(|| uri.to_owned())))
}

/// From os-release(5); `None` if it is not Debian's.
fn debian_codename(os_release: &str) -> Option<&str> {
    let value = |key: &str| {
        let line = os_release
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches('"'))
    };
    value("VERSION_CODENAME").filter(|_| value("ID") == Some("debian"))
}

/// Unpacks a package; of a kernel's only the kernel and [`MODULES`], as all of them are 400 MB.
fn unpack(package: &Path, root: &Path, log: &Path) -> Result<()> {
    let is_kernel = package
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("linux-image"));
    if !is_kernel {
        return run_logged(
            Command::new("dpkg-deb").arg("--extract").arg(package).arg(root),
            log,
        );
    }
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb")?;
    let stdout = archive.stdout.take().context("the output of dpkg-deb")?;
    let modules = MODULES
        .iter()
        .map(|(path, _)| format!("./lib/modules/*/kernel/{path}.ko"));
    let status = Command::new("tar")
        .args(["--extract", "--wildcards", "--directory"])
        .arg(root)
        .arg("./boot/vmlinuz-*")
        .args(modules)
        .stdin(stdout)
        .status()
        .context("tar")?;
    ensure!(
        archive.wait()?.success() && status.success(),
        "cannot unpack {}",
        package.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_has_a_codename_of_debian() {
        let debian = "NAME=\"Debian GNU/Linux\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(debian_codename(debian), Some("bookworm"));
        assert_eq!(
            debian_codename("VERSION_CODENAME=noble\nID=ubuntu\nID_LIKE=debian\n"),
            None
        );
        assert_eq!(debian_codename(""), None);
    }
}
