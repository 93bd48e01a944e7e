//! Memory: copies on write, protection, mappings of files.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, MsFlags, ProtFlags};

use crate::check::{Check, Outcome, available, check};
use crate::sys::{Child, Mapping, PAGE, Random, Scratch, raw, rw};
use crate::{ensure, ensure_eq, skip, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("memory.copy-on-write", copy_on_write),
    check("memory.copy-by-kernel", copy_by_kernel),
    check("memory.protect", protect),
    check("memory.remap", remap),
    check("memory.advise", advise),
    check("memory.fixed", fixed),
    check("memory.sparse", sparse),
    check("memory.huge-pages", huge_pages),
    check("memory.code", code),
    check("memory.file-shared", file_shared),
    check("memory.file-private", file_private),
    check("memory.break", program_break),
    check("memory.resident", resident),
    check("memory.locked", locked),
    check("memory.userfault", userfault),
    check("memory.of-others", of_others),
    check("memory.churn", churn),
];

/// Child and parent each see their own, whoever writes first.
fn copy_on_write() -> Outcome {
    const PAGES: usize = 512;
    let memory = Mapping::private(PAGES * PAGE)?;
    let at = |page: usize| page * PAGE + page % 500 * 8;
    (0..PAGES).for_each(|page| memory.set(at(page), page as u64));
    let check = |value: &dyn Fn(u64) -> u64| -> Outcome {
        for page in 0..PAGES {
            ensure_eq!(memory.get(at(page)), value(page as u64), "page {page}");
        }
        Ok(())
    };
    for generation in 0..4u64 {
        let now = move |page| page + generation * 1000;
        let child = Child::start(|| {
            check(&now)?;
            (0..PAGES).for_each(|page| memory.set(at(page), !now(page as u64)));
            // A grandchild, and its end.
            Child::start(|| {
                check(&|page| !now(page))?;
                (0..PAGES).for_each(|page| memory.set(at(page), 5));
                check(&|_| 5)
            })?
            .join()?;
            check(&|page| !now(page))
        })?;
        for page in (0..PAGES).rev() {
            ensure_eq!(
                memory.get(at(page)),
                now(page as u64),
                "page {page} of the parent"
            );
            memory.set(at(page), now(page as u64) + 1000);
        }
        child.join()?;
        check(&|page| now(page) + 1000)?;
    }
    Ok(())
}

/// The kernel writes into memory that is shared until written.
fn copy_by_kernel() -> Outcome {
    let memory = Mapping::private(8 * PAGE)?;
    memory.put(0, &vec![1; 8 * PAGE]);
    let scratch = Scratch::new()?;
    let path = scratch.path("bytes");
    std::fs::write(&path, vec![2; 8 * PAGE])?;
    for _ in 0..5 {
        Child::start(|| {
            let file = File::open(&path)?;
            let read = syscall!(SYS_read, raw(&file), memory.address(), 8 * PAGE)?;
            ensure_eq!(read, 8 * PAGE, "bytes");
            ensure!(
                memory.bytes(0, 8 * PAGE).iter().all(|&byte| byte == 2),
                "the child's bytes"
            );
            Ok(())
        })?
        .join()?;
        ensure!(
            memory.bytes(0, 8 * PAGE).iter().all(|&byte| byte == 1),
            "the parent's bytes"
        );
    }
    Ok(())
}

fn protect() -> Outcome {
    let memory = Mapping::private(64 * PAGE)?;
    for round in 0..20u64 {
        memory.set(0, round);
        memory.protect(0, 64 * PAGE, ProtFlags::PROT_READ)?;
        ensure_eq!(memory.get(0), round, "to read");
        // Every other page, so that the mapping is split and joined again.
        for page in (0..64).step_by(2) {
            memory.protect(page * PAGE, PAGE, rw())?;
            memory.set(page * PAGE, round + page as u64);
        }
        // The kernel heeds it, too.
        let (from, to) = nix::unistd::pipe()?;
        nix::unistd::write(&to, b"12345678")?;
        let refused = syscall!(SYS_read, raw(&from), memory.address() + PAGE, 8);
        ensure_eq!(refused, Err(Errno::EFAULT), "read(2) into a page to read");
        memory.protect(0, 64 * PAGE, ProtFlags::PROT_NONE)?;
        let refused = syscall!(SYS_write, raw(&to), memory.address(), 8);
        ensure_eq!(refused, Err(Errno::EFAULT), "write(2) of a closed page");
        memory.protect(0, 64 * PAGE, rw())?;
        ensure_eq!(memory.get(62 * PAGE), round + 62, "open again");
    }
    Ok(())
}

