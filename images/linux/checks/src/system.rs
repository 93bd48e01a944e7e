//! What the kernel says of itself and of the CPU, and whether it is true.

use std::arch::x86_64::{__cpuid_count, CpuidResult};
use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::unistd::getpid;

use crate::check::{Check, Outcome, check};
use crate::sys::{Child, Mapping, PAGE, now, until};
use crate::{ensure, ensure_eq, skip, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("system.processor", processor),
    check("system.processor-number", processor_number),
    check("system.processor-features", processor_features),
    check("proc.maps", maps),
    check("proc.stat", stat),
    check("proc.memory", memory),
    check("proc.interrupts", interrupts),
    check("proc.command-line", command_line),
    check("proc.descriptors", descriptors),
    check("proc.read-all", read_all),
];

fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

fn field(text: &str, name: &str) -> Option<String> {
    let line = text
        .lines()
        .find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// /proc/cpuinfo agrees with the CPUID instruction.
fn processor() -> Outcome {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let vendor = cpuid(0, 0);
    let vendor: Vec<u8> = [vendor.ebx, vendor.edx, vendor.ecx]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    ensure_eq!(
        field(&text, "vendor_id").unwrap_or_default().as_bytes(),
        &vendor[..],
        "the vendor"
    );
    let signature = cpuid(1, 0).eax;
    let (base, extended) = (signature >> 8 & 0xf, signature >> 20 & 0xff);
    let family = if base == 15 { base + extended } else { base };
    ensure_eq!(field(&text, "cpu family"), Some(family.to_string()), "the family");
    ensure_eq!(
        field(&text, "stepping"),
        Some((signature & 0xf).to_string()),
        "the stepping"
    );
    // What programs may rely on is the same to both.
    let flags = field(&text, "flags").unwrap_or_default();
    let flags: HashSet<&str> = flags.split(' ').collect();
    let (one, seven) = (cpuid(1, 0), cpuid(7, 0));
    let features = [
        ("sse2", one.edx, 26),
        ("ssse3", one.ecx, 9),
        ("fma", one.ecx, 12),
        ("cx16", one.ecx, 13),
        ("sse4_1", one.ecx, 19),
        ("sse4_2", one.ecx, 20),
        ("popcnt", one.ecx, 23),
        ("aes", one.ecx, 25),
        ("xsave", one.ecx, 26),
        ("avx", one.ecx, 28),
        ("f16c", one.ecx, 29),
        ("rdrand", one.ecx, 30),
        ("bmi1", seven.ebx, 3),
        ("avx2", seven.ebx, 5),
        ("bmi2", seven.ebx, 8),
        ("avx512f", seven.ebx, 16),
        ("avx512bw", seven.ebx, 30),
        ("sha_ni", seven.ebx, 29),
        ("gfni", seven.ecx, 8),
        ("vaes", seven.ecx, 9),
    ];
    for (name, word, bit) in features {
        ensure_eq!(
            flags.contains(name),
            word >> bit & 1 == 1,
            "{name} in /proc/cpuinfo, and by CPUID"
        );
    }
    Ok(())
}

/// What CPUID promises works.
fn processor_features() -> Outcome {
    use std::arch::x86_64 as x86;
    let one = cpuid(1, 0);
    if one.ecx >> 27 & 1 == 0 {
        skip!("no OSXSAVE");
    }
    let (low, high): (u32, u32);
    // SAFETY: OSXSAVE says that it is allowed.
    unsafe { std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high) };
    ensure!(low & 3 == 3 && high == 0, "XCR0 is {high:#x}:{low:#x}");
    let avx = one.ecx >> 28 & 1 == 1;
    ensure_eq!(low & 4 != 0, avx, "AVX in XCR0, and by CPUID");
    ensure_eq!(cpuid(0xd, 0).ebx >= 576, true, "the size of its state");
    if is_x86_feature_detected!("popcnt") {
        // SAFETY: just asked for.
        ensure_eq!(unsafe { popcnt(0x7f00_ff00_ff00_ff01) }, 32, "popcnt");
    }
    if is_x86_feature_detected!("sse4.2") {
        // SAFETY: just asked for.
        ensure_eq!(unsafe { crc(!0, 0) }, !0x48674bc7, "crc32");
    }
    if is_x86_feature_detected!("rdrand") {
        let mut seen = HashSet::new();
        for _ in 0..20 {
            let mut word = 0;
            // SAFETY: just asked for.
            let mut ready = || unsafe { rdrand(&mut word) } == 1;
            until("a random number", || Ok(ready()))?;
            ensure!(seen.insert(word), "the same random number again");
        }
    }
    #[target_feature(enable = "popcnt")]
    fn popcnt(word: i64) -> i32 {
        x86::_popcnt64(word)
    }
    #[target_feature(enable = "sse4.2")]
    fn crc(start: u32, word: u32) -> u32 {
        x86::_mm_crc32_u32(start, word)
    }
    #[target_feature(enable = "rdrand")]
    fn rdrand(word: &mut u64) -> i32 {
        x86::_rdrand64_step(word)
    }
    Ok(())
}

