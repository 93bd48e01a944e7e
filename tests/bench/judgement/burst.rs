//! Many VMs started at once: each must be counted when the next is placed, although no node has reported it yet.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::stage::{HALF, Stage};
use super::{Outcome, Settings};

const VMS: usize = 30;
/// After the burst, to see what is moved then.
const AFTERWARDS: Duration = Duration::from_secs(60);

/// Runs it.
pub fn run(settings: &Settings) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut stage = Stage::start(settings, &[HALF; 3])?;
    stage.hands_off();
    let started = Instant::now();
    let names: Vec<String> = (1..=VMS).map(|number| format!("burst{number}")).collect();
    let nodes = stage.run_busy_at_once(&names)?;
    let took = started.elapsed().as_secs_f64();
    let placed: Vec<usize> = (1..=3)
        .map(|number| format!("node{number}"))
        .map(|node| nodes.iter().filter(|&on| *on == node).count())
        .collect();
    let (least, most) = (placed.iter().min(), placed.iter().max());
    let apart = most.zip(least).map_or(VMS, |(most, least)| most - least);
    outcome.figure("seconds", took);
    outcome.tell(format!("{VMS} VMs in {took:.1} s, placed {placed:?}"));
    outcome.expect(apart <= 1, format!("placed {placed:?}"));
    let moves = stage.moves_within(AFTERWARDS)?;
    outcome.tell(format!(
        "{moves} moves in the minute afterwards, to {:?}",
        stage.spread()
    ));
    stage.close(&mut outcome);
    Ok(outcome)
}