fn remap() -> Outcome {
    let mut memory = Mapping::private(16 * PAGE)?;
    (0..16).for_each(|page| memory.set(page * PAGE, page as u64 + 7));
    let check = |memory: &Mapping| -> Outcome {
        for page in 0..16 {
            ensure_eq!(memory.get(page * PAGE), page as u64 + 7, "page {page}");
        }
        Ok(())
    };
    let places = [Mapping::private(16 * PAGE)?, Mapping::private(16 * PAGE)?].map(|hole| hole.address());
    for round in 0..20 {
        memory = memory.resize(16 * PAGE, Some(places[round % 2]))?;
        ensure_eq!(memory.address(), places[round % 2], "the new place");
        check(&memory)?;
    }
    memory = memory.resize(300 * PAGE, None)?;
    check(&memory)?;
    ensure_eq!(memory.get(299 * PAGE), 0, "what is new");
    memory = memory.resize(16 * PAGE, None)?;
    check(&memory)
}

fn advise() -> Outcome {
    let memory = Mapping::private(64 * PAGE)?;
    for round in 1..20 {
        (0..64).for_each(|page| memory.set(page * PAGE, round));
        memory.advise(0, 32 * PAGE, MmapAdvise::MADV_DONTNEED)?;
        ensure_eq!(
            (memory.get(31 * PAGE), memory.get(32 * PAGE)),
            (0, round),
            "what is not needed, and the rest"
        );
    }
    (0..64).for_each(|page| memory.set(page * PAGE, 5));
    memory.advise(0, 64 * PAGE, MmapAdvise::MADV_FREE)?;
    for page in 0..64 {
        let found = memory.get(page * PAGE);
        ensure!(
            found == 5 || found == 0,
            "page {page} holds {found} after MADV_FREE"
        );
        memory.set(page * PAGE, 6);
        ensure_eq!(memory.get(page * PAGE), 6, "page {page}");
    }
    memory.advise(0, 64 * PAGE, MmapAdvise::MADV_DONTFORK)?;
    memory.advise(0, 64 * PAGE, MmapAdvise::MADV_DOFORK)?;
    // A child finds zeros.
    match memory.advise(0, PAGE, MmapAdvise::MADV_WIPEONFORK) {
        Err(Errno::EINVAL) => {}
        other => {
            other?;
            Child::start(|| {
                ensure_eq!((memory.get(0), memory.get(PAGE)), (0, 6), "wiped, and the rest");
                Ok(())
            })?
            .join()?;
        }
    }
    Ok(())
}

fn fixed() -> Outcome {
    let hole = Mapping::private(64 * PAGE)?;
    hole.set(8 * PAGE, 1);
    hole.set(16 * PAGE, 2);
    let over = Mapping::at(
        hole.address() + 8 * PAGE,
        PAGE,
        rw(),
        MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED,
    )?;
    ensure_eq!(
        (over.get(0), hole.get(16 * PAGE)),
        (0, 2),
        "the new page and an old one"
    );
    let taken = Mapping::at(
        hole.address(),
        PAGE,
        rw(),
        MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE,
    );
    ensure_eq!(taken.err(), Some(Errno::EEXIST), "a place that is taken");
    // The last page that a program can have, and none behind it.
    let last = (1 << 47) - 2 * PAGE;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE;
    match Mapping::at(last, PAGE, rw(), flags) {
        Err(Errno::EEXIST) => {}
        page => {
            let page = page?;
            page.set(PAGE - 8, 9);
            ensure_eq!(page.get(PAGE - 8), 9, "the last word");
        }
    }
    for address in [
        1 << 47,
        0xffff_8000_0000_0000,
        0xffff_ffff_8100_0000,
        usize::MAX - PAGE + 1,
    ] {
        let refused = Mapping::at(address, PAGE, rw(), MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED).err();
        ensure!(refused.is_some(), "a page at {address:#x}");
    }
    let low = Mapping::new(PAGE, rw(), MapFlags::MAP_PRIVATE | MapFlags::MAP_32BIT)?;
    ensure!(low.address() < 1 << 31, "MAP_32BIT at {:#x}", low.address());
    Ok(())
}

