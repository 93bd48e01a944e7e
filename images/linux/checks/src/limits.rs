//! What a process may have, and what becomes of one that has more.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{Resource, UsageWho, getrusage, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use crate::check::{Check, Outcome, alone, check};
use crate::processes::SELF;
use crate::sys::{Child, Mapping, PAGE, Scratch};
use crate::{ensure, ensure_eq, skip};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("limits.of-a-process", of_a_process),
    alone("limits.of-cpu-time", of_cpu_time),
    alone("limits.core-dump", core_dump),
    alone("limits.out-of-memory", out_of_memory),
];

fn of_a_process() -> Outcome {
    Child::start(|| {
        setrlimit(Resource::RLIMIT_NOFILE, 40, 40)?;
        let mut held = Vec::new();
        let refused = loop {
            match File::open(SELF) {
                Ok(file) => held.push(file),
                Err(error) => break error.raw_os_error(),
            }
            ensure!(held.len() < 60, "{} files are open", held.len());
        };
        ensure_eq!(refused, Some(libc::EMFILE), "one more file");
        drop(held);
        setrlimit(Resource::RLIMIT_FSIZE, 1000, 1000)?;
        let scratch = Scratch::new()?;
        let child = Child::start(|| {
            std::fs::write(scratch.path("large"), vec![0; 2000])?;
            Ok(())
        })?;
        let status = child.wait()?;
        ensure!(
            matches!(status, WaitStatus::Signaled(_, Signal::SIGXFSZ, _)),
            "a large file: {status:?}"
        );
        setrlimit(Resource::RLIMIT_AS, 64 << 20, 64 << 20)?;
        ensure_eq!(
            Mapping::private(256 << 20).err(),
            Some(Errno::ENOMEM),
            "256 MiB of addresses"
        );
        Ok(())
    })?
    .join()
}

fn of_cpu_time() -> Outcome {
    let child = Child::start(|| {
        setrlimit(Resource::RLIMIT_CPU, 1, 2)?;
        loop {
            std::hint::black_box((0..1000u64).sum::<u64>());
        }
    })?;
    let status = child.wait()?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGXCPU, _)),
        "a second of CPU time: {status:?}"
    );
    let used = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    ensure!(
        used.user_time().tv_sec() + used.system_time().tv_sec() >= 0,
        "usage of children"
    );
    Ok(())
}

/// A file with the state of who has crashed.
fn core_dump() -> Outcome {
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    let pattern = pattern.trim();
    if pattern.is_empty() || pattern.starts_with(['|', '/', '@']) || pattern.contains('%') {
        skip!("no core files here: the pattern is '{pattern}'");
    }
    let scratch = Scratch::new()?;
    let child = Child::start(|| {
        std::env::set_current_dir(scratch.directory())?;
        setrlimit(Resource::RLIMIT_CORE, libc::RLIM_INFINITY, libc::RLIM_INFINITY)?;
        std::process::abort()
    })?;
    let status = child.wait()?;
    ensure_eq!(
        status,
        WaitStatus::Signaled(child.pid, Signal::SIGABRT, true),
        "a core dump"
    );
    let file = std::fs::read_dir(scratch.directory())?
        .next()
        .ok_or(Errno::ENOENT)??;
    let core = std::fs::read(file.path())?;
    ensure!(
        core.starts_with(b"\x7fELF\x02") && core.get(16) == Some(&4),
        "no core file"
    );
    // Its notes hold the name of the program.
    let has = |text: &[u8]| core.windows(text.len()).any(|window| window == text);
    ensure!(core.len() > 10_000 && has(b"CORE\0"), "{} bytes", core.len());
    Ok(())
}

/// A group of processes that may have 24 MiB.
fn out_of_memory() -> Outcome {
    let scratch = Scratch::new()?;
    let root = scratch.path("cgroup");
    std::fs::create_dir(&root)?;
    let mounted = nix::mount::mount(
        Some("none"),
        &root,
        Some("cgroup2"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    );
    if let Err(error) = mounted {
        skip!("cgroups: {error}");
    }
    let outcome = limited(&root);
    let unmounted = nix::mount::umount(&root);
    outcome?;
    Ok(unmounted?)
}

fn limited(root: &Path) -> Outcome {
    let controllers = std::fs::read_to_string(root.join("cgroup.controllers"))?;
    if !controllers.split_whitespace().any(|name| name == "memory") {
        skip!("no controller of memory: '{}'", controllers.trim());
    }
    std::fs::write(root.join("cgroup.subtree_control"), "+memory")?;
    let group = root.join("checks");
    std::fs::create_dir(&group)?;
    std::fs::write(group.join("memory.max"), (24 << 20).to_string())?;
    // Whatever has no swap has no such file.
    drop(std::fs::write(group.join("memory.swap.max"), "0"));
    for _ in 0..3 {
        let child = Child::start(|| {
            std::fs::write(group.join("cgroup.procs"), "0")?;
            let memory = Mapping::private(96 << 20)?;
            (0..96 << 20).step_by(PAGE).for_each(|at| memory.set(at, 1));
            Ok(())
        })?;
        let status = child.wait()?;
        ensure!(
            matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
            "96 MiB of 24: {status:?}"
        );
    }
    let events = std::fs::read_to_string(group.join("memory.events"))?;
    ensure!(
        events.lines().any(|line| line == "oom_kill 3"),
        "events: {events}"
    );
    std::fs::remove_dir(&group)?;
    Ok(())
}
