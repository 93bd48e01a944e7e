//! Processes: forks, new programs, and how they end.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{self, c_int, c_void};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, getpgid, getpid, getppid, getsid, setsid};

use crate::check::{Check, Outcome, available, check};
use crate::sys::{Child, Mapping, PAGE, Scratch, raw, until};
use crate::{ensure, ensure_eq, skip, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("processes.exit-status", exit_status),
    check("processes.fork-storm", fork_storm),
    check("processes.tree", tree),
    check("processes.vfork-and-exec", vfork_and_exec),
    check("processes.exec-busybox", exec_busybox),
    check("processes.arguments", arguments),
    check("processes.scripts", scripts),
    check("processes.exec-refused", exec_refused),
    check("processes.exec-of-descriptor", exec_of_descriptor),
    check("processes.clone", clone),
    check("processes.orphans", orphans),
    check("processes.groups", groups),
    check("processes.descriptor", descriptor),
    check("processes.priorities", priorities),
];

pub(crate) const SELF: &str = "/proc/self/exe";
const BUSYBOX: &str = "/bin/busybox";

fn exit_status() -> Outcome {
    for status in (0..256).step_by(5) {
        let child = Child::start(|| crate::sys::exit(status))?;
        ensure_eq!(child.wait()?, WaitStatus::Exited(child.pid, status), "exit");
    }
    let child = Child::start(|| crate::sys::exit(7))?;
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    for _ in 0..2 {
        ensure_eq!(
            waitid(Id::Pid(child.pid), look)?,
            WaitStatus::Exited(child.pid, 7),
            "a look"
        );
    }
    child.wait()?;
    ensure_eq!(waitpid(child.pid, None), Err(Errno::ECHILD), "again");
    for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGUSR2] {
        let child = Child::start(|| Ok(raise(signal)?))?;
        ensure_eq!(
            child.wait()?,
            WaitStatus::Signaled(child.pid, signal, false),
            "a signal"
        );
    }
    Ok(())
}

fn fork_storm() -> Outcome {
    for round in 0..12 {
        let mut children = Vec::new();
        for number in 0..5u8 {
            children.push(Child::start(move || {
                let memory = vec![number; 256 << 10];
                ensure!(
                    std::hint::black_box(&memory)
                        .iter()
                        .step_by(997)
                        .all(|&byte| byte == number),
                    "memory"
                );
                Ok(())
            })?);
        }
        for child in children {
            child.join()?;
        }
        ensure!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)) == Err(Errno::ECHILD),
            "round {round}: someone is left"
        );
    }
    Ok(())
}

/// Each has two children, five levels deep.
fn tree() -> Outcome {
    fn grow(levels: u32) -> Outcome {
        if levels == 0 {
            return Ok(());
        }
        let own = getpid();
        let children = [(); 2].map(|()| {
            Child::start(|| {
                ensure_eq!(getppid(), own, "the parent");
                grow(levels - 1)
            })
        });
        for child in children {
            child?.join()?;
        }
        Ok(())
    }
    grow(5)
}

fn vfork_and_exec() -> Outcome {
    // The library starts programs so where it can.
    for status in 0..25 {
        let ended = Command::new(SELF).args(["exit", &status.to_string()]).status()?;
        ensure_eq!(ended.code(), Some(status), "its status");
    }
    let mut piped = Command::new(SELF)
        .arg("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let bytes = vec![b'x'; 200_000];
    let mut input = piped.stdin.take().ok_or(Errno::EPIPE)?;
    let writer = std::thread::spawn(move || input.write_all(&bytes));
    let output = piped.wait_with_output()?;
    ensure!(matches!(writer.join(), Ok(Ok(()))), "writing");
    ensure_eq!(
        (output.status.code(), output.stdout.len()),
        (Some(0), 200_000),
        "what came back"
    );
    Ok(())
}

fn exec_busybox() -> Outcome {
    if !Path::new(BUSYBOX).exists() {
        skip!("no {BUSYBOX}");
    }
    for _ in 0..10 {
        ensure!(Command::new(BUSYBOX).arg("true").status()?.success(), "true");
        ensure_eq!(
            Command::new(BUSYBOX).arg("false").status()?.code(),
            Some(1),
            "false"
        );
    }
    let script = "i=0; while [ $i -lt 20 ]; do i=$((i+1)); echo $i; done | /bin/busybox sort -rn | /bin/busybox head -n 1";
    let output = Command::new(BUSYBOX).args(["sh", "-c", script]).output()?;
    ensure_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "20",
        "a pipeline of the shell"
    );
    Ok(())
}

