//! A node of half the CPU beside two others, with more VMs than they have.

use std::time::Duration;

use anyhow::Result;

use super::stage::{HALF, Stage, work_a_second};
use super::{Outcome, Settings};

const PATIENCE: Duration = Duration::from_secs(300);
const REST: Duration = Duration::from_secs(180);

/// Runs it. Even is 1/2/2: a quarter of a CPU for each of five VMs.
pub fn run(settings: &Settings) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut stage = Stage::start(settings, &[HALF / 2.0, HALF, HALF])?;
    let vms = stage.busy_guests(&[3, 1, 1])?;
    stage.hands_off();
    let fewer = |spread: &[usize]| {
        let (slow, others) = spread.split_first().unwrap_or((&0, &[]));
        spread.iter().sum::<usize>() == vms.len() && others.iter().all(|other| slow < other)
    };
    let spread = stage.watch(PATIENCE, |stage| fewer(&stage.spread()))?;
    outcome.expect(spread, format!("VMs {:?} after 5 min", stage.spread()));
    let first = stage.reading(&vms)?;
    let moves = stage.moves_within(REST)?;
    outcome.expect(moves == 0, format!("{moves} moves in the 3 min after"));
    let work = work_a_second(&first, &stage.reading(&vms)?);
    let last = stage.spread();
    outcome.expect(fewer(&last), format!("VMs {last:?} at the end"));
    outcome.figure("work_a_second", work);
    outcome.tell(format!("VMs {last:?} at the end; {work:.0} pages a second"));
    stage.close(&mut outcome);
    Ok(outcome)
}
