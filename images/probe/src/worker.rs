//! The main loop's step. It never does more than one page at a time, so that the gap meter sees every stall from outside.

use core::fmt;

use crate::clock::{ClockWatch, Reading};
use crate::options::Options;
use crate::pace::{Frequency, Gap, GapMeter, Pacer, Ticks};
use crate::page::{self, Identity, Mismatch, Page};
use crate::ranges::GuestAddress;
use crate::sweep::Sweep;
use crate::text::Lines;

/// The whole filled region is checked once in so many heartbeats, if [`MAX_SCAN_RATE`] allows.
const SCAN_BEATS: u64 = 4;
/// Most pages per second that the background scan checks: about a tenth of a CPU.
const MAX_SCAN_RATE: u64 = 400_000;
/// Gaps of a fifth of a millisecond and more are told one by one.
const SHORTEST_GAPS_PER_MS: u64 = 5;
/// Corrupt pages of which the particulars are printed.
const DETAILED_REPORTS: u64 = 10;

/// Memory as numbered pages.
pub trait Memory {
    /// The page and where it lies.
    fn page(&mut self, number: u64) -> (GuestAddress, &mut Page);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Work,
    /// It is over: every page is checked once, from this one on.
    FinalCheck(u64),
    Finished,
}

/// All that the probe does, in steps.
#[derive(Debug)]
pub struct Worker<M> {
    memory: M,
    options: Options,
    frequency: Frequency,
    phase: Phase,
    start: Ticks,
    gaps: GapMeter,
    /// The longest gap since the last heartbeat that was told the VMM, in ticks, and what to tell it next.
    told: u64,
    to_tell: Option<u32>,
    clock: Option<ClockWatch>,
    fill: Pacer,
    dirty: Pacer,
    scan: Pacer,
    sweep: Sweep,
    /// Which kind of work is asked first whether it is due; moves on at every step so that none starves.
    turn: u8,
    next_heartbeat: Ticks,
    heartbeats: u64,
    filled: u64,
    next_scan: u64,
    dirtied: u64,
    checked: u64,
    corrupt: u64,
}

impl<M: Memory> Worker<M> {
    /// Starts at `start`. `memory` must have the pages that `options` ask for.
    pub fn new(memory: M, options: Options, frequency: Frequency, start: Ticks) -> Self {
        let scan_rate = options.fill_pages.saturating_mul(1000) / (SCAN_BEATS * options.beat_ms);
        let scan_rate = scan_rate.clamp(1, MAX_SCAN_RATE);
        Self {
            memory,
            options,
            frequency,
            phase: Phase::Work,
            start,
            gaps: GapMeter::new(start, frequency.ticks(1) / SHORTEST_GAPS_PER_MS),
            told: frequency.ticks(1) / SHORTEST_GAPS_PER_MS,
            to_tell: None,
            clock: None,
            fill: Pacer::new(options.fill_rate, frequency, start),
            dirty: Pacer::new(options.rate, frequency, start),
            scan: Pacer::new(scan_rate, frequency, start),
            sweep: Sweep::new(options.working_set_pages),
            turn: 0,
            next_heartbeat: Ticks(start.0 + frequency.ticks(options.beat_ms)),
            heartbeats: 0,
            filled: 0,
            next_scan: 0,
            dirtied: 0,
            checked: 0,
            corrupt: 0,
        }
    }

    /// One iteration. Lines for the console are added to `lines`.
    pub fn step(&mut self, now: Ticks, lines: &mut Lines) {
        self.gaps.iteration(now);
        if self.gaps.max() > self.told {
            self.told = self.gaps.max();
            self.to_tell = Some(self.microseconds(self.told));
        }
        if now >= self.next_heartbeat && lines.is_empty() && self.phase != Phase::Finished {
            self.heartbeat(now, lines);
            return;
        }
        match self.phase {
            Phase::Work => {
                self.work(now, lines);
                if self.is_over(now) {
                    self.phase = Phase::FinalCheck(0);
                }
            }
            Phase::FinalCheck(next) if next < self.filled => {
                self.check(self.sweep.identity(next), lines);
                self.phase = Phase::FinalCheck(next + 1);
            }
            Phase::FinalCheck(_) if lines.is_empty() => {
                self.heartbeat(now, lines);
                lines.push(format_args!("probe: done corrupt={}", self.corrupt));
                self.phase = Phase::Finished;
            }
            Phase::FinalCheck(_) | Phase::Finished => {}
        }
    }

