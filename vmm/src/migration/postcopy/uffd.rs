//! userfaultfd in missing mode: who touches a page that is not there waits until it is placed
//! (Documentation/admin-guide/mm/userfaultfd.rst).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

const PAGE: usize = 4096;
const DEVICE: &str = "/dev/userfaultfd";
const UFFD_API: u64 = 0xaa;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const FAULT_FLAG_WRITE: u64 = 1;
/// Copy and zero page: what missing mode must offer.
const NEEDED_IOCTLS: u64 = 1 << 3 | 1 << 4;

#[repr(C)]
#[derive(Debug, Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Debug)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
#[derive(Debug)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

/// `struct uffd_msg`, as far as missing mode uses it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct UffdMsg {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

const _: () = assert!(size_of::<UffdMsg>() == 32);

mod requests {
    #![allow(missing_docs)] // the macro makes undocumented public functions
    use super::{UffdioApi, UffdioCopy, UffdioRange, UffdioRegister, UffdioZeropage};
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};
    const UFFDIO: libc::c_uint = 0xaa;
    ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
    ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, UffdioApi);
    ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, UffdioRegister);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, UffdioRange);
    ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, UffdioRange);
    ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, UffdioCopy);
    ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, UffdioZeropage);
}

/// Why userfaultfd cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Not allowed, or not in this kernel.
    #[error(
        "userfaultfd: {0}; post-copy needs CAP_SYS_PTRACE, access to /dev/userfaultfd, or vm.unprivileged_userfaultfd=1"
    )]
    Open(io::Error),
    /// The kernel's is too old.
    #[error("userfaultfd: this kernel lacks what post-copy needs: {0}")]
    Lacking(io::Error),
    /// A call failed.
    #[error("{call} of {len} bytes of guest memory: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// On how much.
        len: usize,
        /// Why.
        source: io::Error,
    },
}

/// A range of this process's addresses, whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostRange {
    /// First address.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

impl HostRange {
    fn abi(self) -> UffdioRange {
        UffdioRange {
            start: self.start as u64,
            len: self.len as u64,
        }
    }
}

