//! Threads, and what they meet at: futexes of every kind, and memory of their own.

use std::os::unix::process::ExitStatusExt as _;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Condvar, Mutex, mpsc};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{self, c_int};

use crate::check::{Check, Outcome, Stop, check};
use crate::sys::{Child, Mapping, PAGE, as_timespec, now, until};
use crate::{ensure, ensure_eq, skip, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("threads.many", many),
    check("threads.own-memory", own_memory),
    check("threads.segment-bases", segment_bases),
    check("threads.exit-of-all", exit_of_all),
    check("threads.channels", channels),
    check("futex.mutex", mutex),
    check("futex.condition", condition),
    check("futex.wait", wait),
    check("futex.requeue", requeue),
    check("futex.wake-op", wake_op),
    check("futex.between-processes", between_processes),
    check("futex.priority-inheritance", priority_inheritance),
    check("futex.robust", robust),
];

fn joined<T>(threads: impl IntoIterator<Item = std::thread::JoinHandle<Outcome<T>>>) -> Outcome<Vec<T>> {
    let panicked = |_| Stop::Fail("a thread panicked".into());
    threads
        .into_iter()
        .map(|thread| thread.join().map_err(panicked)?)
        .collect()
}

fn many() -> Outcome {
    for _ in 0..10 {
        let threads: Vec<_> = (0..20u64)
            .map(|n| std::thread::spawn(move || Ok(n * n)))
            .collect();
        let sum: u64 = joined(threads)?.iter().sum();
        ensure_eq!(sum, 2470, "squares");
    }
    Ok(())
}

fn own_memory() -> Outcome {
    thread_local!(static OWN: std::cell::Cell<[u64; 8]> = const { std::cell::Cell::new([77; 8]) });
    let barrier = Arc::new(Barrier::new(6));
    let threads: Vec<_> = (0..6u64)
        .map(|number| {
            let barrier = Arc::clone(&barrier);
            std::thread::spawn(move || {
                ensure_eq!(OWN.get(), [77; 8], "a fresh thread's");
                barrier.wait();
                for round in 0..200 {
                    OWN.set([number * 1000 + round; 8]);
                    std::thread::yield_now();
                    ensure_eq!(OWN.get(), [number * 1000 + round; 8], "thread {number}");
                }
                Ok(())
            })
        })
        .collect();
    joined(threads)?;
    ensure_eq!(OWN.get(), [77; 8], "the first thread's");
    Ok(())
}

/// FS and GS bases, which the kernel switches; it must not use the program's GS for itself.
fn segment_bases() -> Outcome {
    const ARCH_SET_GS: c_int = 0x1001;
    const ARCH_GET_FS: c_int = 0x1003;
    const ARCH_GET_GS: c_int = 0x1004;
    /// Bit of AT_HWCAP2: the instructions may be used.
    const HWCAP2_FSGSBASE: u64 = 2;
    // SAFETY: reads a number.
    let instructions = unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0;
    let threads: Vec<_> = (0..4usize)
        .map(|number| {
            std::thread::spawn(move || {
                let page = Mapping::private(PAGE)?;
                page.set(64, 0xabcd + number as u64);
                syscall!(SYS_arch_prctl, ARCH_SET_GS, page.address())?;
                for round in 0..200 {
                    if round % 10 == 0 {
                        std::thread::sleep(Duration::from_micros(100));
                    } else {
                        std::thread::yield_now();
                    }
                    let (mut fs, mut gs) = (0usize, 0usize);
                    syscall!(SYS_arch_prctl, ARCH_GET_FS, &raw mut fs)?;
                    syscall!(SYS_arch_prctl, ARCH_GET_GS, &raw mut gs)?;
                    let (own, found): (usize, u64);
                    // SAFETY: the C library keeps its thread's address there; GS points at the mapped page.
                    unsafe { std::arch::asm!("mov {}, fs:[0]", "mov {}, gs:[64]", out(reg) own, out(reg) found) };
                    ensure_eq!((fs, gs), (own, page.address()), "bases");
                    ensure_eq!(found, 0xabcd + number as u64, "a word by GS");
                    if instructions {
                        let (fs, gs): (usize, usize);
                        // SAFETY: both are allowed, as the kernel says, and leave GS as it is.
                        unsafe { std::arch::asm!("rdfsbase {fs}", "rdgsbase {gs}", "wrgsbase {gs}", fs = out(reg) fs, gs = out(reg) gs) };
                        ensure_eq!((fs, gs), (own, page.address()), "bases by instruction");
                    }
                }
                // An address of the program's that is no mapping, and 0.
                for base in [0usize, 0x7fff_ffff_e000, 0x1234_5678] {
                    syscall!(SYS_arch_prctl, ARCH_SET_GS, base)?;
                    std::thread::yield_now();
                    let mut gs = 1usize;
                    syscall!(SYS_arch_prctl, ARCH_GET_GS, &raw mut gs)?;
                    ensure_eq!(gs, base, "GS base");
                }
                Ok(())
            })
        })
        .collect();
    joined(threads).map(drop)
}