    /// The exit status, once everything is done.
    #[must_use]
    pub fn exit_status(&self) -> Option<u8> {
        let own = u8::from(self.corrupt > 0);
        (self.phase == Phase::Finished).then(|| self.options.status.unwrap_or(own))
    }

    /// To be told what KVM's clock says, where there is one.
    pub fn clock(&mut self, reading: Reading) {
        self.clock.get_or_insert_default().reading(reading);
    }

    /// Microseconds of a gap that the VMM is to hear of: at once if it is the longest since the last heartbeat and of 200 µs
    /// or more, and the longest at each heartbeat.
    pub fn gap_to_tell(&mut self) -> Option<u32> {
        self.to_tell.take()
    }

    fn microseconds(&self, ticks: u64) -> u32 {
        u32::try_from(self.frequency.microseconds(ticks)).unwrap_or(u32::MAX)
    }

    fn uptime_ms(&self, now: Ticks) -> u64 {
        self.frequency.milliseconds(now.since(self.start))
    }

    /// Time is up, or all is done.
    fn is_over(&self, now: Ticks) -> bool {
        let Options { seconds, work, .. } = self.options;
        let late = seconds > 0 && self.uptime_ms(now) >= seconds.saturating_mul(1000);
        late || (work > 0 && self.dirtied >= work)
    }

    fn work(&mut self, now: Ticks, lines: &mut Lines) {
        self.turn = (self.turn + 1) % 3;
        for kind in 0..3 {
            let done = match (self.turn + kind) % 3 {
                0 => self.fill_one(now),
                1 => self.dirty_one(now, lines),
                _ => self.scan_one(now, lines),
            };
            if done {
                return;
            }
        }
    }

    fn fill_one(&mut self, now: Ticks) -> bool {
        let due = self.filled < self.options.fill_pages && self.fill.is_due(now);
        if due {
            let identity = Identity {
                number: self.filled,
                generation: 0,
            };
            page::write(self.memory.page(self.filled).1, identity, self.options.pattern);
            self.filled += 1;
            self.fill.advance(now);
        }
        due
    }

    /// Dirties the next page of the working set, once all of it has been filled.
    fn dirty_one(&mut self, now: Ticks, lines: &mut Lines) -> bool {
        let ready = self.options.rate > 0 && self.filled >= self.options.working_set_pages;
        let Some(old) = self.sweep.next().filter(|_| ready && self.dirty.is_due(now)) else {
            return false;
        };
        self.check(old, lines);
        let new = Identity {
            generation: old.generation + 1,
            ..old
        };
        page::write(self.memory.page(new.number).1, new, self.options.pattern);
        self.sweep.advance();
        self.dirtied += 1;
        self.dirty.advance(now);
        true
    }

    fn scan_one(&mut self, now: Ticks, lines: &mut Lines) -> bool {
        let due = self.filled > 0 && self.scan.is_due(now);
        if due {
            self.next_scan = if self.next_scan < self.filled {
                self.next_scan
            } else {
                0
            };
            self.check(self.sweep.identity(self.next_scan), lines);
            self.next_scan += 1;
            self.scan.advance(now);
        }
        due
    }

    /// Checks a page. A corrupt one is counted and made good, so that it counts once.
    fn check(&mut self, identity: Identity, lines: &mut Lines) {
        let (address, page) = self.memory.page(identity.number);
        self.checked += 1;
        if let Err(mismatch) = page::check(page, identity, self.options.pattern) {
            page::write(page, identity, self.options.pattern);
            self.corrupt += 1;
            if self.corrupt <= DETAILED_REPORTS {
                report_corrupt(address, identity, mismatch, lines);
            }
        }
    }

