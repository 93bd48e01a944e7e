//! Timers, sleeps and clocks: never early, never lost, never back. How late is not judged: the machine may be busy or moved.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::sys::timerfd::{self, TimerFd, TimerFlags};
use nix::time::ClockId;

use crate::check::{Check, Outcome, available, check};
use crate::sys::{as_timespec, clock, handle, now, until};
use crate::{ensure, ensure_eq, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("timers.interval", interval),
    check("timers.of-cpu-time", of_cpu_time),
    check("timers.posix", posix),
    check("timers.descriptor", descriptor),
    check("timers.sleep", sleep),
    check("timers.timeouts", timeouts),
    check("clocks.monotonic", monotonic),
    check("clocks.agree", agree),
    check("clocks.cpu-time", cpu_time),
];

static COUNT: AtomicU64 = AtomicU64::new(0);
static VALUE: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: this is the handler; the field is there for every kind of signal, if not with a meaning.
    VALUE.store(
        unsafe { (*info).si_value().sival_ptr }.expose_provenance() as u64,
        SeqCst,
    );
    COUNT.fetch_add(1, SeqCst);
}

fn set_interval(which: c_int, period: Duration) -> nix::Result<()> {
    let period = libc::timeval {
        tv_sec: period.as_secs().cast_signed(),
        tv_usec: period.subsec_micros().into(),
    };
    let timer = libc::itimerval {
        it_interval: period,
        it_value: period,
    };
    syscall!(SYS_setitimer, which, &raw const timer, 0usize).map(drop)
}

/// No more ticks than time, and every tick in the end.
fn interval() -> Outcome {
    handle(Signal::SIGALRM, SaFlags::SA_RESTART, count)?;
    let period = Duration::from_millis(5);
    let start = now()?;
    set_interval(libc::ITIMER_REAL, period)?;
    until("40 ticks", || {
        let ticks = u32::try_from(COUNT.load(SeqCst))?;
        let passed = now()? - start;
        ensure!(
            period * ticks <= passed + period,
            "{ticks} ticks of 5 ms after {passed:?}"
        );
        Ok(ticks >= 40)
    })?;
    set_interval(libc::ITIMER_REAL, Duration::ZERO)?;
    let at_end = COUNT.load(SeqCst);
    std::thread::sleep(4 * period);
    ensure!(
        COUNT.load(SeqCst) <= at_end + 1,
        "ticks after the timer was stopped"
    );
    Ok(())
}

fn of_cpu_time() -> Outcome {
    for (which, signal) in [
        (libc::ITIMER_VIRTUAL, Signal::SIGVTALRM),
        (libc::ITIMER_PROF, Signal::SIGPROF),
    ] {
        COUNT.store(0, SeqCst);
        handle(signal, SaFlags::SA_RESTART, count)?;
        set_interval(which, Duration::from_millis(10))?;
        let deadline = now()? + Duration::from_secs(30);
        while COUNT.load(SeqCst) < 3 {
            std::hint::black_box((0..10_000u64).sum::<u64>());
            ensure!(now()? < deadline, "{signal} does not come");
        }
        set_interval(which, Duration::ZERO)?;
    }
    Ok(())
}

fn posix() -> Outcome {
    handle(Signal::SIGUSR1, SaFlags::empty(), count)?;
    for id in [
        ClockId::CLOCK_MONOTONIC,
        ClockId::CLOCK_REALTIME,
        ClockId::CLOCK_BOOTTIME,
    ] {
        COUNT.store(0, SeqCst);
        let event = nix::sys::signal::SigEvent::new(nix::sys::signal::SigevNotify::SigevSignal {
            signal: Signal::SIGUSR1,
            si_value: 0x1234_5678_9abc,
        });
        let mut timer = Timer::new(id, event)?;
        let period = TimeSpec::from_duration(Duration::from_millis(3));
        timer.set(
            Expiration::IntervalDelayed(period, period),
            TimerSetTimeFlags::empty(),
        )?;
        until("ten expirations", || Ok(COUNT.load(SeqCst) >= 10))?;
        ensure_eq!(VALUE.load(SeqCst), 0x1234_5678_9abc, "the value of {id}");
        ensure!(timer.get()?.is_some(), "it goes on");
    }
    // What comes while it is blocked is counted.
    let mut set = nix::sys::signal::SigSet::empty();
    set.add(Signal::SIGUSR1);
    set.thread_block()?;
    let event = nix::sys::signal::SigEvent::new(nix::sys::signal::SigevNotify::SigevSignal {
        signal: Signal::SIGUSR1,
        si_value: 1,
    });
    let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, event)?;
    let period = TimeSpec::from_duration(Duration::from_millis(1));
    timer.set(
        Expiration::IntervalDelayed(period, period),
        TimerSetTimeFlags::empty(),
    )?;
    std::thread::sleep(Duration::from_millis(20));
    // Taken while it is blocked, so that the next signal does not come, with a count of its own, before this one is read.
    ensure_eq!(set.wait()?, Signal::SIGUSR1, "the signal taken");
    let overruns = timer.overruns();
    ensure!(overruns >= 10, "{overruns} overruns in 20 ms");
    set.thread_unblock()?;
    Ok(())
}