/// exit_group(2), exec and a deadly signal from any thread end them all.
fn exit_of_all() -> Outcome {
    let others = || {
        for _ in 0..4 {
            std::thread::spawn(|| {
                loop {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
    };
    for _ in 0..5 {
        let child = Child::start(|| {
            others();
            drop(std::thread::spawn(|| crate::sys::exit(33)).join());
            Ok(())
        })?;
        ensure_eq!(
            child.wait()?,
            nix::sys::wait::WaitStatus::Exited(child.pid, 33),
            "exit"
        );
        let child = Child::start(|| {
            others();
            let abort = || {
                let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
            };
            drop(std::thread::spawn(abort).join());
            Ok(())
        })?;
        let status = child.wait()?;
        ensure!(
            matches!(status, nix::sys::wait::WaitStatus::Signaled(..)),
            "{status:?}"
        );
        let child = Child::start(|| {
            others();
            let exec = || {
                std::os::unix::process::CommandExt::exec(
                    std::process::Command::new("/proc/self/exe").arg("exit").arg("5"),
                )
            };
            drop(std::thread::spawn(exec).join());
            Ok(())
        })?;
        let pid = child.pid;
        ensure_eq!(child.wait()?, nix::sys::wait::WaitStatus::Exited(pid, 5), "exec");
    }
    let status = std::process::ExitStatus::from_raw(9);
    ensure_eq!(status.signal(), Some(9), "a status");
    Ok(())
}

fn channels() -> Outcome {
    let (to_first, from_first) = mpsc::sync_channel::<u64>(4);
    let (mut from, mut threads) = (from_first, Vec::new());
    for _ in 0..5 {
        let (to, next) = mpsc::sync_channel(4);
        let source = std::mem::replace(&mut from, next);
        threads.push(std::thread::spawn(move || {
            while let Ok(n) = source.recv() {
                let _ = to.send(n + 1);
            }
            Ok(())
        }));
    }
    threads.push(std::thread::spawn(move || {
        (0..1000)
            .try_for_each(|n| to_first.send(n))
            .map_err(|_| Stop::Fail("nobody listens".into()))
    }));
    for expected in 5..1005 {
        ensure_eq!(from.recv().ok(), Some(expected), "through five threads");
    }
    joined(threads).map(drop)
}

fn mutex() -> Outcome {
    let counter = Arc::new(Mutex::new(0u64));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let counter = Arc::clone(&counter);
            std::thread::spawn(move || {
                for round in 0..2000 {
                    let mut count = counter.lock().map_err(|_| Stop::Fail("poisoned".into()))?;
                    let seen = *count;
                    if round % 100 == 0 {
                        std::thread::yield_now();
                    }
                    *count = seen + 1;
                }
                Ok(())
            })
        })
        .collect();
    joined(threads)?;
    ensure_eq!(counter.lock().map(|count| *count).ok(), Some(8000), "the counter");
    Ok(())
}

fn condition() -> Outcome {
    let shared = Arc::new((Mutex::new(0u64), Condvar::new()));
    let threads: Vec<_> = (0..3u64)
        .map(|own| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                for _ in 0..200 {
                    let poisoned = || Stop::Fail("poisoned".into());
                    let turn = shared.0.lock().map_err(|_| poisoned())?;
                    let mut turn = shared
                        .1
                        .wait_while(turn, |turn| *turn % 3 != own)
                        .map_err(|_| poisoned())?;
                    *turn += 1;
                    shared.1.notify_all();
                }
                Ok(())
            })
        })
        .collect();
    joined(threads)?;
    ensure_eq!(shared.0.lock().map(|turn| *turn).ok(), Some(600), "turns");
    Ok(())
}

