//! Cgroups with a CPU quota for each node of a cluster, below the CPU controller that the host has, of version 1 or 2. Only root can make
//! them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// In which a quota is counted, in microseconds: what the kernel, systemd and container engines take unless told otherwise.
const PERIOD: f64 = 100_000.0;
/// How long processes that were ended may take to leave their group.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// Cgroups node1, node2, … with a CPU quota each, removed when dropped.
#[derive(Debug)]
pub struct Groups {
    root: PathBuf,
    version: Version,
}

impl Groups {
    /// Makes them, in a group of that name; the quotas are in CPUs.
    ///
    /// # Errors
    /// If there is no CPU controller, or it may not be used.
    pub fn make(name: &str, quotas: &[f64]) -> Result<Self> {
        let (mount, version) = cpu_controller()?;
        let groups = Self {
            root: mount.join(name),
            version,
        };
        groups.remove().context("left by an earlier run")?;
        if version == Version::Two {
            enable_cpu(&mount)?;
        }
        make_dir(&groups.root)?;
        if version == Version::Two {
            enable_cpu(&groups.root)?;
        }
        for (number, quota) in quotas.iter().enumerate() {
            let group = groups.root.join(format!("node{}", number + 1));
            make_dir(&group)?;
            let time = (quota * PERIOD).round();
            match version {
                Version::One => {
                    write(&group.join("cpu.cfs_period_us"), &PERIOD.to_string())?;
                    write(&group.join("cpu.cfs_quota_us"), &time.to_string())?;
                }
                Version::Two => write(&group.join("cpu.max"), &format!("{time} {PERIOD}"))?,
            }
        }
        Ok(groups)
    }

    /// Has them get their quotas also where others want the CPUs.
    ///
    /// # Errors
    /// If that may not be asked for.
    pub fn favour(&self) -> Result<()> {
        // The most that there is.
        let (file, weight) = match self.version {
            Version::One => ("cpu.shares", "262144"),
            Version::Two => ("cpu.weight", "10000"),
        };
        write(&self.root.join(file), weight)
    }

    /// What `shoal up --cgroup` is told.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.root
    }

    /// Removes them once nothing is in them any more.
    fn remove(&self) -> Result<()> {
        let children = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let mut groups: Vec<PathBuf> = children
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        groups.push(self.root.clone());
        let deadline = Instant::now() + PATIENCE;
        for group in groups {
            while let Err(error) = fs::remove_dir(&group) {
                if error.kind() == ErrorKind::NotFound {
                    break;
                }
                if Instant::now() >= deadline {
                    return Err(error)
                        .with_context(|| format!("cannot remove the cgroup {}", group.display()));
                }
                thread::sleep(POLL);
            }
        }
        Ok(())
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("{error:#}");
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Where the CPU controller is mounted.
fn cpu_controller() -> Result<(PathBuf, Version)> {
    let mounts = fs::read_to_string("/proc/mounts").context("/proc/mounts")?;
    let found = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (path, kind, options) = (PathBuf::from(words.next()?), words.next()?, words.next()?);
        match kind {
            "cgroup" if options.split(',').any(|option| option == "cpu") => Some((path, Version::One)),
            "cgroup2" => {
                let controllers = fs::read_to_string(path.join("cgroup.controllers")).ok()?;
                let has_cpu = controllers.split_ascii_whitespace().any(|name| name == "cpu");
                has_cpu.then_some((path, Version::Two))
            }
            _ => None,
        }
    });
    found.context("no cgroup hierarchy with the CPU controller is mounted")
}

fn enable_cpu(group: &Path) -> Result<()> {
    write(&group.join("cgroup.subtree_control"), "+cpu")
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("cannot make the cgroup {}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write '{text}' to {}", path.display()))
}