fn processor_number() -> Outcome {
    let count = fs::read_to_string("/proc/cpuinfo")?
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let mut set = [0u64; 16];
    syscall!(SYS_sched_getaffinity, 0, 128, set.as_mut_ptr())?;
    let allowed: u32 = set.iter().map(|word| word.count_ones()).sum();
    ensure!(
        usize::try_from(allowed)? <= count,
        "{allowed} CPUs allowed of {count}"
    );
    for _ in 0..100 {
        let (mut number, mut node) = (u32::MAX, u32::MAX);
        syscall!(SYS_getcpu, &raw mut number, &raw mut node, 0usize)?;
        ensure!(usize::try_from(number)? < count, "on CPU {number} of {count}");
        // SAFETY: no pointers.
        let library = unsafe { libc::sched_getcpu() };
        ensure!(
            usize::try_from(library)? < count,
            "on CPU {library} of {count} by the C library"
        );
        nix::sched::sched_yield()?;
    }
    Ok(())
}

fn maps() -> Outcome {
    let memory = Mapping::private(4 * PAGE)?;
    memory.protect(PAGE, PAGE, ProtFlags::PROT_READ)?;
    memory.protect(2 * PAGE, PAGE, ProtFlags::PROT_NONE)?;
    let text = fs::read_to_string("/proc/self/maps")?;
    let mut last = 0;
    let mut protection = HashMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (start, end) = words
            .next()
            .and_then(|range| range.split_once('-'))
            .unwrap_or_default();
        let bounds = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16));
        let (Ok(start), Ok(end)) = bounds else {
            ensure!(false, "no range in '{line}'");
            continue;
        };
        ensure!(last <= start && start < end, "out of order: '{line}'");
        last = end;
        let word = words.next().unwrap_or_default().to_owned();
        for page in 0..4 {
            let address = (memory.address() + page * PAGE) as u64;
            if (start..end).contains(&address) {
                protection.insert(page, word.clone());
            }
        }
    }
    for (page, expected) in ["rw-p", "r--p", "---p", "rw-p"].iter().enumerate() {
        ensure_eq!(
            protection.get(&page).map(String::as_str),
            Some(*expected),
            "page {page}"
        );
    }
    ensure!(
        text.contains("[stack]") && text.contains("[vdso]"),
        "no stack or no vdso"
    );
    Ok(())
}

fn stat() -> Outcome {
    let text = fs::read_to_string("/proc/self/stat")?;
    let (head, rest) = text.rsplit_once(") ").unwrap_or_default();
    ensure!(head.starts_with(&format!("{} (", getpid())), "'{head}'");
    let words: Vec<&str> = rest.split_whitespace().collect();
    ensure_eq!(words.first().copied(), Some("R"), "the state");
    ensure_eq!(
        words.get(1).map(ToString::to_string),
        Some(nix::unistd::getppid().to_string()),
        "the parent"
    );
    let ticks = || -> u64 {
        let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let words = text
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split(' ').collect::<Vec<_>>());
        words.map_or(0, |words| {
            words[11..13]
                .iter()
                .filter_map(|word| word.parse::<u64>().ok())
                .sum()
        })
    };
    let before = ticks();
    let deadline = now()? + std::time::Duration::from_secs(30);
    while ticks() < before + 5 {
        ensure!(now()? < deadline, "its CPU time stands still at {before}");
    }
    let status = fs::read_to_string("/proc/self/status")?;
    ensure_eq!(field(&status, "Pid"), Some(getpid().to_string()), "the process");
    ensure_eq!(field(&status, "Threads"), Some("1".to_owned()), "threads");
    let child = Child::start(|| {
        loop {
            nix::unistd::pause();
        }
    })?;
    until("a child that sleeps", || {
        let text = fs::read_to_string(format!("/proc/{}/stat", child.pid))?;
        Ok(text.contains(") S "))
    })?;
    nix::sys::signal::kill(child.pid, nix::sys::signal::Signal::SIGKILL)?;
    let dead = || Ok(fs::read_to_string(format!("/proc/{}/stat", child.pid))?.contains(") Z "));
    until("a child that is dead", dead)?;
    child.wait()?;
    ensure!(
        !Path::new(&format!("/proc/{}", child.pid)).exists(),
        "a child that is gone"
    );
    Ok(())
}