fn futex_wait(word: &AtomicU32, value: u32, timeout: Duration) -> nix::Result<usize> {
    let timeout = as_timespec(timeout);
    syscall!(
        SYS_futex,
        word.as_ptr(),
        libc::FUTEX_WAIT,
        value,
        &raw const timeout
    )
}

fn futex_wake(word: &AtomicU32, count: c_int) -> nix::Result<usize> {
    syscall!(SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count)
}

fn wait() -> Outcome {
    let word = AtomicU32::new(5);
    ensure_eq!(
        futex_wait(&word, 4, Duration::from_secs(9)),
        Err(Errno::EAGAIN),
        "another value"
    );
    let start = now()?;
    ensure_eq!(
        futex_wait(&word, 5, Duration::from_millis(15)),
        Err(Errno::ETIMEDOUT),
        "nobody"
    );
    ensure!(now()? - start >= Duration::from_millis(15), "it ends early");
    ensure_eq!(futex_wake(&word, 10)?, 0, "waiters");
    let bad = syscall!(SYS_futex, 0x10usize, libc::FUTEX_WAIT, 0, 0usize);
    ensure_eq!(bad, Err(Errno::EFAULT), "no memory");
    let kernel = syscall!(SYS_futex, 0xffff_ffff_8100_0000usize, libc::FUTEX_WAIT, 0, 0usize);
    ensure_eq!(kernel, Err(Errno::EFAULT), "the kernel's memory");
    let odd = syscall!(
        SYS_futex,
        word.as_ptr().expose_provenance() + 1,
        libc::FUTEX_WAIT,
        5,
        0usize
    );
    ensure_eq!(odd, Err(Errno::EINVAL), "an odd address");
    Ok(())
}

/// Threads that wait at one word are woken at another.
fn requeue() -> Outcome {
    let words = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
    let woken = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..6)
        .map(|_| {
            let (words, woken) = (Arc::clone(&words), Arc::clone(&woken));
            std::thread::spawn(move || {
                crate::sys::retry(|| futex_wait(&words[0], 0, Duration::from_secs(30)))?;
                woken.fetch_add(1, SeqCst);
                Ok(())
            })
        })
        .collect();
    let (first, second) = (words[0].as_ptr(), words[1].as_ptr());
    let (mut done, mut at_once) = (0, 0);
    until("six that wait", || {
        // Wakes none and moves all that are there.
        done += syscall!(SYS_futex, first, libc::FUTEX_CMP_REQUEUE, 0, 100usize, second, 0)?;
        Ok(done == 6)
    })?;
    let differs = syscall!(SYS_futex, first, libc::FUTEX_CMP_REQUEUE, 1, 100usize, second, 7);
    ensure_eq!(differs, Err(Errno::EAGAIN), "another value");
    ensure_eq!(
        (woken.load(SeqCst), futex_wake(&words[0], 10)?),
        (0, 0),
        "at the first"
    );
    for _ in 0..3 {
        at_once += futex_wake(&words[1], 2)?;
    }
    ensure_eq!(at_once, 6, "woken at the second");
    joined(threads)?;
    ensure_eq!(woken.load(SeqCst), 6, "went on");
    Ok(())
}

/// The kernel changes a word of the program's, also one that is shared with a parent until it is written.
fn wake_op() -> Outcome {
    const ADD_ONE_AND_WAKE_IF_SEVEN: u32 = 1 << 28 | 1 << 12 | 7;
    let page = Mapping::private(PAGE)?;
    page.set(0, 7);
    let change = |page: &Mapping| {
        let address = page.address();
        let other = address + 8;
        syscall!(
            SYS_futex,
            other,
            libc::FUTEX_WAKE_OP,
            1,
            1usize,
            address,
            ADD_ONE_AND_WAKE_IF_SEVEN
        )
    };
    Child::start(|| {
        ensure_eq!(change(&page)?, 0, "woken");
        ensure_eq!(page.get(0), 8, "the child's");
        Ok(())
    })?
    .join()?;
    ensure_eq!(page.get(0), 7, "the parent's");
    page.protect(0, PAGE, nix::sys::mman::ProtFlags::PROT_READ)?;
    ensure_eq!(change(&page), Err(Errno::EFAULT), "a page to read");
    Ok(())
}

