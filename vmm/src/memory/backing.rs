//! What guest RAM is made of: anonymous memory, or a memory file that another VMM of this host can take over as it is.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use shoal_proto::vm::MemoryBacking as WireBacking;

use super::MemoryError;

/// Name of the memory file, as /proc shows it; whoever counts a VMM's memory looks for it.
const NAME: &CStr = c"shoal-guest-memory";
/// The file keeps its size for ever: a holder that could shrink it could end every process that maps it.
const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// What guest RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backing {
    /// Memory of this process alone.
    #[default]
    Anonymous,
    /// A memory file.
    Shared,
}

impl Backing {
    /// What is asked for, or for AUTO what is best here: shared memory only where it gets huge pages. Without them the
    /// first touch of each page costs seven times as much (0.56 s instead of 0.08 s for 900 MiB, measured).
    #[must_use]
    pub fn choose(wanted: WireBacking) -> Self {
        let read = |file: &str| std::fs::read_to_string(format!("{THP}/{file}")).ok();
        match wanted {
            WireBacking::Anonymous => Self::Anonymous,
            WireBacking::Shared => Self::Shared,
            WireBacking::Auto => {
                let all = read("shmem_enabled");
                let this_size = read("hugepages-2048kB/shmem_enabled");
                if shared_gets_huge_pages(all.as_deref(), this_size.as_deref()) {
                    Self::Shared
                } else {
                    Self::Anonymous
                }
            }
        }
    }
}

impl From<Backing> for WireBacking {
    fn from(backing: Backing) -> Self {
        match backing {
            Backing::Anonymous => Self::Anonymous,
            Backing::Shared => Self::Shared,
        }
    }
}

/// Whether memory files get huge pages where MADV_HUGEPAGE asks for them, by `shmem_enabled` of all sizes and of 2 MiB
/// (kernels that have it): Documentation/admin-guide/mm/transhuge.rst.
fn shared_gets_huge_pages(all: Option<&str>, this_size: Option<&str>) -> bool {
    let chosen = |text: &str| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned());
    let (all, this_size) = (all.and_then(chosen), this_size.and_then(chosen));
    let by_advice = |policy: &str| matches!(policy, "always" | "within_size" | "advise");
    match (all.as_deref(), this_size.as_deref()) {
        (Some("force"), _) => true,
        (Some("deny") | None, _) => false,
        (Some(all), None | Some("inherit")) => by_advice(all),
        (Some(_), Some(this_size)) => by_advice(this_size),
    }
}

/// A memory file of `bytes` bytes, sealed to that size.
pub(super) fn create(bytes: u64) -> Result<File, MemoryError> {
    let failed = |source| MemoryError::Create { bytes, source };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string that ends in NUL and lives across the call.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: memfd_create just gave this descriptor; nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes).map_err(failed)?;
    // SAFETY: F_ADD_SEALS takes an int and no memory.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(file)
}

/// Checks a file that came from another process: its size, that it keeps it, and that it can be written.
pub(super) fn check(file: &File, bytes: u64) -> Result<(), MemoryError> {
    let refused = |why: String| Err(MemoryError::Received { why });
    let metadata = match file.metadata() {
        Ok(metadata) if metadata.is_file() => metadata,
        Ok(_) => return refused("it is not a memory file".into()),
        Err(error) => return refused(error.to_string()),
    };
    if metadata.len() != bytes {
        return refused(format!("it has {} bytes and the VM has {bytes}", metadata.len()));
    }
    // SAFETY: F_GET_SEALS and F_GETFL take no argument.
    let (seals, mode) = unsafe {
        (
            libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS),
            libc::fcntl(file.as_raw_fd(), libc::F_GETFL),
        )
    };
    // SAFETY: statfs is plain data, for which zeros are valid, and lives across the call that fills it.
    let filesystem = unsafe {
        let mut filesystem: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(file.as_raw_fd(), &raw mut filesystem) == 0).then_some(filesystem.f_type)
    };
    if seals < 0 || filesystem != Some(libc::TMPFS_MAGIC) {
        return refused("it is not a memory file (memfd_create)".into());
    }
    if seals & libc::F_SEAL_SHRINK == 0 {
        return refused("it is not sealed against shrinking".into());
    }
    if seals & (libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) != 0 || mode & libc::O_ACCMODE != libc::O_RDWR
    {
        return refused("it cannot be written".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_shared_where_memory_files_get_huge_pages() {
        let never = "always within_size advise [never] deny force\n";
        let advise = "always within_size [advise] never deny force\n";
        let inherit = "always [inherit] within_size advise never\n";
        for (all, this_size, expected) in [
            (Some(never), None, false),
            (Some(advise), None, true),
            (Some(advise), Some(inherit), true),
            (Some(never), Some(inherit), false),
            (
                Some(never),
                Some("always inherit within_size [advise] never"),
                true,
            ),
            (
                Some(advise),
                Some("always inherit within_size advise [never]"),
                false,
            ),
            (Some("always never [deny]"), Some("[always] inherit"), false),
            (Some("always never deny [force]"), Some("[never]"), true),
            (None, None, false),
            (Some("garbage"), None, false),
        ] {
            assert_eq!(
                shared_gets_huge_pages(all, this_size),
                expected,
                "{all:?} {this_size:?}"
            );
        }
    }

    #[test]
    fn a_received_file_is_checked() {
        const BYTES: u64 = 4 << 20;
        let good = create(BYTES).expect("memfd");
        assert!(check(&good, BYTES).is_ok());
        let refusal = |file: &File, bytes| check(file, bytes).expect_err("refused").to_string();
        assert!(refusal(&good, BYTES + 4096).contains("bytes"));
        let read_only = File::open(format!("/proc/self/fd/{}", good.as_raw_fd())).expect("reopen");
        assert!(refusal(&read_only, BYTES).contains("written"));
        // Where temporary files lie in memory, too, they are not sealed.
        let temporary = tempfile::tempfile().expect("file");
        temporary.set_len(BYTES).expect("size");
        let refused = refusal(&temporary, BYTES);
        assert!(
            refused.contains("memory file") || refused.contains("sealed"),
            "{refused}"
        );
        let elsewhere = File::open("/proc/version").expect("there");
        assert!(refusal(&elsewhere, 0).contains("memory file"));
        assert!(refusal(&File::open("/dev/null").expect("there"), 0).contains("memory file"));
        // SAFETY: as in `create`.
        let unsealed = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            File::from_raw_fd(libc::memfd_create(NAME.as_ptr(), flags))
        };
        unsealed.set_len(BYTES).expect("size");
        assert!(refusal(&unsealed, BYTES).contains("sealed"));
        assert!(good.set_len(BYTES / 2).is_err() && good.set_len(BYTES * 2).is_err());
    }
}