/// What a program is given arrives, all of it.
fn arguments() -> Outcome {
    let long = "ä".repeat(60_000);
    let many: Vec<String> = (0..2000).map(|number| format!("argument {number}")).collect();
    for words in [vec![String::new()], vec![long], many] {
        let output = Command::new(SELF)
            .arg("echo")
            .args(&words)
            .env_clear()
            .env("CHECKS_VARIABLE", "its value")
            .output()?;
        let expected = format!("{}\nits value\n", words.join("\n"));
        ensure!(
            output.status.success() && output.stdout == expected.as_bytes(),
            "{} arguments came otherwise",
            words.len()
        );
    }
    let too_long = "x".repeat(200_000);
    let refused = Command::new(SELF).args(["echo", &too_long]).status();
    ensure_eq!(
        refused.err().and_then(|error| error.raw_os_error()),
        Some(libc::E2BIG),
        "200,000 bytes"
    );
    Ok(())
}

fn executable(path: &Path, content: &[u8]) -> Outcome {
    // In a process of its own: a child of another thread could hold the file open for writing, and exec would find it busy.
    std::fs::write(path, content)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn scripts() -> Outcome {
    let scratch = Scratch::new()?;
    let own = std::fs::read_link(SELF)?;
    let script = scratch.path("script");
    executable(&script, format!("#!{} echo\n", own.display()).as_bytes())?;
    let output = Command::new(&script)
        .arg("word")
        .env("CHECKS_VARIABLE", "")
        .output()?;
    let expected = format!("{}\nword\n\n", script.display());
    ensure_eq!(
        String::from_utf8_lossy(&output.stdout),
        expected,
        "what the interpreter is given"
    );
    Ok(())
}

fn exec_refused() -> Outcome {
    let scratch = Scratch::new()?;
    let refused = |path: &Path| {
        Command::new(path)
            .status()
            .err()
            .and_then(|error| error.raw_os_error())
    };
    ensure_eq!(refused(&scratch.path("nothing")), Some(libc::ENOENT), "nothing");
    std::fs::write(scratch.path("data"), b"data")?;
    ensure_eq!(
        refused(&scratch.path("data")),
        Some(libc::EACCES),
        "what may not be executed"
    );
    executable(
        &scratch.path("garbage"),
        &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0],
    )?;
    ensure_eq!(
        refused(&scratch.path("garbage")),
        Some(libc::ENOEXEC),
        "half a header"
    );
    executable(&scratch.path("no-interpreter"), b"#!/no/such/file\n")?;
    ensure_eq!(
        refused(&scratch.path("no-interpreter")),
        Some(libc::ENOENT),
        "no interpreter"
    );
    ensure_eq!(refused(scratch.directory()), Some(libc::EACCES), "a directory");
    Ok(())
}

