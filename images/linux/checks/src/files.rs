//! Files, their names and their locks.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::libc;

use crate::check::{Check, Outcome, check};
use crate::sys::{Child, Mapping, PAGE, Random, Scratch, raw};
use crate::{ensure, ensure_eq, skip, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("files.read-and-write", read_and_write),
    check("files.append", append),
    check("files.holes", holes),
    check("files.names", names),
    check("files.locks", locks),
];

fn read_and_write() -> Outcome {
    let scratch = Scratch::new()?;
    let path = scratch.path("file");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    let mut model = vec![0u8; 200_000];
    file.set_len(model.len() as u64)?;
    let mut random = Random::new(12);
    for _ in 0..300 {
        let at = random.below(model.len() - 5000);
        let length = random.below(5000);
        if random.below(2) == 0 {
            random.fill(&mut model[at..at + length]);
            file.write_all_at(&model[at..at + length], at as u64)?;
        } else {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, at as u64)?;
            ensure!(bytes == model[at..at + length], "{length} bytes at {at}");
        }
    }
    let mut all = Vec::new();
    (&file).seek(SeekFrom::Start(0))?;
    (&file).read_to_end(&mut all)?;
    ensure!(all == model, "the file");
    Ok(())
}

/// Of several processes to one file: no line is lost.
fn append() -> Outcome {
    let scratch = Scratch::new()?;
    let path = scratch.path("log");
    let mut children = Vec::new();
    for writer in 0..4 {
        let path = path.clone();
        children.push(Child::start(move || {
            let mut file = OpenOptions::new().append(true).create(true).open(path)?;
            for line in 0..100 {
                file.write_all(format!("{writer} {line:05}\n").as_bytes())?;
            }
            Ok(())
        })?);
    }
    children.into_iter().try_for_each(Child::join)?;
    let text = fs::read_to_string(&path)?;
    for writer in 0..4 {
        let own: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with(&writer.to_string()))
            .collect();
        let expected: Vec<String> = (0..100).map(|line| format!("{writer} {line:05}")).collect();
        ensure!(own == expected, "the lines of writer {writer}");
    }
    Ok(())
}

fn holes() -> Outcome {
    let scratch = Scratch::new()?;
    let mut file = File::create_new(scratch.path("file"))?;
    let page = PAGE as u64;
    file.write_all(&[7; 8 * PAGE])?;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(&file, punch, 2 * 4096, 3 * 4096) {
        Err(Errno::EOPNOTSUPP) => skip!("this file system has no holes"),
        other => other?,
    }
    let text = fs::read(scratch.path("file"))?;
    let zeros = text.iter().take_while(|&&byte| byte == 7).count();
    ensure_eq!(
        (text.len(), zeros, text[5 * PAGE - 1], text[5 * PAGE]),
        (8 * PAGE, 2 * PAGE, 0, 7),
        "the hole"
    );
    ensure!(
        file.metadata()?.blocks() * 512 <= 6 * page,
        "{} blocks",
        file.metadata()?.blocks()
    );
    file.set_len(1 << 40)?;
    ensure_eq!(file.metadata()?.len(), 1 << 40, "a terabyte of nothing");
    Ok(())
}

fn names() -> Outcome {
    let scratch = Scratch::new()?;
    let directory = scratch.path("directory");
    fs::create_dir(&directory)?;
    for number in 0..300 {
        fs::write(directory.join(format!("file {number}")), number.to_string())?;
    }
    ensure_eq!(fs::read_dir(&directory)?.count(), 300, "names");
    for number in (0..300).step_by(2) {
        fs::rename(
            directory.join(format!("file {number}")),
            directory.join(format!("file {}", number + 1)),
        )?;
    }
    let mut names: Vec<_> = fs::read_dir(&directory)?.collect::<Result<_, _>>()?;
    names.sort_by_key(|entry| entry.file_name());
    ensure_eq!(names.len(), 150, "names after renaming over others");
    ensure_eq!(
        fs::read_to_string(directory.join("file 7"))?,
        "6",
        "what was renamed"
    );
    fs::hard_link(directory.join("file 7"), directory.join("link"))?;
    ensure_eq!(fs::metadata(directory.join("link"))?.nlink(), 2, "links");
    symlink("file 7", directory.join("symbolic"))?;
    ensure_eq!(
        fs::read_to_string(directory.join("symbolic"))?,
        "6",
        "through a link"
    );
    symlink("itself", directory.join("itself"))?;
    let circle = fs::read(directory.join("itself"))
        .err()
        .and_then(|error| error.raw_os_error());
    ensure_eq!(circle, Some(libc::ELOOP), "a circle");
    let held = File::open(directory.join("file 9"))?;
    fs::remove_dir_all(&directory)?;
    let mut text = String::new();
    (&held).read_to_string(&mut text)?;
    ensure_eq!(text, "8", "a file without a name");
    Ok(())
}

fn locks() -> Outcome {
    let scratch = Scratch::new()?;
    let path = scratch.path("lock");
    File::create(&path)?;
    let shared = Mapping::shared(PAGE)?;
    let mut children = Vec::new();
    for _ in 0..4 {
        let (path, shared) = (&path, &shared);
        children.push(Child::start(move || {
            for round in 0..50 {
                let lock =
                    Flock::lock(File::open(path)?, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
                let seen = shared.get(0);
                if round % 10 == 0 {
                    std::thread::yield_now();
                }
                shared.set(0, seen + 1);
                drop(lock);
            }
            Ok(())
        })?);
    }
    children.into_iter().try_for_each(Child::join)?;
    ensure_eq!(shared.get(0), 200, "the counter");
    // Of a part, by process.
    let file = OpenOptions::new().write(true).open(&path)?;
    // SAFETY: numbers only.
    let mut part: libc::flock = unsafe { std::mem::zeroed() };
    (part.l_type, part.l_start, part.l_len) = (i16::try_from(libc::F_WRLCK)?, 10, 10);
    syscall!(SYS_fcntl, raw(&file), libc::F_SETLK, &raw const part)?;
    Child::start(|| {
        let mut other = part;
        other.l_start = 20;
        syscall!(SYS_fcntl, raw(&file), libc::F_SETLK, &raw const other)?;
        other.l_start = 15;
        let refused = syscall!(SYS_fcntl, raw(&file), libc::F_SETLK, &raw const other);
        ensure_eq!(refused, Err(Errno::EAGAIN), "a part that overlaps");
        Ok(())
    })?
    .join()
}
