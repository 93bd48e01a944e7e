//! The directory of one VMM: its socket, pid, record and log. It is all a new agent needs to adopt the VMM.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shoal_proto::{MigrationId, VmName};

use crate::key::VmKey;
use crate::process::ProcessIdentity;

const SOCKET: &str = "vmm.sock";
const PID: &str = "pid";
const RECORD: &str = "spec.json";
const LOG: &str = "vmm.log";
const RAN: &str = "ran";
/// A VMM's log that is longer is cut down to its end, of so many bytes.
const MOST_LOG: u64 = 4 << 20;
const LOG_KEPT: u64 = 256 << 10;
/// How much of the end of a VMM's log is looked at, in bytes.
const LOG_TAIL: u64 = 2048;
/// How much of one line of it is repeated in an error, in characters.
const LOG_LINE: usize = 400;

/// What `spec.json` holds: enough to say which VM it was when the VMM can no longer be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    pub(crate) name: VmName,
    pub(crate) cpus: u32,
    pub(crate) memory_bytes: u64,
    /// The migration it was prepared for; `None` if it was booted here.
    pub(crate) incoming_migration: Option<MigrationId>,
}

impl VmRecord {
    /// For a VM whose record is lost.
    pub(crate) fn unknown() -> Self {
        let name = "unknown".parse().expect("a DNS label");
        Self {
            name,
            cpus: 0,
            memory_bytes: 0,
            incoming_migration: None,
        }
    }
}

/// `STATE/vms/VM_ID-EPOCH`, held open.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    path: PathBuf,
    handle: File,
}

impl RuntimeDir {
    pub(crate) fn create(vms: &Path, key: VmKey) -> io::Result<Self> {
        let path = vms.join(key.to_string());
        fs::create_dir(&path)?;
        Self::open(path)
    }

    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        let handle = File::open(&path)?;
        Ok(Self { path, handle })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The socket through this process's descriptor of the directory: a Unix socket address holds only 108 bytes
    /// (unix(7)), and state directories can be longer than that.
    pub(crate) fn socket_address(&self) -> String {
        format!("/proc/self/fd/{}/{SOCKET}", self.handle.as_raw_fd())
    }

    /// Binds the VMM's socket. Connections queue from now on, whether or not the VMM has started.
    pub(crate) fn bind_socket(&self) -> io::Result<UnixListener> {
        UnixListener::bind(self.socket_address())
    }

    pub(crate) fn create_log(&self) -> io::Result<File> {
        File::options()
            .create(true)
            .append(true)
            .open(self.path.join(LOG))
    }

    pub(crate) fn write_record(&self, record: &VmRecord) -> io::Result<()> {
        write_whole(&self.path.join(RECORD), &serde_json::to_vec_pretty(record)?)
    }

    pub(crate) fn read_record(&self) -> io::Result<VmRecord> {
        Ok(serde_json::from_slice(&fs::read(self.path.join(RECORD))?)?)
    }

    pub(crate) fn write_identity(&self, identity: ProcessIdentity) -> io::Result<()> {
        write_whole(&self.path.join(PID), format!("{identity}\n").as_bytes())
    }

