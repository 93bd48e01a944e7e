//! A hot node beside two that idle.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::host::sleep_until;
use super::stage::{HALF, Stage, work_a_second};
use super::{Outcome, Settings};

const MOST_MOVES: usize = 4;
/// Less than this is no relief: 3 times as much is to be had.
const LEAST_GAIN: f64 = 2.0;

/// Runs it.
pub fn run(settings: &Settings) -> Result<Outcome> {
    let (measure, patience, rest) = if settings.quick {
        (8, 50, 20)
    } else {
        (20, 240, 240)
    };
    let mut outcome = Outcome::default();
    let mut stage = Stage::start(settings, &[HALF; 3])?;
    let vms = stage.busy_guests(&[6, 0, 0])?;
    let first = stage.reading(&vms)?;
    sleep_until(Instant::now() + Duration::from_secs(measure))?;
    let before = work_a_second(&first, &stage.reading(&vms)?);

    stage.hands_off();
    let begun = Instant::now();
    let spread = stage.watch(Duration::from_secs(patience), |stage| stage.spread() == [2, 2, 2])?;
    let took = begun.elapsed().as_secs_f64();
    outcome.expect(spread, format!("VMs {:?} after {took:.0} s", stage.spread()));
    outcome.tell(format!("VMs {:?} after {took:.0} s", stage.spread()));
    let moves = stage.begun_moves();
    outcome.expect(moves <= MOST_MOVES, format!("{moves} moves until then"));

    let first = stage.reading(&vms)?;
    let later = stage.moves_within(Duration::from_secs(rest))?;
    outcome.expect(later == 0, format!("{later} moves in the {rest} s after"));
    let after = work_a_second(&first, &stage.reading(&vms)?);
    let gain = after / before.max(1.0);
    outcome.figure("seconds_until_even", took);
    outcome.figure("work_before", before);
    outcome.figure("work_after", after);
    outcome.figure("gain", gain);
    outcome.tell(format!(
        "work of the guests: {before:.0} pages a second before, {after:.0} after, {gain:.2} times as much"
    ));
    outcome.expect(gain >= LEAST_GAIN, format!("work only {gain:.2} times as before"));
    stage.close(&mut outcome);
    Ok(outcome)
}
