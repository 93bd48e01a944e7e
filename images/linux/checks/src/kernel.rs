//! Services that a kernel may be built without: barriers, restartable sequences, asynchronous I/O.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use nix::errno::Errno;
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::mman::MapFlags;
use nix::sys::signal::{SaFlags, Signal};

use crate::check::{Check, Outcome, available, check};
use crate::sys::{Child, Mapping, PAGE, Scratch, handle, now, raw, rw};
use crate::{ensure, ensure_eq, skip, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("kernel.membarrier", membarrier),
    check("kernel.restartable-sequence", restartable_sequence),
    check("kernel.asynchronous-io", asynchronous_io),
    check("kernel.io-uring", io_uring),
    check("kernel.memfd", memfd),
    check("kernel.random", random),
    check("kernel.inotify", inotify),
];

fn membarrier() -> Outcome {
    const QUERY: c_int = 0;
    const GLOBAL: c_int = 1;
    const PRIVATE: c_int = 1 << 3;
    const REGISTER_PRIVATE: c_int = 1 << 4;
    const PRIVATE_SYNC_CORE: c_int = 1 << 5;
    const REGISTER_PRIVATE_SYNC_CORE: c_int = 1 << 6;
    let commands = available("membarrier", syscall!(SYS_membarrier, QUERY, 0, 0))?;
    let has = |command: c_int| commands & usize::try_from(command).unwrap_or(0) != 0;
    ensure!(has(PRIVATE) && has(REGISTER_PRIVATE), "commands {commands:#x}");
    ensure_eq!(
        syscall!(SYS_membarrier, PRIVATE, 0, 0),
        Err(Errno::EPERM),
        "before it is registered"
    );
    for (register, command) in [
        (REGISTER_PRIVATE, PRIVATE),
        (REGISTER_PRIVATE_SYNC_CORE, PRIVATE_SYNC_CORE),
        (QUERY, GLOBAL),
    ] {
        if !has(command) {
            continue;
        }
        syscall!(SYS_membarrier, register, 0, 0)?;
        let word = AtomicU64::new(0);
        std::thread::scope(|scope| -> Outcome {
            scope.spawn(|| {
                while word.load(SeqCst) < 20 {
                    std::thread::yield_now();
                }
            });
            for round in 1..=20 {
                word.store(round, SeqCst);
                syscall!(SYS_membarrier, command, 0, 0)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

unsafe extern "C" {
    /// Of the C library: where a thread's area lies from its pointer, and how large it is if it is registered.
    static __rseq_offset: isize;
    static __rseq_size: u32;
}

#[repr(C, align(32))]
struct CriticalSection {
    version: u32,
    flags: u32,
    start: u64,
    length: u64,
    abort: u64,
}

/// A sequence that a signal interrupts begins anew.
fn restartable_sequence() -> Outcome {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        COUNT.fetch_add(1, SeqCst);
    }
    // SAFETY: set when the program starts.
    let (offset, size) = unsafe { (__rseq_offset, __rseq_size) };
    if size == 0 {
        skip!("no restartable sequences");
    }
    let area: usize;
    // SAFETY: the thread's own pointer is its first word.
    unsafe { std::arch::asm!("mov {}, fs:[0]", out(reg) area) };
    let area = area.wrapping_add_signed(offset);
    // SAFETY: the area is there as long as the thread; the second word of it is the CPU's number.
    let cpu = unsafe { std::ptr::with_exposed_provenance::<u32>(area + 4).read_volatile() };
    ensure!(cpu < 64, "on CPU {cpu}");
    handle(Signal::SIGALRM, SaFlags::SA_RESTART, count)?;
    let period = libc::timeval {
        tv_sec: 0,
        tv_usec: 1500,
    };
    let timer = libc::itimerval {
        it_interval: period,
        it_value: period,
    };
    syscall!(SYS_setitimer, libc::ITIMER_REAL, &raw const timer, 0usize)?;
    let mut section = CriticalSection {
        version: 0,
        flags: 0,
        start: 0,
        length: 0,
        abort: 0,
    };
    let (mut aborted, mut done) = (0u64, 0u64);
    let deadline = now()? + std::time::Duration::from_secs(30);
    while aborted < 5 {
        ensure!(
            now()? < deadline,
            "{done} sequences, {} signals, {aborted} aborted",
            COUNT.load(SeqCst)
        );
        let again: u64;
        // SAFETY: describes the sequence, points the area at it, and takes it away at its end; before the place where an
        // aborted one goes on is the signature that the C library has registered.
        unsafe {
            std::arch::asm!(
                "lea {scratch}, [rip + 2f]", "mov [{section} + 8], {scratch}",
                "lea {scratch}, [rip + 4f]", "mov [{section} + 24], {scratch}",
                "lea {scratch}, [rip + 3f]", "sub {scratch}, [{section} + 8]", "mov [{section} + 16], {scratch}",
                "xor {again:e}, {again:e}",
                "mov [{area} + 8], {section}",
                "2:", "mov ecx, 20000", "6:", "pause", "dec ecx", "jnz 6b",
                "3:", "jmp 5f",
                ".byte 0x0f, 0xb9, 0x3d", ".long 0x53053053",
                "4:", "mov {again:e}, 1",
                "5:", "mov qword ptr [{area} + 8], 0",
                scratch = out(reg) _, section = in(reg) &raw mut section, area = in(reg) area, again = out(reg) again, out("ecx") _
            );
        }
        aborted += again;
        done += 1 - again;
    }
    Ok(())
}

/// As the kernel has them (io_submit(2)).
#[repr(C)]
#[derive(Debug, Default)]
struct ControlBlock {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    more: [u32; 2],
}

fn asynchronous_io() -> Outcome {
    const READ: u16 = 0;
    const WRITE: u16 = 1;
    let mut context = 0usize;
    available("io_setup", syscall!(SYS_io_setup, 16, &raw mut context))?;
    let scratch = Scratch::new()?;
    let path = scratch.path("file");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    let number = raw(&file).unsigned_abs();
    for round in 0..10u64 {
        for opcode in [WRITE, READ] {
            let buffers: Vec<Mapping> = (0..8)
                .map(|_| Mapping::private(PAGE))
                .collect::<nix::Result<_>>()?;
            if opcode == WRITE {
                buffers
                    .iter()
                    .zip(0..)
                    .for_each(|(buffer, part)| buffer.set(8, round * 100 + part));
            }
            let blocks: Vec<ControlBlock> = buffers
                .iter()
                .zip(0u32..)
                .map(|(buffer, part)| ControlBlock {
                    data: part.into(),
                    opcode,
                    file: number,
                    buffer: buffer.address() as u64,
                    length: PAGE as u64,
                    offset: i64::from(part) * 4096,
                    ..ControlBlock::default()
                })
                .collect();
            let pointers: Vec<*const ControlBlock> = blocks.iter().map(std::ptr::from_ref).collect();
            ensure_eq!(
                syscall!(SYS_io_submit, context, 8, pointers.as_ptr())?,
                8,
                "submitted"
            );
            let mut events = [[0u64; 4]; 8];
            ensure_eq!(
                syscall!(SYS_io_getevents, context, 8, 8, events.as_mut_ptr(), 0usize)?,
                8,
                "completed"
            );
            for event in events {
                ensure_eq!(event[2], PAGE as u64, "bytes of part {}", event[0]);
            }
            for (buffer, part) in buffers.iter().zip(0..) {
                ensure_eq!(buffer.get(8), round * 100 + part, "part {part} of round {round}");
            }
        }
    }
    syscall!(SYS_io_destroy, context)?;
    Ok(())
}

/// The rings that programs and kernel share (io_uring_setup(2)).
#[derive(Debug)]
struct Ring {
    file: OwnedFd,
    rings: Mapping,
    entries: Mapping,
    /// Of the submission queue: tail, mask, array. Of the completion queue: head, tail, mask, entries.
    submissions: [usize; 3],
    completions: [usize; 4],
}

impl Ring {
    fn new(size: u32) -> Outcome<Self> {
        const SINGLE_MMAP: u32 = 1;
        const ENTRIES: libc::off_t = 0x1000_0000;
        let mut parameters = [0u32; 30];
        let number = match syscall!(SYS_io_uring_setup, size, parameters.as_mut_ptr()) {
            Err(error @ (Errno::ENOSYS | Errno::EPERM)) => skip!("io_uring_setup: {error}"),
            other => other?,
        };
        // SAFETY: the kernel has just made it for this process.
        let file = unsafe { OwnedFd::from_raw_fd(c_int::try_from(number)?) };
        ensure!(parameters[5] & SINGLE_MMAP != 0, "features {:#x}", parameters[5]);
        let word = |index: usize| usize::try_from(parameters[index]).unwrap_or(0);
        // Offsets of both queues begin at words 10 and 20.
        let length = (word(16) + word(0) * 4).max(word(25) + word(1) * 16);
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        let rings = Mapping::of_file(&file, length, rw(), flags)?;
        let entries = Mapping::of_file_at(&file, word(0) * 64, rw(), flags, ENTRIES)?;
        Ok(Self {
            file,
            rings,
            entries,
            submissions: [word(11), word(12), word(16)],
            completions: [word(20), word(21), word(22), word(25)],
        })
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        self.rings.atomic(offset)
    }

    fn push(&self, entry: &[u64; 8]) -> Outcome {
        let [tail, mask, array] = self.submissions;
        let at = self.word(tail).load(SeqCst);
        let index = at & self.word(mask).load(SeqCst);
        let bytes: Vec<u8> = entry.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.entries.put(usize::try_from(index)? * 64, &bytes);
        self.word(array + usize::try_from(index)? * 4)
            .store(index, SeqCst);
        self.word(tail).store(at.wrapping_add(1), SeqCst);
        Ok(())
    }

    /// Hands all over, and takes so many results: what they were tagged with, and the result.
    fn submit(&self, count: u32) -> Outcome<Vec<(u64, i32)>> {
        const GET_EVENTS: u32 = 1;
        let mut results = Vec::new();
        let mut handed = count;
        while results.len() < usize::try_from(count)? {
            crate::sys::retry(|| {
                let number = raw(&self.file);
                syscall!(SYS_io_uring_enter, number, handed, 1, GET_EVENTS, 0usize, 0)
            })?;
            handed = 0;
            let [head, tail, mask, entries] = self.completions;
            let mut at = self.word(head).load(SeqCst);
            while at != self.word(tail).load(SeqCst) {
                let index = usize::try_from(at & self.word(mask).load(SeqCst))?;
                let [low, high, result] =
                    [0, 4, 8].map(|part| self.word(entries + index * 16 + part).load(SeqCst));
                results.push((u64::from(high) << 32 | u64::from(low), result.cast_signed()));
                at = at.wrapping_add(1);
            }
            self.word(head).store(at, SeqCst);
        }
        results.sort_unstable();
        Ok(results)
    }
}

fn io_uring() -> Outcome {
    const NOP: u64 = 0;
    const TIMEOUT: u64 = 11;
    const READ: u64 = 22;
    const WRITE: u64 = 23;
    let ring = Ring::new(16)?;
    for round in 0..20 {
        for tag in 0..10 {
            ring.push(&[NOP, 0, 0, 0, round * 100 + tag, 0, 0, 0])?;
        }
        let expected: Vec<_> = (0..10).map(|tag| (round * 100 + tag, 0)).collect();
        ensure_eq!(ring.submit(10)?, expected, "results of nothing");
    }
    let scratch = Scratch::new()?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(scratch.path("file"))?;
    let number = u64::from(raw(&file).unsigned_abs()) << 32;
    let buffers = Mapping::private(8 * PAGE)?;
    let page = PAGE as u64;
    for round in 1..10u64 {
        for (opcode, stamp) in [(WRITE, round), (READ, 0)] {
            (0..8).for_each(|part| buffers.set(part * PAGE, stamp * (part as u64 + 1)));
            for part in 0..8 {
                let address = buffers.address() as u64 + part * page;
                ring.push(&[opcode | number, part * page, address, page, part, 0, 0, 0])?;
            }
            let expected: Vec<_> = (0..8).map(|part| (part, 4096)).collect();
            ensure_eq!(ring.submit(8)?, expected, "results of operation {opcode}");
        }
        for part in 0..8 {
            ensure_eq!(buffers.get(part * PAGE), round * (part as u64 + 1), "part {part}");
        }
    }
    // A pipe that is read before it is written.
    let (from, to) = std::io::pipe()?;
    let from = u64::from(raw(&from).unsigned_abs()) << 32;
    ring.push(&[READ | from, u64::MAX, buffers.address() as u64, 5, 7, 0, 0, 0])?;
    let writer = Child::start(|| Ok((&to).write_all(b"later")?))?;
    ensure_eq!(ring.submit(1)?, [(7, 5)], "a read of a pipe");
    writer.join()?;
    let start = now()?;
    let time = [0u64, 20_000_000];
    let address = time.as_ptr().expose_provenance() as u64;
    ring.push(&[TIMEOUT, 0, address, 1, 9, 0, 0, 0])?;
    ensure_eq!(ring.submit(1)?, [(9, -libc::ETIME)], "a timeout");
    ensure!(
        now()? - start >= std::time::Duration::from_millis(20),
        "it is early"
    );
    Ok(())
}

fn memfd() -> Outcome {
    let number = available(
        "memfd_create",
        syscall!(SYS_memfd_create, c"checks".as_ptr(), libc::MFD_ALLOW_SEALING),
    )?;
    // SAFETY: the kernel has just made it for this process.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(c_int::try_from(number)?) });
    file.set_len(4 * PAGE as u64)?;
    let memory = Mapping::of_file(&file, 4 * PAGE, rw(), MapFlags::MAP_SHARED)?;
    memory.set(PAGE, 77);
    let mut word = [0; 8];
    file.read_exact_at(&mut word, PAGE as u64)?;
    ensure_eq!(u64::from_le_bytes(word), 77, "in the file");
    syscall!(
        SYS_fcntl,
        raw(&file),
        libc::F_ADD_SEALS,
        libc::F_SEAL_SHRINK | libc::F_SEAL_GROW
    )?;
    for size in [1, 100_000] {
        let refused = file.set_len(size).err().and_then(|error| error.raw_os_error());
        ensure_eq!(refused, Some(libc::EPERM), "another size, sealed");
    }
    let busy = syscall!(SYS_fcntl, raw(&file), libc::F_ADD_SEALS, libc::F_SEAL_WRITE);
    ensure_eq!(
        busy,
        Err(Errno::EBUSY),
        "sealed against writing while it is mapped so"
    );
    drop(memory);
    syscall!(SYS_fcntl, raw(&file), libc::F_ADD_SEALS, libc::F_SEAL_WRITE)?;
    ensure_eq!(
        (&file).write(b"x").err().and_then(|error| error.raw_os_error()),
        Some(libc::EPERM),
        "sealed"
    );
    Ok(())
}

fn random() -> Outcome {
    let mut seen = std::collections::HashSet::new();
    for _ in 0..200 {
        let mut bytes = [0u8; 16];
        ensure_eq!(syscall!(SYS_getrandom, bytes.as_mut_ptr(), 16, 0)?, 16, "bytes");
        ensure!(seen.insert(bytes), "the same random bytes again");
    }
    // A child's are others.
    let shared = Mapping::shared(PAGE)?;
    let child = Child::start(|| {
        syscall!(SYS_getrandom, shared.address(), 8, 0)?;
        Ok(())
    })?;
    child.join()?;
    syscall!(SYS_getrandom, shared.address() + 8, 8, 0)?;
    ensure!(shared.get(0) != shared.get(8), "a child's random bytes");
    Ok(())
}

fn inotify() -> Outcome {
    let scratch = Scratch::new()?;
    let watcher = available("inotify", Inotify::init(InitFlags::IN_NONBLOCK))?;
    watcher.add_watch(scratch.directory(), AddWatchFlags::IN_ALL_EVENTS)?;
    fs::write(scratch.path("first"), b"text")?;
    fs::rename(scratch.path("first"), scratch.path("second"))?;
    fs::remove_file(scratch.path("second"))?;
    let events = watcher.read_events()?;
    let has = |flag: AddWatchFlags, name: &str| {
        let named = |event: &&nix::sys::inotify::InotifyEvent| event.name.as_deref() == Some(name.as_ref());
        events.iter().filter(named).any(|event| event.mask.contains(flag))
    };
    for (flag, name) in [
        (AddWatchFlags::IN_CREATE, "first"),
        (AddWatchFlags::IN_MODIFY, "first"),
        (AddWatchFlags::IN_CLOSE_WRITE, "first"),
        (AddWatchFlags::IN_MOVED_FROM, "first"),
        (AddWatchFlags::IN_MOVED_TO, "second"),
        (AddWatchFlags::IN_DELETE, "second"),
    ] {
        ensure!(has(flag, name), "{flag:?} of {name} is missing");
    }
    ensure_eq!(watcher.read_events().err(), Some(Errno::EAGAIN), "more events");
    Ok(())
}