/// One page here and there, so that all levels of page tables come and go.
fn sparse() -> Outcome {
    const SIZE: usize = 1 << 40;
    for _ in 0..3 {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        let memory = match Mapping::new(SIZE, rw(), flags) {
            Err(Errno::ENOMEM) => skip!("no terabyte of addresses"),
            other => other?,
        };
        let places: Vec<usize> = (12..40)
            .flat_map(|bit| [(1usize << bit), SIZE - (1 << bit)])
            .collect();
        places.iter().for_each(|&at| memory.set(at, at as u64));
        for &at in &places {
            ensure_eq!(memory.get(at), at as u64, "a word at {at:#x}");
        }
        memory.punch(SIZE / 4, SIZE / 2)?;
        ensure_eq!(memory.get(SIZE - PAGE), (SIZE - PAGE) as u64, "what is left");
    }
    Ok(())
}

fn huge_pages() -> Outcome {
    const HUGE: usize = 2 << 20;
    let memory = Mapping::private(3 * HUGE)?;
    match memory.advise(0, 3 * HUGE, MmapAdvise::MADV_HUGEPAGE) {
        Err(Errno::EINVAL) => skip!("no transparent huge pages"),
        other => other?,
    }
    (0..3 * HUGE)
        .step_by(PAGE)
        .for_each(|at| memory.set(at, at as u64));
    let child = Child::start(|| {
        (0..3 * HUGE).step_by(2 * PAGE).for_each(|at| memory.set(at, 1));
        Ok(())
    })?;
    child.join()?;
    memory.protect(HUGE, PAGE, ProtFlags::PROT_READ)?;
    memory.advise(HUGE + 8 * PAGE, PAGE, MmapAdvise::MADV_DONTNEED)?;
    for at in (0..3 * HUGE).step_by(PAGE) {
        let expected = if at == HUGE + 8 * PAGE { 0 } else { at as u64 };
        ensure_eq!(memory.get(at), expected, "a word at {at:#x}");
    }
    Ok(())
}

/// Code that is written, run, written again and run again.
fn code() -> Outcome {
    let page = Mapping::new(PAGE, rw() | ProtFlags::PROT_EXEC, MapFlags::MAP_PRIVATE)?;
    for round in 0..500u32 {
        let mut bytes = vec![0xb8]; // mov eax, round; ret
        bytes.extend_from_slice(&round.to_le_bytes());
        bytes.push(0xc3);
        page.put(usize::try_from(round % 64)? * 16, &bytes);
        // SAFETY: what was just written is a function without arguments.
        let function: extern "C" fn() -> u32 =
            unsafe { std::mem::transmute(page.pointer::<u8>(usize::try_from(round % 64)? * 16)) };
        ensure_eq!(function(), round, "what it returns");
    }
    Ok(())
}

fn scratch_file(scratch: &Scratch, pages: usize) -> Outcome<File> {
    let path = scratch.path("file");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    let mut bytes = vec![0; pages * PAGE];
    Random::new(3).fill(&mut bytes);
    file.write_all(&bytes)?;
    file.rewind()?;
    Ok(file)
}