fn exec_of_descriptor() -> Outcome {
    let file = File::open(SELF)?;
    let child = Child::start(|| {
        let words = [
            c"checks".as_ptr(),
            c"exit".as_ptr(),
            c"9".as_ptr(),
            std::ptr::null(),
        ];
        let environment = [std::ptr::null::<libc::c_char>()];
        syscall!(
            SYS_execveat,
            raw(&file),
            c"".as_ptr(),
            words.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH
        )?;
        Ok(())
    })?;
    ensure_eq!(child.wait()?, WaitStatus::Exited(child.pid, 9), "execveat");
    // What is to be closed is closed, and nothing else.
    let (from, to) = std::io::pipe()?;
    let kept = nix::unistd::dup(&from)?;
    nix::fcntl::fcntl(&kept, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    let numbers = [kept.as_raw_fd(), from.as_raw_fd(), to.as_raw_fd()].map(|number| number.to_string());
    let status = Command::new(SELF).arg("open").args(&numbers).status()?;
    ensure_eq!(status.code(), Some(1), "open descriptors of three, as bits");
    Ok(())
}

/// A child that shares memory and has a stack of its own.
fn clone() -> Outcome {
    extern "C" fn child(shared: *mut c_void) -> c_int {
        // SAFETY: the parent's mapping, which it shares.
        let word = unsafe { std::sync::atomic::AtomicU64::from_ptr(shared.cast()) };
        word.fetch_add(41, std::sync::atomic::Ordering::SeqCst);
        17
    }
    for flags in [
        libc::CLONE_VM | libc::SIGCHLD,
        libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
        libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | libc::SIGCHLD,
    ] {
        let memory = Mapping::private(16 * PAGE)?;
        memory.set(0, 1);
        // SAFETY: the stack and the word are mapped until the child has ended; the child touches only them.
        let pid = unsafe {
            libc::clone(
                child,
                memory.pointer::<u8>(16 * PAGE - 16).cast(),
                flags,
                memory.pointer::<c_void>(0).cast(),
            )
        };
        let pid = Pid::from_raw(Errno::result(pid)?);
        let status = waitpid(pid, None)?;
        ensure_eq!(
            (status, memory.get(0)),
            (WaitStatus::Exited(pid, 17), 42),
            "flags {flags:#x}"
        );
    }
    Ok(())
}

fn orphans() -> Outcome {
    let child = Child::start(|| {
        nix::sys::prctl::set_child_subreaper(true)?;
        let (mut from, to) = std::io::pipe()?;
        let middle = Child::start(|| {
            let grandchild = Child::start(|| {
                nix::sys::prctl::set_pdeathsig(None)?;
                let parent = getppid();
                (&to).write_all(b"x")?;
                until("the end of its parent", || Ok(getppid() != parent))?;
                crate::sys::exit(23)
            })?;
            let mut byte = [0];
            from.read_exact(&mut byte)?;
            std::mem::forget(grandchild);
            Ok(())
        })?;
        middle.join()?;
        let status = crate::sys::retry(|| waitpid(None, None))?;
        ensure!(
            matches!(status, WaitStatus::Exited(_, 23)),
            "the orphan: {status:?}"
        );
        Ok(())
    })?;
    child.join()
}

fn groups() -> Outcome {
    let child = Child::start(|| {
        let own = getpid();
        ensure_eq!(setsid()?, own, "the session");
        ensure_eq!((getsid(None)?, getpgid(None)?), (own, own), "session and group");
        ensure_eq!(setsid(), Err(Errno::EPERM), "again");
        let members: Vec<Child> = (0..4)
            .map(|_| {
                Child::start(|| {
                    loop {
                        nix::unistd::pause();
                    }
                })
            })
            .collect::<Outcome<_>>()?;
        let ours = members.iter().all(|member| getpgid(Some(member.pid)) == Ok(own));
        ensure!(ours, "children are of another group");
        let outsider = &members[0];
        nix::unistd::setpgid(outsider.pid, outsider.pid)?;
        nix::sys::signal::killpg(outsider.pid, Signal::SIGTERM)?;
        outsider.wait()?;
        for member in &members[1..] {
            ensure_eq!(
                waitpid(member.pid, Some(WaitPidFlag::WNOHANG))?,
                WaitStatus::StillAlive,
                "the others"
            );
            kill(member.pid, Signal::SIGKILL)?;
            member.wait()?;
        }
        Ok(())
    })?;
    child.join()
}

fn descriptor() -> Outcome {
    let child = Child::start(|| {
        loop {
            nix::unistd::pause();
        }
    })?;
    let number = available("pidfd_open", syscall!(SYS_pidfd_open, child.pid.as_raw(), 0))?;
    let mut ready = libc::pollfd {
        fd: c_int::try_from(number)?,
        events: libc::POLLIN,
        revents: 0,
    };
    ensure_eq!(
        syscall!(SYS_poll, &raw mut ready, 1, 0)?,
        0,
        "ready while it runs"
    );
    syscall!(SYS_pidfd_send_signal, number, libc::SIGKILL, 0usize, 0)?;
    ensure_eq!(
        syscall!(SYS_poll, &raw mut ready, 1, 30_000)?,
        1,
        "ready after its end"
    );
    let status = child.wait()?;
    ensure_eq!(
        status,
        WaitStatus::Signaled(child.pid, Signal::SIGKILL, false),
        "its end"
    );
    Ok(())
}

fn priorities() -> Outcome {
    Child::start(|| {
        syscall!(SYS_setpriority, libc::PRIO_PROCESS, 0, 7)?;
        // As the call has it: 20 less the nice value.
        ensure_eq!(
            syscall!(SYS_getpriority, libc::PRIO_PROCESS, 0)?,
            13,
            "nice value"
        );
        for policy in [libc::SCHED_FIFO, libc::SCHED_RR] {
            let parameter = 3i32;
            available(
                "sched_setscheduler",
                syscall!(SYS_sched_setscheduler, 0, policy, &raw const parameter),
            )?;
            ensure_eq!(
                syscall!(SYS_sched_getscheduler, 0)?,
                usize::try_from(policy)?,
                "policy"
            );
            nix::sched::sched_yield()?;
            // It gives way while it sleeps.
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    })?
    .join()
}

/// What the checks run as new programs; `None` for all other words.
#[must_use]
pub fn helper(words: &[&str]) -> Option<u8> {
    match words {
        ["exit", status] => status.parse().ok(),
        ["cat", ..] => Some(u8::from(
            std::io::copy(&mut std::io::stdin(), &mut std::io::stdout()).is_err(),
        )),
        ["echo", words @ ..] => {
            words.iter().for_each(|word| println!("{word}"));
            println!("{}", std::env::var("CHECKS_VARIABLE").unwrap_or_default());
            Some(0)
        }
        ["open", numbers @ ..] => {
            let open = |number: &str| Path::new("/proc/self/fd").join(number).symlink_metadata().is_ok();
            Some(
                numbers
                    .iter()
                    .enumerate()
                    .map(|(bit, number)| u8::from(open(number)) << bit)
                    .sum(),
            )
        }
        ["fresh-fp"] => Some(u8::from(crate::fp::fresh().is_err())),
        _ => None,
    }
}
