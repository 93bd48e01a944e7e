//! How long the usual things take: one line each, `measure NAME VALUE UNIT`.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::check::Outcome;
use crate::sys::{Child, Mapping, PAGE, now};
use crate::{ensure, net, syscall};

const BUSYBOX: &str = "/bin/busybox";

/// Measures all. The quick ones are repeated until they took long enough, so that slow machines do not take for ever.
///
/// # Errors
/// If something does not work.
pub fn run() -> Outcome {
    println!("measure userland {:.1} ms", millis(now()?));
    let getpid = repeat(|| Ok(syscall!(SYS_getpid).map(|_| ())?))?;
    println!("measure getpid {:.1} ns", nanos(getpid));
    pipe()?;
    let fork = repeat(|| Child::start(|| Ok(()))?.join())?;
    println!("measure fork {:.4} ms", millis(fork));
    exec()?;
    first_touch()?;
    floating_point()?;
    tcp()?;
    sleep()
}

/// The time that one takes, on average.
fn repeat(mut one: impl FnMut() -> Outcome) -> Outcome<Duration> {
    const ENOUGH: Duration = Duration::from_millis(500);
    one()?;
    let (start, mut count, mut batch) = (now()?, 0, 1);
    loop {
        for _ in 0..batch {
            one()?;
        }
        count += batch;
        let passed = now()? - start;
        if passed >= ENOUGH {
            return Ok(Duration::from_secs_f64(passed.as_secs_f64() / f64::from(count)));
        }
        // The clock is read rarely where it costs as much as what is measured.
        batch = if passed < ENOUGH / 8 {
            count.min(1 << 16)
        } else {
            batch
        };
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn nanos(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e9
}

fn pipe() -> Outcome {
    let (mut there_out, mut there_in) = std::io::pipe()?;
    let (mut back_out, mut back_in) = std::io::pipe()?;
    let child = Child::start(|| {
        let mut byte = [0];
        while there_out.read(&mut byte)? == 1 && byte[0] != 0 {
            back_in.write_all(&byte)?;
        }
        Ok(())
    })?;
    let mut byte = [1];
    let trip = repeat(|| {
        there_in.write_all(&[1])?;
        Ok(back_out.read_exact(&mut byte)?)
    })?;
    there_in.write_all(&[0])?;
    child.join()?;
    println!("measure pipe {:.2} us", nanos(trip) / 1e3);
    Ok(())
}

/// Of a program that does nothing. Where there is no busybox, this one.
fn exec() -> Outcome {
    let busybox = Path::new(BUSYBOX).exists();
    let one = || {
        let status = command(busybox).status()?;
        ensure!(status.success(), "it ends with {status}");
        Ok(())
    };
    // By fork(2), as shells do, not by vfork(2) as the library does.
    let time = repeat(|| {
        let child =
            Child::start(|| Err(std::os::unix::process::CommandExt::exec(&mut command(busybox)).into()))?;
        child.join()
    })?;
    println!("measure fork-exec-exit {:.3} ms", millis(time));
    println!("measure vfork-exec-exit {:.3} ms", millis(repeat(one)?));
    Ok(())
}

fn command(busybox: bool) -> Command {
    let mut command = Command::new(if busybox { BUSYBOX } else { crate::processes::SELF });
    command.args(if busybox { &["true"][..] } else { &["exit", "0"] });
    command
}

fn first_touch() -> Outcome {
    const PAGES: usize = 8192;
    let memory = Mapping::private(PAGES * PAGE)?;
    let start = now()?;
    (0..PAGES).for_each(|page| memory.set(page * PAGE, 1));
    let once = (now()? - start).as_secs_f64() / 8192.0;
    println!("measure first-touch {:.3} us", once * 1e6);
    let start = now()?;
    memory.advise(0, PAGES * PAGE, nix::sys::mman::MmapAdvise::MADV_DONTNEED)?;
    (0..PAGES).for_each(|page| memory.set(page * PAGE, 1));
    let again = (now()? - start).as_secs_f64() / 8192.0;
    println!("measure first-touch-again {:.3} us", again * 1e6);
    Ok(())
}

fn floating_point() -> Outcome {
    let start = now()?;
    let mut value = std::hint::black_box(1.0f64);
    for _ in 0..100_000_000u32 {
        value *= 1.000_000_000_1;
    }
    std::hint::black_box(value);
    println!("measure fp-1e8 {:.1} ms", millis(now()? - start));
    Ok(())
}

fn tcp() -> Outcome {
    net::loopback_up()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let limit = Duration::from_secs(1);
    let child = Child::start(|| {
        let mut stream = TcpStream::connect(address)?;
        let buffer = vec![7; 1 << 16];
        let start = now()?;
        while now()? - start < limit {
            stream.write_all(&buffer)?;
        }
        Ok(())
    })?;
    let (mut stream, _) = listener.accept()?;
    let start = now()?;
    let bytes = std::io::copy(
        &mut std::io::Read::take(&mut stream, u64::MAX),
        &mut std::io::sink(),
    )?;
    let time = now()? - start;
    child.join()?;
    let mib = Duration::from_micros(bytes >> 10).as_secs_f64() * 1e6 / 1024.0;
    println!("measure tcp-loopback {:.1} MiB/s", mib / time.as_secs_f64());
    Ok(())
}

fn sleep() -> Outcome {
    const SLEEP: Duration = Duration::from_millis(10);
    let start = now()?;
    for _ in 0..20 {
        std::thread::sleep(SLEEP);
    }
    println!("measure sleep-10ms {:.3} ms", millis((now()? - start) / 20));
    Ok(())
}