/// Somebody waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The address, as this process sees it.
    pub address: usize,
    /// It is to be written.
    pub write: bool,
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Uffd {
    /// Opens one that also takes faults of the kernel, as KVM's are.
    ///
    /// # Errors
    /// When the host does not allow or offer it.
    pub fn open() -> Result<Self, UffdError> {
        let uffd = Self {
            fd: open_fd().map_err(UffdError::Open)?,
        };
        let mut api = UffdioApi {
            api: UFFD_API,
            features: FEATURE_MISSING_SHMEM,
            ioctls: 0,
        };
        // SAFETY: the request's own struct, which the kernel reads and fills.
        let result = unsafe { ioctl_with_mut_ref(&uffd, requests::UFFDIO_API(), &mut api) };
        if result < 0 {
            return Err(UffdError::Lacking(io::Error::last_os_error()));
        }
        Ok(uffd)
    }

    /// Who touches a missing page of `range` waits from now on.
    ///
    /// # Errors
    /// When the kernel refuses the range.
    ///
    /// # Safety
    /// `range` must be guest memory that stays mapped while it is registered.
    pub unsafe fn register(&self, range: HostRange) -> Result<(), UffdError> {
        let mut request = UffdioRegister {
            range: range.abi(),
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the request's own struct; the range is mapped by the caller's word, and registering changes no content.
        let result = unsafe { ioctl_with_mut_ref(self, requests::UFFDIO_REGISTER(), &mut request) };
        check("UFFDIO_REGISTER", range.len, result)?;
        if request.ioctls & NEEDED_IOCTLS == NEEDED_IOCTLS {
            Ok(())
        } else {
            Err(UffdError::Lacking(io::ErrorKind::Unsupported.into()))
        }
    }

    /// Nobody waits for pages of `range` any more, and those who do go on: what is missing reads as zeros.
    ///
    /// # Errors
    /// When the kernel does not know the range.
    pub fn unregister(&self, range: HostRange) -> Result<(), UffdError> {
        // SAFETY: the request's own struct, only read.
        let result = unsafe { ioctl_with_ref(self, requests::UFFDIO_UNREGISTER(), &range.abi()) };
        check("UFFDIO_UNREGISTER", range.len, result)
    }

    /// Those who wait for pages of `range` look again.
    ///
    /// # Errors
    /// When the kernel does not know the range.
    pub fn wake(&self, range: HostRange) -> Result<(), UffdError> {
        // SAFETY: the request's own struct, only read.
        let result = unsafe { ioctl_with_ref(self, requests::UFFDIO_WAKE(), &range.abi()) };
        check("UFFDIO_WAKE", range.len, result)
    }

    /// Places whole pages at `to`, all at once for whoever looks, and wakes those who wait for them. A page that is there
    /// already stays as it is.
    ///
    /// # Errors
    /// When a page cannot be placed: no memory on this host, or the range is not registered.
    ///
    /// # Safety
    /// `to` and the bytes after it must be guest memory; its missing pages are written.
    pub unsafe fn copy(&self, to: usize, pages: &[u8]) -> Result<(), UffdError> {
        self.place("UFFDIO_COPY", pages.len(), |done, len| {
            let mut request = UffdioCopy {
                dst: (to + done) as u64,
                src: pages[done..].as_ptr().addr() as u64,
                len: len as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the kernel reads `len` bytes of `pages`, writes only pages that were missing in memory that the
            // caller answers for, and fills the request's own struct.
            let result = unsafe { ioctl_with_mut_ref(self, requests::UFFDIO_COPY(), &mut request) };
            (result, request.copy)
        })
    }

    /// Places pages of zeros, as [`Uffd::copy`].
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    ///
    /// # Safety
    /// As [`Uffd::copy`].
    pub unsafe fn zero(&self, range: HostRange) -> Result<(), UffdError> {
        self.place("UFFDIO_ZEROPAGE", range.len, |done, len| {
            let at = HostRange {
                start: range.start + done,
                len,
            };
            let mut request = UffdioZeropage {
                range: at.abi(),
                mode: 0,
                zeropage: 0,
            };
            // SAFETY: as in `copy`.
            let result = unsafe { ioctl_with_mut_ref(self, requests::UFFDIO_ZEROPAGE(), &mut request) };
            (result, request.zeropage)
        })
    }

    /// Calls `step(done, rest)` until all is placed; a page that is there already is stepped over.
    fn place(
        &self,
        call: &'static str,
        len: usize,
        mut step: impl FnMut(usize, usize) -> (libc::c_int, i64),
    ) -> Result<(), UffdError> {
        let mut done = 0;
        while done < len {
            let (result, placed) = step(done, len - done);
            if result >= 0 {
                return Ok(());
            }
            let source = io::Error::last_os_error();
            match (source.raw_os_error(), usize::try_from(placed)) {
                // Part of it: why not the rest, the next call tells.
                (Some(libc::EAGAIN), Ok(placed @ 1..)) => done += placed,
                // The address space is being changed just now.
                (Some(libc::EAGAIN), _) => std::thread::yield_now(),
                (Some(libc::EEXIST), _) => done += PAGE,
                _ => return Err(UffdError::Call { call, len, source }),
            }
        }
        Ok(())
    }

    /// Takes the faults that have come, without waiting, at most `faults.len()`. Gives how many.
    ///
    /// # Errors
    /// When the descriptor cannot be read.
    pub fn read(&self, faults: &mut [Fault]) -> io::Result<usize> {
        const BATCH: usize = 32;
        let mut messages = [UffdMsg::default(); BATCH];
        let wanted = faults.len().min(BATCH) * size_of::<UffdMsg>();
        // SAFETY: at most `wanted` bytes are written, which `messages` has; every bit pattern is a valid UffdMsg.
        let bytes = unsafe { libc::read(self.as_raw_fd(), messages.as_mut_ptr().cast(), wanted) };
        let Ok(bytes) = usize::try_from(bytes) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        };
        let came = messages[..bytes / size_of::<UffdMsg>()].iter();
        let mut count = 0;
        for message in came.filter(|message| message.event == EVENT_PAGEFAULT) {
            faults[count] = Fault {
                address: usize::try_from(message.address).expect("64 bits"),
                write: message.flags & FAULT_FLAG_WRITE != 0,
            };
            count += 1;
        }
        Ok(count)
    }
}

fn check(call: &'static str, len: usize, result: libc::c_int) -> Result<(), UffdError> {
    if result >= 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    Err(UffdError::Call { call, len, source })
}

fn open_fd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: no pointers; a descriptor that the kernel gives is nobody else's.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let refused = if fd >= 0 {
        let fd = RawFd::try_from(fd).expect("a descriptor is an int");
        // SAFETY: just made, owned by nobody else.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    } else {
        io::Error::last_os_error()
    };
    let Ok(device) = File::options().read(true).write(true).open(DEVICE) else {
        return Err(refused);
    };
    // SAFETY: the argument is the flags of the new descriptor, not a pointer.
    let fd = unsafe {
        vmm_sys_util::ioctl::ioctl_with_val(
            &device,
            requests::USERFAULTFD_IOC_NEW(),
            libc::c_ulong::from(flags.unsigned_abs()),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