fn descriptor() -> Outcome {
    let timer = available(
        "timerfd",
        TimerFd::new(timerfd::ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK),
    )?;
    let mut count = [0u8; 8];
    ensure_eq!(
        nix::unistd::read(&timer, &mut count),
        Err(Errno::EAGAIN),
        "before it is set"
    );
    let millis = |n| TimeSpec::from_duration(Duration::from_millis(n));
    let start = now()?;
    timer.set(
        timerfd::Expiration::IntervalDelayed(millis(10), millis(10)),
        timerfd::TimerSetTimeFlags::empty(),
    )?;
    let mut expirations = 0;
    while expirations < 10 {
        let mut ready = [PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
        ensure_eq!(poll(&mut ready, PollTimeout::from(30_000u16))?, 1, "poll");
        nix::unistd::read(&timer, &mut count)?;
        expirations += u64::from_le_bytes(count);
        let passed = now()? - start;
        ensure!(
            u128::from(expirations) * 10 <= passed.as_millis(),
            "{expirations} expirations after {passed:?}"
        );
    }
    let due = now()? + Duration::from_millis(20);
    timer.set(
        timerfd::Expiration::OneShot(TimeSpec::from_duration(due)),
        timerfd::TimerSetTimeFlags::TFD_TIMER_ABSTIME,
    )?;
    let mut ready = [PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
    ensure_eq!(poll(&mut ready, PollTimeout::from(30_000u16))?, 1, "poll");
    ensure!(now()? >= due, "it is early");
    Ok(())
}

fn sleep() -> Outcome {
    for micros in [0, 1, 50, 999, 5_000, 12_345] {
        let duration = Duration::from_micros(micros);
        let request = as_timespec(duration);
        for id in [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME, libc::CLOCK_BOOTTIME] {
            let start = now()?;
            syscall!(SYS_clock_nanosleep, id, 0, &raw const request, 0usize)?;
            let slept = now()? - start;
            ensure!(slept >= duration, "slept {slept:?} of {duration:?} on clock {id}");
        }
        let due = now()? + duration;
        let request = as_timespec(due);
        syscall!(
            SYS_clock_nanosleep,
            libc::CLOCK_MONOTONIC,
            libc::TIMER_ABSTIME,
            &raw const request,
            0usize
        )?;
        ensure!(now()? >= due, "up before {due:?}");
    }
    let past = as_timespec(Duration::from_nanos(1));
    syscall!(
        SYS_clock_nanosleep,
        libc::CLOCK_MONOTONIC,
        libc::TIMER_ABSTIME,
        &raw const past,
        0usize
    )?;
    let wrong = libc::timespec {
        tv_sec: 0,
        tv_nsec: 1_000_000_000,
    };
    let refused = syscall!(SYS_nanosleep, &raw const wrong, 0usize);
    ensure_eq!(refused, Err(Errno::EINVAL), "a second of nanoseconds");
    Ok(())
}

fn timeouts() -> Outcome {
    let (from, _to) = std::io::pipe()?;
    for millis in [0u16, 1, 15] {
        let wanted = Duration::from_millis(millis.into());
        let start = now()?;
        let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        ensure_eq!(poll(&mut ready, millis)?, 0, "poll");
        ensure!(now()? - start >= wanted, "poll ends early");
        let start = now()?;
        let mut set = nix::sys::select::FdSet::new();
        set.insert(from.as_fd());
        let timeout = TimeSpec::from_duration(wanted);
        let ready = nix::sys::select::pselect(None, Some(&mut set), None, None, Some(&timeout), None)?;
        ensure_eq!(ready, 0, "pselect");
        ensure!(now()? - start >= wanted, "pselect ends early");
    }
    Ok(())
}

/// Across threads: what one has seen, no other sees an earlier time after.
fn monotonic() -> Outcome {
    // SAFETY: reads a counter.
    let counter = || unsafe { std::arch::x86_64::_rdtsc() };
    // SAFETY: as above, after all that came before.
    let ordered = || unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    };
    let start = counter();
    let clocks: [(&str, &(dyn Fn() -> u64 + Sync)); 4] = [
        ("CLOCK_MONOTONIC", &|| nanos(ClockId::CLOCK_MONOTONIC)),
        ("CLOCK_BOOTTIME", &|| nanos(ClockId::CLOCK_BOOTTIME)),
        ("CLOCK_MONOTONIC_RAW", &|| nanos(ClockId::CLOCK_MONOTONIC_RAW)),
        ("TSC", &ordered),
    ];
    for (name, read) in clocks {
        let latest = AtomicU64::new(0);
        let backwards = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..20_000 {
                        let seen = latest.load(SeqCst);
                        let time = read();
                        if time < seen {
                            backwards.fetch_max(seen - time, SeqCst);
                        }
                        latest.fetch_max(time, SeqCst);
                        if round % 1000 == 0 {
                            std::thread::yield_now();
                        }
                    }
                });
            }
        });
        ensure_eq!(backwards.load(SeqCst), 0, "{name} went back by");
    }
    ensure!(counter() > start, "the TSC stands still");
    Ok(())
}