fn between_processes() -> Outcome {
    let page = Mapping::shared(PAGE)?;
    let turn = |own: u32, page: &Mapping| -> Outcome {
        let word: &AtomicU32 = page.atomic(0);
        for _ in 0..200 {
            loop {
                let seen = word.load(SeqCst);
                if seen % 2 == own {
                    break;
                }
                match futex_wait(word, seen, Duration::from_secs(30)) {
                    Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            word.fetch_add(1, SeqCst);
            futex_wake(word, 1)?;
        }
        Ok(())
    };
    let child = Child::start(|| turn(1, &page))?;
    turn(0, &page)?;
    child.join()?;
    ensure_eq!(page.get(0), 400, "turns");
    Ok(())
}

/// A mutex of the C library in memory that children share.
struct SharedMutex(Mapping);

impl SharedMutex {
    fn new(priority_inheritance: bool) -> Outcome<Self> {
        let page = Mapping::shared(PAGE)?;
        // SAFETY: the mapping is large enough for both and stays; nobody uses the mutex before it is made.
        unsafe {
            let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
            let attributes = &raw mut attributes;
            zero(libc::pthread_mutexattr_init(attributes))?;
            zero(libc::pthread_mutexattr_setpshared(
                attributes,
                libc::PTHREAD_PROCESS_SHARED,
            ))?;
            if priority_inheritance {
                match libc::pthread_mutexattr_setprotocol(attributes, libc::PTHREAD_PRIO_INHERIT) {
                    libc::ENOTSUP => skip!("no priority inheritance"),
                    other => zero(other)?,
                }
            } else {
                zero(libc::pthread_mutexattr_setrobust(
                    attributes,
                    libc::PTHREAD_MUTEX_ROBUST,
                ))?;
            }
            zero(libc::pthread_mutex_init(page.pointer(0), attributes))?;
        }
        Ok(Self(page))
    }

    fn pointer(&self) -> *mut libc::pthread_mutex_t {
        self.0.pointer(0)
    }

    fn lock(&self) -> c_int {
        // SAFETY: made above, mapped as long as this lives.
        unsafe { libc::pthread_mutex_lock(self.pointer()) }
    }

    fn unlock(&self) -> c_int {
        // SAFETY: as above.
        unsafe { libc::pthread_mutex_unlock(self.pointer()) }
    }
}

fn zero(error: c_int) -> nix::Result<()> {
    match error {
        0 => Ok(()),
        number => Err(Errno::from_raw(number)),
    }
}

fn priority_inheritance() -> Outcome {
    let mutex = SharedMutex::new(true)?;
    let mut children = Vec::new();
    let body = || -> Outcome {
        for round in 0..200 {
            match mutex.lock() {
                libc::ENOSYS | libc::ENOTSUP => skip!("no priority inheritance"),
                other => zero(other)?,
            }
            let seen = mutex.0.get(1024);
            if round % 20 == 0 {
                std::thread::yield_now();
            }
            mutex.0.set(1024, seen + 1);
            zero(mutex.unlock())?;
        }
        Ok(())
    };
    for _ in 0..4 {
        children.push(Child::start(body)?);
    }
    children.into_iter().try_for_each(Child::join)?;
    ensure_eq!(mutex.0.get(1024), 800, "the counter");
    Ok(())
}

fn robust() -> Outcome {
    let mutex = SharedMutex::new(false)?;
    for _ in 0..20 {
        let child = Child::start(|| {
            zero(mutex.lock())?;
            crate::sys::exit(0)
        })?;
        child.join()?;
        ensure_eq!(mutex.lock(), libc::EOWNERDEAD, "a lock whose owner is gone");
        // SAFETY: this process holds it.
        zero(unsafe { libc::pthread_mutex_consistent(mutex.pointer()) })?;
        zero(mutex.unlock())?;
        zero(mutex.lock())?;
        zero(mutex.unlock())?;
    }
    Ok(())
}