    fn heartbeat(&mut self, now: Ticks, lines: &mut Lines) {
        let beat = self.frequency.ticks(self.options.beat_ms);
        // After a pause of more than a beat it goes on from now: one line a beat, never a burst.
        let next = self.next_heartbeat.0 + beat;
        self.next_heartbeat = Ticks(if next > now.0 { next } else { now.0 + beat });
        self.heartbeats += 1;
        let longest = self.gaps.take_max();
        let max_gap = self.frequency.microseconds(longest);
        self.to_tell = Some(self.microseconds(longest));
        self.told = self.frequency.ticks(1) / SHORTEST_GAPS_PER_MS;
        let clock = ClockWords(self.clock);
        let gaps = GapList {
            gaps: self.gaps.take_gaps(),
            frequency: self.frequency,
            start: self.start,
        };
        lines.push(format_args!(
            "hb n={} uptime_ms={} max_gap_us={max_gap} dirtied={} corrupt={} filled={} checked={} worst_gap_us={} tsc_backwards={}{clock}{gaps}",
            self.heartbeats,
            self.uptime_ms(now),
            self.dirtied,
            self.corrupt,
            self.filled * crate::PAGE_SIZE,
            self.checked,
            self.frequency.microseconds(self.gaps.worst()),
            self.gaps.backwards(),
        ));
    }
}

/// What KVM's clock said, as words of a heartbeat.
struct ClockWords(Option<ClockWatch>);

impl fmt::Display for ClockWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(clock) = &self.0 else { return Ok(()) };
        let (time, backwards, stops) = (clock.milliseconds(), clock.backwards(), clock.stops());
        let steady = u8::from(clock.is_steady());
        write!(
            f,
            " clock_ms={time} clock_steady={steady} clock_backwards={backwards} stops={stops}"
        )
    }
}

/// Gaps as the last word of a heartbeat; nothing if there are none.
struct GapList<G> {
    gaps: G,
    frequency: Frequency,
    start: Ticks,
}

impl<G: Iterator<Item = Gap> + Clone> fmt::Display for GapList<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = " gaps=";
        for gap in self.gaps.clone() {
            let end = self.frequency.microseconds(gap.end.since(self.start));
            write!(f, "{before}{end}:{}", self.frequency.microseconds(gap.length))?;
            before = ",";
        }
        Ok(())
    }
}

