//! The Debian packages that building and testing need.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::context::{run, step};

const APT_GET: &str = "/usr/bin/apt-get";

/// A package, and a file that tells whether it is there (also where another package brings it).
#[derive(Debug, Clone, Copy)]
pub struct Package {
    name: &'static str,
    file: &'static str,
}

/// What the probe and the Rust crates need beyond Rust itself.
pub const BASIC: &[Package] = &[
    Package {
        name: "gcc",
        file: "/usr/bin/gcc",
    },
    Package {
        name: "binutils",
        file: "/usr/bin/strip",
    },
];

/// What the Linux image needs.
pub const LINUX: &[Package] = &[
    Package {
        name: "linux-source-6.12",
        file: crate::kernel::SOURCE,
    },
    Package {
        name: "make",
        file: "/usr/bin/make",
    },
    Package {
        name: "flex",
        file: "/usr/bin/flex",
    },
    Package {
        name: "bison",
        file: "/usr/bin/bison",
    },
    Package {
        name: "bc",
        file: "/usr/bin/bc",
    },
    Package {
        name: "patch",
        file: "/usr/bin/patch",
    },
    Package {
        name: "xz-utils",
        file: "/usr/bin/xz",
    },
    Package {
        name: "libc6-dev",
        file: "/usr/include/stdio.h",
    },
    Package {
        name: "libelf-dev",
        file: "/usr/include/libelf.h",
    },
    Package {
        name: "libssl-dev",
        file: "/usr/include/openssl/ssl.h",
    },
    Package {
        name: "busybox-static",
        file: crate::images::BUSYBOX,
    },
];

/// What the end-to-end tests and the demo need.
pub const TESTS: &[Package] = &[
    Package {
        name: "iproute2",
        file: "/sbin/ip",
    },
    Package {
        name: ETCD,
        file: "/usr/bin/etcd",
    },
];

const ETCD: &str = "etcd-server";
/// The service that comes with it; tests start their own.
const ETCD_SERVICE: &str = "etcd.service";

/// Installs everything that any command needs.
///
/// # Errors
/// As [`ensure`].
pub fn ensure_all() -> Result<()> {
    ensure(&[BASIC, LINUX, TESTS].concat())
}

/// Installs what is missing if we are root, else says what to run.
///
/// # Errors
/// If something is missing and cannot be installed.
pub fn ensure(packages: &[Package]) -> Result<()> {
    let missing: Vec<_> = packages
        .iter()
        .filter(|package| !Path::new(package.file).exists())
        .map(|package| package.name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !Path::new(APT_GET).exists() {
        bail!("install what Debian calls {}, then try again", missing.join(" "));
    }
    if !is_root()? {
        bail!(
            "packages are missing. Run this, then try again:\n  sudo apt-get install --yes {}",
            missing.join(" ")
        );
    }
    step(&format!("installing {}", missing.join(" ")), || {
        run(apt_get().args(["update", "--quiet"]))?;
        run(apt_get()
            .args(["install", "--yes", "--quiet", "--no-install-recommends"])
            .args(&missing))
    })?;
    if missing.contains(&ETCD) {
        // Where there is no systemd, there is no service to end.
        let _ = Command::new("systemctl")
            .args(["disable", "--now", ETCD_SERVICE])
            .output();
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new(APT_GET);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Whether this process runs as root: it owns its own entry in /proc.
fn is_root() -> Result<bool> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata("/proc/self")?.uid() == 0)
}