/// Mapping, file and the mapping of a child are one.
fn file_shared() -> Outcome {
    let scratch = Scratch::new()?;
    let mut file = scratch_file(&scratch, 16)?;
    let memory = Mapping::of_file(&file, 16 * PAGE, rw(), MapFlags::MAP_SHARED)?;
    for round in 0..10u64 {
        Child::start(|| {
            memory.set(5 * PAGE + 16, round + 40);
            Ok(())
        })?
        .join()?;
        ensure_eq!(memory.get(5 * PAGE + 16), round + 40, "what a child wrote");
        let mut word = [0; 8];
        file.seek(std::io::SeekFrom::Start(5 * 4096 + 16))?;
        file.read_exact(&mut word)?;
        ensure_eq!(u64::from_le_bytes(word), round + 40, "what is in the file");
        file.seek(std::io::SeekFrom::Start(9 * 4096))?;
        file.write_all(&(round + 50).to_le_bytes())?;
        ensure_eq!(memory.get(9 * PAGE), round + 50, "what was written to the file");
    }
    syscall!(SYS_msync, memory.address(), 16 * PAGE, MsFlags::MS_SYNC.bits())?;
    Ok(())
}

fn file_private() -> Outcome {
    let scratch = Scratch::new()?;
    let mut file = scratch_file(&scratch, 16)?;
    let mut before = Vec::new();
    file.read_to_end(&mut before)?;
    let memory = Mapping::of_file(&file, 16 * PAGE, rw(), MapFlags::MAP_PRIVATE)?;
    ensure!(memory.bytes(0, 16 * PAGE) == before, "what is in the file");
    (0..16).step_by(2).for_each(|page| memory.set(page * PAGE, 1));
    file.seek(std::io::SeekFrom::Start(PAGE as u64))?;
    file.write_all(&[9; 8])?;
    file.rewind()?;
    let mut after = Vec::new();
    file.read_to_end(&mut after)?;
    before[PAGE..PAGE + 8].copy_from_slice(&[9; 8]);
    ensure!(after == before, "the file was changed through a private mapping");
    ensure_eq!((memory.get(0), memory.get(2 * PAGE)), (1, 1), "what was written");
    Ok(())
}

fn program_break() -> Outcome {
    Child::start(|| {
        let start = syscall!(SYS_brk, 0usize)?;
        for round in 1..20usize {
            let end = start + round * 16 * PAGE;
            ensure_eq!(syscall!(SYS_brk, end)?, end, "brk");
            let last = std::ptr::with_exposed_provenance_mut::<u64>((end - 8) & !7);
            // SAFETY: the kernel has just given it, and nothing else uses it.
            unsafe { last.write_volatile(round as u64) };
        }
        ensure_eq!(syscall!(SYS_brk, start)?, start, "brk back");
        crate::sys::exit(0)
    })?
    .join()
}

fn resident() -> Outcome {
    let memory = Mapping::private(16 * PAGE)?;
    (0..16).step_by(3).for_each(|page| memory.set(page * PAGE, 1));
    let mut vector = [0u8; 16];
    syscall!(SYS_mincore, memory.address(), 16 * PAGE, vector.as_mut_ptr())?;
    for (page, flags) in vector.iter().enumerate() {
        ensure_eq!(flags & 1, u8::from(page % 3 == 0), "page {page}");
    }
    let mut pagemap = match File::open("/proc/self/pagemap") {
        Err(_) => skip!("no /proc/self/pagemap"),
        Ok(file) => file,
    };
    pagemap.seek(std::io::SeekFrom::Start((memory.address() / PAGE * 8) as u64))?;
    let mut entries = [0; 16 * 8];
    pagemap.read_exact(&mut entries)?;
    for (page, entry) in entries.chunks_exact(8).enumerate() {
        ensure_eq!(entry[7] >> 7, u8::from(page % 3 == 0), "page {page} in pagemap");
    }
    Ok(())
}