    /// The VMM's process. `None` if the agent, or the host, died before it was written.
    pub(crate) fn read_identity(&self) -> io::Result<Option<ProcessIdentity>> {
        match fs::read_to_string(self.path.join(PID)) {
            Ok(text) => Ok(text.parse().ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the vCPUs have ever run here: the VMM writes the file right before they first do.
    pub(crate) fn has_run(&self) -> bool {
        // Any doubt counts as "it ran": that is the side on which nothing starts twice.
        !matches!(fs::symlink_metadata(self.path.join(RAN)), Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// The last line of the VMM's log, for an error message.
    pub(crate) fn last_log_line(&self) -> Option<String> {
        let mut log = File::open(self.path.join(LOG)).ok()?;
        let size = log.metadata().ok()?.len();
        log.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL))).ok()?;
        let mut tail = Vec::new();
        log.take(LOG_TAIL).read_to_end(&mut tail).ok()?;
        let tail = String::from_utf8_lossy(&tail);
        let line = tail.lines().rev().find(|line| !line.trim().is_empty())?;
        Some(
            line.trim()
                .chars()
                .filter(|c| !c.is_control())
                .take(LOG_LINE)
                .collect(),
        )
    }

    /// Drops all but the end of the VMM's log if it is long. The VMM goes on to append to it.
    pub(crate) fn shorten_log(&self) -> io::Result<()> {
        let path = self.path.join(LOG);
        let mut log = File::options().read(true).write(true).open(&path)?;
        let size = log.metadata()?.len();
        if size <= MOST_LOG {
            return Ok(());
        }
        log.seek(SeekFrom::Start(size - LOG_KEPT))?;
        let mut end = Vec::new();
        (&log).take(LOG_KEPT).read_to_end(&mut end)?;
        log.set_len(0)?;
        File::options().append(true).open(&path)?.write_all(&end)
    }

    /// Removes everything; nothing is an error if it is gone already.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// A reader sees all of the new content or none.
fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, content)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_proto::{Epoch, VmId};
    use std::os::unix::net::UnixStream;

    fn directory(vms: &Path) -> RuntimeDir {
        RuntimeDir::create(
            vms,
            VmKey {
                id: VmId::new(),
                epoch: Epoch(1),
            },
        )
        .expect("created")
    }

    #[test]
    fn sockets_work_however_long_the_path() {
        let root = tempfile::tempdir().expect("a directory");
        let long = root.path().join("x".repeat(120));
        fs::create_dir(&long).expect("created");
        let dir = directory(&long);
        let _listener = dir.bind_socket().expect("bound");
        UnixStream::connect(dir.socket_address()).expect("connected");
        dir.remove().expect("removed");
        dir.remove().expect("nothing to do");
        assert!(!dir.path().exists());
    }

    #[test]
    fn record_and_pid_survive() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = directory(root.path());
        assert!(dir.read_record().is_err());
        assert_eq!(dir.read_identity().expect("readable"), None);
        let record = VmRecord {
            name: "web".parse().expect("a name"),
            cpus: 2,
            memory_bytes: 1 << 28,
            incoming_migration: Some(MigrationId::new()),
        };
        let identity = ProcessIdentity {
            pid: 42,
            start_ticks: 7,
            boot_id: Some(uuid::Uuid::from_u128(9)),
        };
        dir.write_record(&record).expect("written");
        dir.write_identity(identity).expect("written");
        let again = RuntimeDir::open(dir.path().to_owned()).expect("opened");
        assert_eq!(again.read_record().expect("readable"), record);
        assert_eq!(again.read_identity().expect("readable"), Some(identity));
        fs::write(dir.path().join(PID), "").expect("written");
        assert_eq!(
            again.read_identity().expect("readable"),
            None,
            "the host went down in the middle"
        );
        assert!(!again.has_run());
        fs::write(dir.path().join(RAN), b"").expect("written");
        assert!(again.has_run());
    }

    #[test]
    fn a_long_log_is_cut_down_to_its_end_and_goes_on() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = directory(root.path());
        assert!(dir.shorten_log().is_err(), "there is none");
        let mut log = dir.create_log().expect("created");
        let line = format!("{}\n", "y".repeat(1023));
        let size = || fs::metadata(dir.path().join(LOG)).expect("there").len();
        for _ in 0..4096 {
            log.write_all(line.as_bytes()).expect("written");
        }
        dir.shorten_log().expect("nothing to do");
        assert_eq!(size(), MOST_LOG);
        log.write_all(b"more\n").expect("written");
        dir.shorten_log().expect("cut");
        assert_eq!(size(), LOG_KEPT);
        log.write_all(b"last\n").expect("written");
        assert_eq!(size(), LOG_KEPT + 5);
        assert_eq!(dir.last_log_line().as_deref(), Some("last"));
    }

    #[test]
    fn the_last_log_line_is_bounded() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = directory(root.path());
        assert_eq!(dir.last_log_line(), None);
        fs::write(dir.path().join(LOG), format!("first\n{}\n\n", "y".repeat(10_000))).expect("written");
        assert_eq!(dir.last_log_line().expect("a line").len(), LOG_LINE);
        fs::write(dir.path().join(LOG), "a\nno /dev/kvm\n").expect("written");
        assert_eq!(dir.last_log_line().as_deref(), Some("no /dev/kvm"));
    }
}
