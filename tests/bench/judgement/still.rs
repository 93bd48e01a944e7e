//! Clusters that are as they should be: whatever is moved is moved in vain.

use std::time::Duration;

use anyhow::Result;

use super::host::Hogs;
use super::stage::{HALF, Stage, work_a_second};
use super::{Outcome, Settings};

const FIVE_MINUTES: Duration = Duration::from_secs(300);

/// One VM and nothing else.
pub fn lone(settings: &Settings) -> Result<Outcome> {
    let stage = Stage::start(settings, &[HALF; 3])?;
    stage.hands_off();
    stage.run_busy("lone");
    let window = window(settings, 25);
    stay(stage, &["lone".to_owned()], window)
}

/// Six VMs that are alike.
pub fn equals(settings: &Settings) -> Result<Outcome> {
    let stage = Stage::start(settings, &[HALF; 3])?;
    let vms = stage.busy_guests(&[2, 2, 2])?;
    stage.hands_off();
    stay(stage, &vms, window(settings, 40))
}

/// The same, while something else takes half of the host.
pub fn equals_beside_hog(settings: &Settings) -> Result<Outcome> {
    let stage = Stage::start_among_others(settings, &[HALF; 3])?;
    let vms = stage.busy_guests(&[2, 2, 2])?;
    let _hog = Hogs::start(1)?;
    stage.hands_off();
    stay(stage, &vms, window(settings, 40))
}

fn window(settings: &Settings, quick_seconds: u64) -> Duration {
    if settings.quick {
        Duration::from_secs(quick_seconds)
    } else {
        FIVE_MINUTES
    }
}

fn stay(mut stage: Stage, vms: &[String], window: Duration) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    stage.watch(Duration::from_secs(10), |stage| stage.reading(vms).is_ok())?;
    let before = stage.reading(vms)?;
    let moves = stage.moves_within(window)?;
    let work = work_a_second(&before, &stage.reading(vms)?);
    outcome.figure("work_a_second", work);
    outcome.tell(format!("the guests did {work:.0} pages a second"));
    // Those before the first reading count, too.
    let moves = moves.max(stage.begun_moves());
    outcome.expect(moves == 0, format!("{moves} moves"));
    stage.close(&mut outcome);
    Ok(outcome)
}
