//! Addresses that the kernel is given and must refuse.

use nix::errno::Errno;
use nix::libc;

use crate::check::{Check, Outcome, check};
use crate::sys::{Child, Mapping, PAGE, raw};
use crate::{ensure, ensure_eq, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("pointers.bad", bad),
    check("pointers.partly-bad", partly_bad),
];

/// Addresses that the kernel must not follow, whatever it could reach itself.
fn bad() -> Outcome {
    let (from, to) = nix::unistd::pipe()?;
    let bad = [
        0,
        16,
        (1 << 47) - 8,
        1 << 47,
        1 << 63,
        0xffff_8000_0000_0000,
        0xffff_8880_0010_0000,
        0xffff_c900_0000_0000,
        0xffff_ffff_8100_0000,
        0xffff_ffff_8200_0000,
        0xffff_ffff_ff60_0000,
        usize::MAX - 7,
    ];
    nix::unistd::write(&to, &[7; 64])?;
    for address in bad {
        let refused = |name: &str, result: nix::Result<usize>| -> Outcome {
            ensure_eq!(result, Err(Errno::EFAULT), "{name} at {address:#x}");
            Ok(())
        };
        refused("write", syscall!(SYS_write, raw(&to), address, 16))?;
        refused("read", syscall!(SYS_read, raw(&from), address, 16))?;
        refused("open", syscall!(SYS_open, address, 0))?;
        refused("stat", syscall!(SYS_stat, c"/".as_ptr(), address))?;
        refused("uname", syscall!(SYS_uname, address))?;
        refused("pipe", syscall!(SYS_pipe, address))?;
        refused("nanosleep", syscall!(SYS_nanosleep, address, 0usize))?;
        refused("execve", syscall!(SYS_execve, address, 0usize, 0usize))?;
        refused("times", syscall!(SYS_sysinfo, address))?;
        let vector = [address, 16];
        refused("writev", syscall!(SYS_writev, raw(&to), vector.as_ptr(), 1))?;
        if address != 0 {
            refused(
                "sigaction",
                syscall!(SYS_rt_sigaction, libc::SIGUSR1, address, 0usize, 8),
            )?;
            refused(
                "old sigaction",
                syscall!(SYS_rt_sigaction, libc::SIGUSR1, 0usize, address, 8),
            )?;
            refused("getcwd", syscall!(SYS_getcwd, address, 4096))?;
            refused("wait", {
                let child = Child::start(|| Ok(()))?;
                let result = syscall!(SYS_wait4, child.pid.as_raw(), address, 0, 0usize);
                drop(child.wait());
                result
            })?;
        }
    }
    let mut left = [0; 128];
    let count = nix::unistd::read(&from, &mut left)?;
    ensure_eq!(left[..count].to_vec(), vec![7; 64], "what is left in the pipe");
    Ok(())
}

/// Buffers that begin well.
fn partly_bad() -> Outcome {
    let memory = Mapping::private(3 * PAGE)?;
    memory.put(0, &[b'a'; 2 * PAGE]);
    memory.punch(2 * PAGE, PAGE)?;
    let end = memory.address() + 2 * PAGE;
    let (from, to) = nix::unistd::pipe()?;
    for good in [1usize, 7, 8, 9, 63, 100, 4000] {
        let written = syscall!(SYS_write, raw(&to), end - good, good + 100);
        ensure!(
            written == Err(Errno::EFAULT) || written.is_ok_and(|count| count <= good),
            "write of {good} good bytes: {written:?}"
        );
        let mut drained = vec![0; 8192];
        if let Ok(count) = written {
            ensure_eq!(
                nix::unistd::read(&from, &mut drained)?,
                count,
                "bytes in the pipe"
            );
        }
        // A path that ends with the page, and one that does not end before it.
        memory.put(2 * PAGE - good, &vec![b'b'; good]);
        let endless = syscall!(SYS_access, end - good, 0);
        ensure_eq!(
            endless,
            Err(Errno::EFAULT),
            "a path of {good} bytes without an end"
        );
        memory.put(2 * PAGE - 1, &[0]);
        let path = syscall!(SYS_access, end - good, 0);
        ensure!(
            matches!(path, Err(Errno::ENOENT | Errno::ENAMETOOLONG)),
            "a path of {good} bytes: {path:?}"
        );
        // What cannot be stored whole.
        nix::unistd::write(&to, &vec![b'c'; good + 50])?;
        let read = syscall!(SYS_read, raw(&from), end - good, good + 50);
        ensure!(
            read == Err(Errno::EFAULT) || read.is_ok_and(|count| count <= good),
            "read: {read:?}"
        );
        let kept = memory.bytes(2 * PAGE - good, good);
        ensure!(
            kept.iter().all(|byte| [b'b', b'c', 0].contains(byte)),
            "bytes before the end"
        );
        nix::fcntl::fcntl(
            &from,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
        while nix::unistd::read(&from, &mut drained).is_ok_and(|count| count > 0) {}
    }
    Ok(())
}