fn nanos(id: ClockId) -> u64 {
    clock(id).map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

/// The clocks that the C library reads without the kernel's help are those of the kernel.
fn agree() -> Outcome {
    for id in [
        ClockId::CLOCK_MONOTONIC,
        ClockId::CLOCK_BOOTTIME,
        ClockId::CLOCK_MONOTONIC_RAW,
    ] {
        let mut before = 0;
        for _ in 0..500 {
            let mut kernel = as_timespec(Duration::ZERO);
            syscall!(SYS_clock_gettime, id.as_raw(), &raw mut kernel)?;
            let kernel = u64::try_from(Duration::from(TimeSpec::from_timespec(kernel)).as_nanos())?;
            ensure!(
                kernel >= before,
                "the kernel's {id} is {} ns behind",
                before - kernel
            );
            let library = nanos(id);
            ensure!(
                library >= kernel,
                "{id} is {} ns behind the kernel's",
                kernel - library
            );
            before = library;
        }
    }
    // By real time, after 2020, and as fast as the others.
    let start = (clock(ClockId::CLOCK_REALTIME)?, now()?);
    ensure!(
        start.0.as_secs() > 1_577_836_800 || start.0.as_secs() < 86_400 * 366,
        "{:?} since 1970",
        start.0
    );
    std::thread::sleep(Duration::from_millis(50));
    let (real, monotonic) = (clock(ClockId::CLOCK_REALTIME)? - start.0, now()? - start.1);
    ensure!(
        real.abs_diff(monotonic) < Duration::from_secs(5),
        "{real:?} and {monotonic:?} passed"
    );
    let uptime = std::fs::read_to_string("/proc/uptime")?;
    let seconds: f64 = uptime
        .split(' ')
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or(-1.0);
    let boot = clock(ClockId::CLOCK_BOOTTIME)?.as_secs_f64();
    ensure!(
        seconds <= boot && boot - seconds < 10.0,
        "/proc/uptime says {seconds}, the clock {boot}"
    );
    Ok(())
}

fn cpu_time() -> Outcome {
    let ids = [
        ClockId::CLOCK_PROCESS_CPUTIME_ID,
        ClockId::CLOCK_THREAD_CPUTIME_ID,
    ];
    for id in ids {
        let (start, wall) = (clock(id)?, now()?);
        std::thread::sleep(Duration::from_millis(30));
        let slept = clock(id)? - start;
        ensure!(slept <= now()? - wall, "{id} counts {slept:?} of a sleep");
        let goal = clock(id)? + Duration::from_millis(20);
        let deadline = now()? + Duration::from_secs(30);
        while clock(id)? < goal {
            ensure!(now()? < deadline, "{id} stands still");
        }
    }
    Ok(())
}