fn memory() -> Outcome {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| -> u64 {
        let value = field(&text, name).unwrap_or_default();
        value.trim_end_matches(" kB").parse().unwrap_or(0)
    };
    let (total, free) = (kib("MemTotal"), kib("MemFree"));
    ensure!(
        total > 10_000 && free > 0 && free < total,
        "{free} KiB free of {total}"
    );
    let pages = || -> Outcome<u64> {
        let text = fs::read_to_string("/proc/self/statm")?;
        Ok(text
            .split(' ')
            .nth(1)
            .and_then(|word| word.parse().ok())
            .unwrap_or(0))
    };
    let before = pages()?;
    let memory = Mapping::new(1024 * PAGE, crate::sys::rw(), MapFlags::MAP_PRIVATE)?;
    (0..1024).for_each(|page| memory.set(page * PAGE, 1));
    let after = pages()?;
    ensure!(
        (900..1200).contains(&after.saturating_sub(before)),
        "{before} pages resident, then {after}"
    );
    drop(memory);
    ensure!(
        pages()? < after - 900,
        "{after} pages resident, then {}",
        pages()?
    );
    Ok(())
}

/// They are counted.
fn interrupts() -> Outcome {
    let total = || -> Outcome<u64> {
        let text = fs::read_to_string("/proc/stat")?;
        let line = text.lines().find_map(|line| line.strip_prefix("intr "));
        Ok(line
            .and_then(|line| line.split(' ').next()?.parse().ok())
            .unwrap_or(0))
    };
    let listed = fs::read_to_string("/proc/interrupts")?;
    ensure!(listed.lines().count() > 3, "/proc/interrupts: {listed}");
    let before = total()?;
    until("interrupts", || Ok(total()? > before + 5))
}

fn command_line() -> Outcome {
    let output = std::process::Command::new(crate::processes::SELF)
        .args(["cat", "a b", ""])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn();
    let mut child = output?;
    let read = |name: &str| fs::read(format!("/proc/{}/{name}", child.id()));
    let expected = [crate::processes::SELF, "cat", "a b", ""].join("\0") + "\0";
    let mut seen = Vec::new();
    until("the new program", || {
        seen = read("cmdline")?;
        Ok(seen == expected.as_bytes())
    })?;
    ensure!(
        !read("environ")?.is_empty() || std::env::vars_os().next().is_none(),
        "the environment"
    );
    ensure!(read("auxv")?.len() > 100, "the auxiliary vector");
    drop(child.stdin.take());
    ensure!(child.wait()?.success(), "its end");
    let version = fs::read_to_string("/proc/version")?;
    let name = nix::sys::utsname::uname()?;
    ensure!(version.contains(&*name.release().to_string_lossy()), "{version}");
    Ok(())
}

fn descriptors() -> Outcome {
    let names = || -> Outcome<usize> { Ok(fs::read_dir("/proc/self/fd")?.count()) };
    let before = names()?;
    let (from, to) = std::io::pipe()?;
    ensure_eq!(names()?, before + 2, "descriptors");
    let link = |file: &std::os::fd::BorrowedFd<'_>| {
        fs::read_link(format!("/proc/self/fd/{}", crate::sys::raw(file)))
    };
    use std::os::fd::AsFd as _;
    ensure_eq!(link(&from.as_fd())?, link(&to.as_fd())?, "both ends of a pipe");
    drop((from, to));
    ensure_eq!(names()?, before, "descriptors");
    Ok(())
}

/// Everything in /proc and /sys can be read without harm, whatever it says.
fn read_all() -> Outcome {
    const MAX_BYTES: usize = 1 << 16;
    /// Those that wait for something to happen, or take what others should read.
    const WAITING: &[&str] = &[
        "kmsg",
        "event",
        "trace_pipe",
        "mem",
        "clear_refs",
        "task",
        "map_files",
        "kcore",
    ];
    fn walk(directory: &Path, depth: usize, read: &mut usize) {
        let Ok(entries) = fs::read_dir(directory) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let Ok(kind) = entry.file_type() else { continue };
            let process = directory == Path::new("/proc") && name.parse::<u32>().is_ok();
            if WAITING.contains(&&*name) || process {
                continue;
            }
            if kind.is_dir() && depth > 0 {
                walk(&entry.path(), depth - 1, read);
            } else if kind.is_file() {
                let file = OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(entry.path());
                *read += usize::from(file.is_ok_and(|file| look(&file)));
            }
        }
    }
    fn look(file: &File) -> bool {
        let mut bytes = vec![0; MAX_BYTES];
        (&*file).read(&mut bytes).is_ok()
    }
    let mut read = 0;
    walk(Path::new("/proc"), 3, &mut read);
    walk(Path::new("/proc/self"), 2, &mut read);
    walk(Path::new("/sys"), 3, &mut read);
    ensure!(read > 20, "{read} files could be read");
    Ok(())
}
