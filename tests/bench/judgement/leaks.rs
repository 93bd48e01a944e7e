//! Memory that fills: a node that would run out of it is relieved in time.

use std::time::{Duration, Instant};

use anyhow::Result;
use shoal_tests::guest;

use super::host::Hogs;
use super::stage::{Stage, list};
use super::{Outcome, Settings};

/// VMs that together do not fit a node of 1 GiB once they have filled their memory.
const CROWD: [&str; 4] = ["leak1", "leak2", "leak3", "leak4"];
const LEAK: &[&str] = &[
    "fill=320MiB",
    "fill_rate=12MiB",
    "wss=16MiB",
    "rate=500",
    "pattern=random",
];
const FILLED: u64 = 320 << 20;
/// The leaks take half a minute.
const PATIENCE: Duration = Duration::from_secs(90);
/// Nothing is moved any more.
const REST: Duration = Duration::from_secs(8);

/// Runs it on the machine as it is.
pub fn quiet(settings: &Settings) -> Result<Outcome> {
    leaks(settings)
}

/// Runs it while others take the CPU.
pub fn beside_spinning(settings: &Settings) -> Result<Outcome> {
    let _hogs = Hogs::start(3)?;
    leaks(settings)
}

fn leaks(settings: &Settings) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let (mut in_time, mut highest) = (0, 0.0_f64);
    for number in 1..=settings.leaks {
        let mut one = Outcome::default();
        leak(settings, &mut one)?;
        let (peak, moves) = (one.figure_of("peak"), one.figure_of("moves_begun"));
        highest = highest.max(peak);
        let passed = one.failures.is_empty();
        in_time += u32::from(passed);
        let words = if passed {
            "in time".to_owned()
        } else {
            format!("FAILED: {}", one.failures.join("; "))
        };
        println!(
            "    leak {number} of {}: {words}; fullest node {:.0} %, {moves} moves",
            settings.leaks,
            peak * 100.0
        );
        outcome.figure(format!("peak_{number}"), peak);
        outcome.failures.extend(
            one.failures
                .into_iter()
                .map(|why| format!("leak {number}: {why}")),
        );
        outcome.moves.append(&mut one.moves);
    }
    outcome.figure("peak", highest);
    outcome.figure("in_time", f64::from(in_time));
    outcome.tell(format!(
        "{in_time} of {} in time; the fullest node came to {:.0} % of its memory",
        settings.leaks,
        highest * 100.0
    ));
    Ok(outcome)
}

fn leak(settings: &Settings, outcome: &mut Outcome) -> Result<()> {
    let mut stage = Stage::without_quotas(settings)?;
    stage.hands_off();
    stage.on_node(3, |stage| {
        CROWD.map(|name| stage.run(name, "384MiB", LEAK)).to_vec()
    })?;
    let (mut peak, mut moves, mut last_move) = (0.0_f64, 0, Instant::now());
    let ended = stage.watch(PATIENCE, |stage| {
        peak = peak.max(fullest(stage));
        if stage.begun_moves() > moves {
            (moves, last_move) = (stage.begun_moves(), Instant::now());
        }
        last_move.elapsed() >= REST && CROWD.iter().all(|name| filled(stage, name) >= FILLED)
    })?;
    outcome.figure("peak", peak);
    outcome.expect(ended, format!("not at rest after {} s", PATIENCE.as_secs()));
    outcome.expect(
        peak < 1.0,
        format!("a node's memory ran out: {:.0} %", peak * 100.0),
    );
    outcome.expect(moves > 0, "nothing was moved");
    let suspended = stage.suspensions();
    outcome.expect(suspended == 0, format!("{suspended} VMs had to be suspended"));
    stage.close(outcome);
    Ok(())
}

/// Part of the memory of the fullest node that is used.
fn fullest(stage: &Stage) -> f64 {
    let nodes = stage.cluster.shoal.json(&["nodes"]);
    let bytes = |node: &serde_json::Value, key: &str| node[key].as_f64().unwrap_or(0.0);
    let used = list(&nodes)
        .iter()
        .map(|node| 1.0 - bytes(node, "memory_available_bytes") / bytes(node, "memory_bytes"));
    used.fold(0.0, f64::max)
}

fn filled(stage: &Stage, vm: &str) -> u64 {
    let beats = guest::heartbeats(&stage.cluster.logs(vm));
    beats.last().map_or(0, |beat| beat.filled)
}
