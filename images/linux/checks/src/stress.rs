//! All checks at once and at random, for a time, with a heartbeat each second that has neither hole nor repeat.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::check::{Check, Outcome, Verdict};
use crate::sys::{Child, Random, now};
use crate::{PATIENCE, ensure};

/// Checks that run beside each other.
const WORKERS: u64 = 4;
/// Failures that are shown one by one.
const SHOWN: u64 = 20;
/// Workers that are told to end may be amid a check.
const END: Duration = PATIENCE.saturating_add(Duration::from_secs(5));

/// What was counted.
#[derive(Debug, Default)]
struct Counts {
    rounds: u64,
    skipped: u64,
    failed: u64,
}

/// Runs checks at random for a time. Answers how many rounds failed.
///
/// # Errors
/// If no processes can be had, or one of those that run the checks ends.
pub fn run(checks: &[&'static Check], duration: Duration, seed: u64) -> Outcome<u64> {
    let start = now()?;
    let (told, tell) = io::pipe()?;
    let (stopped, stop) = io::pipe()?;
    let mut workers = Vec::new();
    for worker in 0..WORKERS {
        let mut random = Random::new(seed ^ worker << 32);
        workers.push(Child::start(|| {
            // Open here it would never be seen to close.
            crate::syscall!(SYS_close, crate::sys::raw(&stop))?;
            work(checks, &mut random, &tell, &stopped)
        })?);
    }
    drop((tell, stopped));
    let mut told = BufReader::new(told);
    let mut counts = Counts::default();
    let mut beat = Duration::from_secs(1);
    let mut beats = 0u64;
    while beat <= duration {
        let left = (start + beat).saturating_sub(now()?);
        if left.is_zero() {
            beats += 1;
            beat += Duration::from_secs(1);
            let Counts {
                rounds,
                skipped,
                failed,
            } = counts;
            let uptime = now()?.as_millis();
            println!("stress n={beats} rounds={rounds} fails={failed} skips={skipped} uptime_ms={uptime}");
            continue;
        }
        if wait(&told, left)? {
            ensure!(hear(&mut told, &mut counts)?, "all workers have ended");
        }
    }
    drop(stop);
    let deadline = now()? + END;
    while wait(&told, deadline.saturating_sub(now()?))? && hear(&mut told, &mut counts)? {}
    for worker in workers {
        worker.join()?;
    }
    let Counts {
        rounds,
        skipped,
        failed,
    } = counts;
    println!(
        "stress: {rounds} rounds of {} checks, {skipped} skipped, {failed} failed, seed {seed}",
        checks.len()
    );
    Ok(failed)
}

/// Whether there is something to hear within a time.
fn wait(told: &BufReader<io::PipeReader>, time: Duration) -> Outcome<bool> {
    if !told.buffer().is_empty() {
        return Ok(true);
    }
    let millis = u16::try_from(time.as_millis() + 1).unwrap_or(u16::MAX);
    let mut ready = [PollFd::new(told.get_ref().as_fd(), PollFlags::POLLIN)];
    match poll(&mut ready, millis) {
        Ok(count) => Ok(count > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Takes one line: `NAME VERDICT`. False at the end.
fn hear(told: &mut BufReader<io::PipeReader>, counts: &mut Counts) -> Outcome<bool> {
    let mut line = String::new();
    if told.read_line(&mut line)? == 0 {
        return Ok(false);
    }
    counts.rounds += 1;
    let (name, verdict) = line.trim_end().split_once(' ').unwrap_or_default();
    match Verdict::parse(verdict) {
        Some(Verdict::Ok) => {}
        Some(Verdict::Skipped(_)) => counts.skipped += 1,
        _ => {
            counts.failed += 1;
            if counts.failed <= SHOWN {
                println!("FAIL {name}: {verdict}");
            }
        }
    }
    Ok(true)
}

/// One check after the other until nobody holds the other end of `stopped`.
fn work(
    checks: &[&'static Check],
    random: &mut Random,
    mut tell: &io::PipeWriter,
    stopped: &io::PipeReader,
) -> Outcome {
    loop {
        let mut ready = [PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, 0u16)? > 0 {
            return Ok(());
        }
        let check = checks[random.below(checks.len())];
        let verdict = check.run_apart(PATIENCE);
        // One write of less than PIPE_BUF bytes: lines do not mix.
        tell.write_all(format!("{} {verdict}\n", check.name).as_bytes())?;
    }
}
