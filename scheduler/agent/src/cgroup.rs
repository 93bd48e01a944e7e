//! The control group that an administrator made for a node's VMs: VMMs are put into it, and its CPU quota is what VMs get at most.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Why a control group cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// It is not there, or is no control group.
    #[error(
        "cgroup: {path}: {source}; name the directory of a cgroup that exists, such as /sys/fs/cgroup/vms.slice"
    )]
    Open {
        /// What was looked for.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its quota makes no sense.
    #[error("cgroup: {path}: '{text}' is no CPU quota")]
    Quota {
        /// The file that holds it.
        path: PathBuf,
        /// The start of what it holds.
        text: String,
    },
}

/// The directory of a control group, of version 1 or 2.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// One that exists. Its quota can be read.
    pub(crate) fn open(path: &Path) -> Result<Self, CgroupError> {
        let error = |source| CgroupError::Open {
            path: path.to_owned(),
            source,
        };
        let path = path.canonicalize().map_err(error)?;
        fs::metadata(path.join("cgroup.procs")).map_err(error)?;
        let group = Self { path };
        group.cpu_quota()?;
        Ok(group)
    }

    /// Puts a process into it, with all its threads. What the process starts will be in it, too.
    pub(crate) fn add(&self, pid: u32) -> io::Result<()> {
        let path = self.path.join("cgroup.procs");
        let file = OpenOptions::new().write(true).open(&path);
        file.and_then(|mut file| file.write_all(pid.to_string().as_bytes()))
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    }

    /// CPUs that all in it get at most together: the least of its own quota and those of the groups around it. None: no
    /// limit.
    pub(crate) fn cpu_quota(&self) -> Result<Option<f64>, CgroupError> {
        let mut least: Option<f64> = None;
        let groups = self.path.ancestors();
        for group in groups.take_while(|group| group.join("cgroup.procs").exists()) {
            if let Some(quota) = own_quota(group)? {
                least = Some(least.map_or(quota, |least| least.min(quota)));
            }
        }
        Ok(least)
    }
}

/// The quota of one group, by `cpu.max` or, in version 1, `cpu.cfs_quota_us`. A group has neither at the root, or without the CPU
/// controller.
fn own_quota(group: &Path) -> Result<Option<f64>, CgroupError> {
    let (both, alone) = (group.join("cpu.max"), group.join("cpu.cfs_quota_us"));
    if let Some(text) = read(&both)? {
        return text
            .split_once(' ')
            .and_then(|(quota, period)| cpus(quota, period))
            .ok_or(CgroupError::Quota { path: both, text });
    }
    match (read(&alone)?, read(&group.join("cpu.cfs_period_us"))?) {
        (Some(quota), Some(period)) => cpus(&quota, &period).ok_or(CgroupError::Quota {
            path: alone,
            text: quota,
        }),
        _ => Ok(None),
    }
}

/// The start of a file without the line's end; none if there is no such file.
fn read(path: &Path) -> Result<Option<String>, CgroupError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end().chars().take(60).collect())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CgroupError::Open {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Microseconds of CPU time in a period, as CPUs; the inner none is no limit, the outer one what is not understood.
fn cpus(quota: &str, period: &str) -> Option<Option<f64>> {
    let period: u32 = period.parse().ok().filter(|&period| period > 0)?;
    if quota == "max" || quota == "-1" {
        return Some(None);
    }
    let quota: u64 = quota.parse().ok()?;
    #[expect(clippy::cast_precision_loss, reason = "a share of time, not a count")]
    let cpus = quota as f64 / f64::from(period);
    Some(Some(cpus))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().expect("a directory")).expect("made");
            fs::write(path, text).expect("written");
        }
        directory
    }

    fn quota(files: &[(&str, &str)]) -> Result<Option<f64>, CgroupError> {
        let directory = group(files);
        Cgroup::open(directory.path())?.cpu_quota()
    }

    #[test]
    fn the_quota_of_either_version_is_read() {
        let procs = ("cgroup.procs", "");
        let v1 = |quota: &'static str| {
            [
                procs,
                ("cpu.cfs_quota_us", quota),
                ("cpu.cfs_period_us", "100000\n"),
            ]
        };
        for (files, expected) in [
            (&[procs, ("cpu.max", "50000 100000\n")][..], Some(0.5)),
            (&[procs, ("cpu.max", "max 100000\n")], None),
            (&[procs], None),
            (&v1("150000\n"), Some(1.5)),
            (&v1("-1\n"), None),
        ] {
            assert_eq!(quota(files).expect("read"), expected, "{files:?}");
        }
    }

    #[test]
    fn a_tighter_group_around_it_counts() {
        let directory = group(&[
            ("cgroup.procs", ""),
            ("cpu.max", "80000 100000\n"),
            ("inner/cgroup.procs", ""),
            ("inner/cpu.max", "200000 100000\n"),
        ]);
        let inner = Cgroup::open(&directory.path().join("inner")).expect("a group");
        assert_eq!(inner.cpu_quota().expect("read"), Some(0.8));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |files: &[(&str, &str)]| quota(files).expect_err("refused").to_string();
        assert!(refused(&[]).contains("name the directory of a cgroup that exists"));
        for bad in ["", "50000", "50000 0", "-5 100000", "x 100000", "1 99999999999"] {
            let words = refused(&[("cgroup.procs", ""), ("cpu.max", bad)]);
            assert!(
                words.contains("/cpu.max") && words.ends_with(&format!("'{bad}' is no CPU quota")),
                "{words}"
            );
        }
        let gone = Cgroup::open(Path::new("no/such/group")).expect_err("refused");
        assert!(gone.to_string().starts_with("cgroup: no/such/group: "), "{gone}");
    }

    #[test]
    fn a_process_is_put_into_it() {
        let directory = group(&[("cgroup.procs", "")]);
        let own = Cgroup::open(directory.path()).expect("a group");
        own.add(77).expect("written");
        let procs = directory.path().join("cgroup.procs");
        assert_eq!(fs::read_to_string(&procs).expect("read"), "77");
        fs::remove_file(procs).expect("removed");
        let error = own.add(77).expect_err("gone").to_string();
        assert!(error.contains("cgroup.procs: "), "{error}");
    }
}
