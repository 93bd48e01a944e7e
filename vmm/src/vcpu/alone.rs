//! A vCPU without a thread of its own, for a while.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};

use vmm_sys_util::signal::SIGRTMIN;

use super::{CurrentRun, VcpuError, install_kick_handler};

/// From one kick to the next, if the first is not enough.
const BETWEEN_KICKS: Duration = Duration::from_millis(1);

/// Runs guest code on this thread until `look` answers something for an exit, and answers that; nothing, if that takes
/// longer than `limit`.
///
/// # Errors
/// When the host has no thread to keep time with, or KVM_RUN fails.
pub fn run_at_most<T>(
    fd: &mut VcpuFd,
    limit: Duration,
    mut look: impl FnMut(VcpuExit<'_>) -> Option<T>,
) -> Result<Option<T>, VcpuError> {
    install_kick_handler()?;
    let _current = CurrentRun::new(fd);
    let deadline = Instant::now() + limit;
    kicked_after(limit, || {
        loop {
            match fd.run() {
                Ok(exit) => {
                    if let Some(answer) = look(exit) {
                        return Ok(Some(answer));
                    }
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    fd.set_kvm_immediate_exit(0);
                }
                Err(error) => return Err(VcpuError::Run(error)),
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
        }
    })?
}

/// Calls `run` on this thread, which is kicked after `limit`, and again and again until `run` returns. The kick's handler is
/// installed.
pub(super) fn kicked_after<T>(limit: Duration, run: impl FnOnce() -> T) -> Result<T, VcpuError> {
    // SAFETY: without preconditions.
    let this_thread = unsafe { libc::pthread_self() };
    std::thread::scope(|scope| {
        let (over, is_over) = mpsc::channel::<()>();
        let keep_time = move || {
            let mut wait = limit;
            while is_over.recv_timeout(wait) == Err(mpsc::RecvTimeoutError::Timeout) {
                // SAFETY: the scope joins this thread before the kicked one leaves it; the signal has its handler. Another
                // kick follows, should this one fail.
                unsafe { libc::pthread_kill(this_thread, SIGRTMIN()) };
                wait = BETWEEN_KICKS;
            }
        };
        std::thread::Builder::new()
            .spawn_scoped(scope, keep_time)
            .map_err(|source| VcpuError::Thread { id: 0, source })?;
        // Dropped, it lets the other thread end.
        let _over = over;
        Ok(run())
    })
}
