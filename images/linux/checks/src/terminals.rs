//! Pseudo-terminals: lines, raw bytes, and the signals of keys.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::poll::PollTimeout;
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::Signal;
use nix::sys::termios;
use nix::unistd::{read, setsid, write};

use crate::check::{Check, Outcome, Stop, check};
use crate::sys::{Child, check_stream, raw, send_stream, until};
use crate::{ensure, ensure_eq, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("terminals.lines", lines),
    check("terminals.signals", signals),
];

fn open_terminal() -> Outcome<OpenptyResult> {
    match openpty(None, None) {
        Err(error @ (Errno::ENOENT | Errno::ENOSYS | Errno::ENODEV | Errno::EACCES)) => {
            Err(Stop::Skip(format!("no /dev/ptmx or no devpts: {error}")))
        }
        other => Ok(other?),
    }
}

/// Line by line with echo, and raw.
fn lines() -> Outcome {
    let OpenptyResult { master, slave } = open_terminal()?;
    let mut bytes = [0; 100];
    let patient_read = |from: &OwnedFd, bytes: &mut [u8]| -> Outcome<String> {
        let mut ready = [nix::poll::PollFd::new(from.as_fd(), nix::poll::PollFlags::POLLIN)];
        ensure_eq!(
            nix::poll::poll(&mut ready, PollTimeout::from(30_000u16))?,
            1,
            "something to read"
        );
        let count = read(from, bytes)?;
        Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
    };
    write(&master, b"abc\x7fd\n")?; // the third is rubbed out
    ensure_eq!(patient_read(&slave, &mut bytes)?, "abd\n", "a line");
    let echo = patient_read(&master, &mut bytes)?;
    ensure!(echo.starts_with("abc"), "the echo: {echo:?}");
    write(&slave, b"x\n")?;
    let mut seen = String::new();
    until("what was written", || {
        seen += &patient_read(&master, &mut bytes)?;
        Ok(seen.ends_with("x\r\n"))
    })?;
    let mut settings = termios::tcgetattr(&slave)?;
    termios::cfmakeraw(&mut settings);
    termios::tcsetattr(&slave, termios::SetArg::TCSANOW, &settings)?;
    let child = Child::start(|| send_stream(std::fs::File::from(nix::unistd::dup(&master)?), 20_000, 4))?;
    let mut stream = Vec::new();
    while stream.len() < 20_000 {
        let count = read(&slave, &mut bytes)?;
        stream.extend_from_slice(&bytes[..count]);
    }
    child.join()?;
    check_stream(&stream[..], 20_000, 4)
}

/// ^C goes to the processes of the foreground; a hang-up to the session's leader.
fn signals() -> Outcome {
    let OpenptyResult { master, slave } = open_terminal()?;
    for (byte, signal) in [(3u8, Signal::SIGINT), (28, Signal::SIGQUIT)] {
        let (mut ready, tell) = std::io::pipe()?;
        let child = Child::start(|| {
            nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
            setsid()?;
            syscall!(SYS_ioctl, raw(&slave), libc::TIOCSCTTY, 1)?;
            (&tell).write_all(b"x")?;
            loop {
                nix::unistd::pause();
            }
        })?;
        ready.read_exact(&mut [0])?;
        write(&master, &[byte])?;
        let status = child.wait()?;
        ensure!(
            matches!(status, nix::sys::wait::WaitStatus::Signaled(_, found, _) if found == signal),
            "after {byte}: {status:?}"
        );
    }
    let (mut ready, tell) = std::io::pipe()?;
    let child = Child::start(|| {
        setsid()?;
        syscall!(SYS_ioctl, raw(&slave), libc::TIOCSCTTY, 1)?;
        // The parent's is the only one that is left.
        syscall!(SYS_close, raw(&master))?;
        (&tell).write_all(b"x")?;
        loop {
            nix::unistd::pause();
        }
    })?;
    ready.read_exact(&mut [0])?;
    drop(master);
    let status = child.wait()?;
    ensure!(
        matches!(status, nix::sys::wait::WaitStatus::Signaled(_, Signal::SIGHUP, _)),
        "after a hang-up: {status:?}"
    );
    Ok(())
}