fn locked() -> Outcome {
    let memory = Mapping::private(8 * PAGE)?;
    available("mlock", syscall!(SYS_mlock, memory.address(), 8 * PAGE))?;
    let mut vector = [0u8; 8];
    syscall!(SYS_mincore, memory.address(), 8 * PAGE, vector.as_mut_ptr())?;
    ensure!(
        vector.iter().all(|flags| flags & 1 == 1),
        "locked pages are not there: {vector:?}"
    );
    syscall!(SYS_munlock, memory.address(), 8 * PAGE)?;
    Ok(())
}

/// A program that supplies its pages itself.
fn userfault() -> Outcome {
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
    const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
    const MISSING: u64 = 1;
    const MESSAGE: usize = 32;
    let number = available("userfaultfd", syscall!(SYS_userfaultfd, libc::O_CLOEXEC))?;
    let mut api = [0xaau64, 0, 0];
    syscall!(SYS_ioctl, number, UFFDIO_API, api.as_mut_ptr())?;
    let memory = Mapping::private(8 * PAGE)?;
    let start = memory.address() as u64;
    let mut register = [start, 8 * PAGE as u64, MISSING, 0];
    syscall!(SYS_ioctl, number, UFFDIO_REGISTER, register.as_mut_ptr())?;
    let supplier = std::thread::spawn(move || -> Outcome {
        for _ in 0..8 {
            let mut message = [0u64; MESSAGE / 8];
            ensure_eq!(
                syscall!(SYS_read, number, message.as_mut_ptr(), MESSAGE)?,
                MESSAGE,
                "a message"
            );
            let page = message[2] & !(PAGE as u64 - 1);
            let content = vec![page; PAGE / 8];
            let mut copy = [
                page,
                content.as_ptr().expose_provenance() as u64,
                PAGE as u64,
                0,
                0,
            ];
            syscall!(SYS_ioctl, number, UFFDIO_COPY, copy.as_mut_ptr())?;
        }
        Ok(())
    });
    for page in [3, 1, 4, 0, 5, 2, 6, 7] {
        ensure_eq!(
            memory.get(page * PAGE + 24),
            start + (page * PAGE) as u64,
            "page {page}"
        );
    }
    supplier
        .join()
        .map_err(|_| crate::check::Stop::Fail("a thread panicked".into()))?
}

fn of_others() -> Outcome {
    let memory = Mapping::private(4 * PAGE)?;
    memory.set(PAGE, 1);
    let child = Child::start(|| {
        memory.set(PAGE, 0x5555);
        loop {
            nix::unistd::pause();
        }
    })?;
    let mut word = 0u64;
    let local = [(&raw mut word).expose_provenance(), 8];
    let remote = [memory.address() + PAGE, 8];
    let read = || {
        syscall!(
            SYS_process_vm_readv,
            child.pid.as_raw(),
            local.as_ptr(),
            1,
            remote.as_ptr(),
            1,
            0
        )
    };
    let mut result = Ok(());
    crate::sys::until("the child's word", || {
        result = available("process_vm_readv", read()).map(drop);
        Ok(result.is_err() || word == 0x5555)
    })?;
    nix::sys::signal::kill(child.pid, nix::sys::signal::Signal::SIGKILL)?;
    child.wait()?;
    result
}

/// Mappings of changing size that come and go, each word of them checked.
fn churn() -> Outcome {
    let mut random = Random::new(u64::from(std::process::id()));
    let mut held: Vec<(Mapping, u64)> = Vec::new();
    for round in 0..300u64 {
        if held.len() > 20 || random.below(3) == 0 && !held.is_empty() {
            let (memory, stamp) = held.swap_remove(random.below(held.len()));
            for at in (0..memory.length()).step_by(PAGE) {
                ensure_eq!(memory.get(at), stamp ^ at as u64, "round {round}, {at:#x}");
            }
        } else {
            let memory = Mapping::private((1 + random.below(40)) * PAGE)?;
            for at in (0..memory.length()).step_by(PAGE) {
                ensure_eq!(memory.get(at + 8), 0, "a fresh page");
                memory.set(at, round ^ at as u64);
            }
            held.push((memory, round));
        }
    }
    Ok(())
}