#[cold]
fn report_corrupt(address: GuestAddress, identity: Identity, mismatch: Mismatch, lines: &mut Lines) {
    lines.push(format_args!(
        "probe: corrupt page={} gpa={:#x} generation={} word={} expected={:#x} found={:#x}",
        identity.number, address.0, identity.generation, mismatch.word, mismatch.expected, mismatch.found
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Buffer(Vec<Page>);

    impl Memory for &mut Buffer {
        fn page(&mut self, number: u64) -> (GuestAddress, &mut Page) {
            (
                GuestAddress(number * 4096),
                &mut self.0[usize::try_from(number).expect("small")],
            )
        }
    }

    /// Runs a worker for `ms` milliseconds of its own time, 1 µs per iteration, and gives what it printed.
    fn run(worker: &mut Worker<&mut Buffer>, lines: &mut Lines, from_ms: u64, ms: u64) -> String {
        let mut output = String::new();
        for us in from_ms * 1000..(from_ms + ms) * 1000 {
            worker.step(Ticks(us), lines);
            output.extend(lines.pop().map(char::from));
        }
        output
    }

    fn worker<'a>(buffer: &'a mut Buffer, command_line: &str) -> Worker<&'a mut Buffer> {
        let options = Options::parse(command_line).expect("valid");
        buffer
            .0
            .resize(usize::try_from(options.fill_pages).expect("small"), [0; 512]);
        // One tick is one microsecond.
        Worker::new(
            buffer,
            options,
            Frequency::from_khz(1000).expect("not zero"),
            Ticks(0),
        )
    }

    fn field<'a>(line: &'a str, name: &str) -> &'a str {
        line.split(' ')
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .expect(name)
    }

    #[test]
    fn heartbeats_come_every_second_in_the_promised_form() {
        let mut buffer = Buffer(Vec::new());
        let mut worker = worker(&mut buffer, "fill=256K wss=64K rate=1000");
        let output = run(&mut worker, &mut Lines::default(), 0, 3500);
        let lines: Vec<_> = output.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(
            lines[2].starts_with("hb n=3 uptime_ms=3000 max_gap_us=1 dirtied="),
            "{}",
            lines[2]
        );
        assert_eq!(
            (field(lines[2], "corrupt"), field(lines[2], "filled")),
            ("0", "262144")
        );
        let dirtied: u64 = field(lines[2], "dirtied").parse().expect("a number");
        assert!((2990..=3001).contains(&dirtied), "{dirtied}");
    }

    #[test]
    fn a_pause_is_seen_as_a_gap_and_leaves_no_hole_in_the_numbers() {
        let mut buffer = Buffer(Vec::new());
        let mut worker = worker(&mut buffer, "fill=64K");
        let mut lines = Lines::default();
        run(&mut worker, &mut lines, 0, 1500);
        let output = run(&mut worker, &mut lines, 8000, 2500);
        let lines: Vec<_> = output.lines().collect();
        assert_eq!(
            lines.iter().map(|line| field(line, "n")).collect::<Vec<_>>(),
            ["2", "3", "4"]
        );
        assert_eq!(field(lines[0], "max_gap_us"), "6500001");
        assert_eq!(worker.gap_to_tell(), Some(1), "of the last heartbeat");
        assert_eq!(worker.gap_to_tell(), None);
        worker.step(Ticks(10_900_000), &mut Lines::default());
        assert_eq!(worker.gap_to_tell(), Some(400_001), "at once");
        assert_eq!(field(lines[0], "gaps"), "8000000:6500001");
        assert!(!lines[1].contains("gaps="));
        assert_eq!(field(lines[1], "worst_gap_us"), "6500001");
    }

    #[test]
    fn a_corrupt_page_is_found_by_the_scan_and_counted_once() {
        for pattern in ["random", "zero", "text"] {
            let mut buffer = Buffer(Vec::new());
            let mut worker = worker(&mut buffer, &format!("fill=400K pattern={pattern}"));
            let mut lines = Lines::default();
            run(&mut worker, &mut lines, 0, 5000);
            worker.memory.0[77][9] ^= 4;
            let output = run(&mut worker, &mut lines, 5000, 9900);
            assert!(
                output.contains("probe: corrupt page=77 gpa=0x4d000 generation=0 word=9 "),
                "{output}"
            );
            assert_eq!(field(output.lines().last().expect("heartbeats"), "corrupt"), "1");
        }
    }

    #[test]
    fn a_lost_write_is_found() {
        let mut buffer = Buffer(Vec::new());
        let mut worker = worker(&mut buffer, "wss=64K rate=1000");
        let mut lines = Lines::default();
        run(&mut worker, &mut lines, 0, 1000);
        let old = worker.memory.0[3];
        run(&mut worker, &mut lines, 1000, 500);
        worker.memory.0[3] = old;
        let output = run(&mut worker, &mut lines, 1500, 1000);
        assert_eq!(field(output.lines().last().expect("heartbeats"), "corrupt"), "1");
    }

    #[test]
    fn it_ends_with_its_work() {
        let mut buffer = Buffer(Vec::new());
        let mut worker = worker(&mut buffer, "wss=64K rate=1000 work=700 seconds=9");
        let mut lines = Lines::default();
        run(&mut worker, &mut lines, 0, 650);
        assert_eq!(worker.exit_status(), None);
        let output = run(&mut worker, &mut lines, 650, 200);
        assert!(output.contains(" dirtied=700 corrupt=0 "), "{output}");
        assert_eq!(worker.exit_status(), Some(0));
    }

    #[test]
    fn at_the_end_everything_is_checked_and_the_status_says_how_it_went() {
        for (command_line, broken, status) in [
            ("fill=64K seconds=2", false, 0),
            ("fill=64K seconds=2", true, 1),
            ("fill=64K seconds=2 status=9", true, 9),
        ] {
            let mut buffer = Buffer(Vec::new());
            let mut worker = worker(&mut buffer, command_line);
            let mut lines = Lines::default();
            run(&mut worker, &mut lines, 0, 1999);
            assert_eq!(worker.exit_status(), None);
            worker.memory.0[15][0] ^= u64::from(broken);
            let output = run(&mut worker, &mut lines, 1999, 100);
            assert!(
                output.ends_with(&format!("\nprobe: done corrupt={}\n", u8::from(broken))),
                "{output}"
            );
            assert_eq!(worker.exit_status(), Some(status));
        }
    }
}
