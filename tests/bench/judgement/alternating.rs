//! VMs that are busy and idle in turns. On average their node is used less than the others, by less than a VM; at any moment it looks
//! either idle or as busy as they are. Who follows the moment moves VMs for ever.

use std::time::Duration;

use anyhow::Result;

use super::stage::{HALF, Stage};
use super::{Outcome, Settings};

const WINDOW: Duration = Duration::from_secs(300);
const MOST_MOVES: usize = 1;
/// Twenty seconds of counting, twenty of sleep, by the clock that all guests share.
const IN_TURNS: &str = "while :; do if [ $(( $(date +%s) / 20 % 2 )) = 0 ]; then i=0; while [ $i -lt 20000 ]; \
                        do i=$((i+1)); done; else sleep 0.5; fi; done";

/// Two that alternate, in step, on node1; two busy ones on each other node.
pub fn run(settings: &Settings) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut stage = Stage::start(settings, &[HALF; 3])?;
    let vms = stage.busy_guests(&[0, 2, 2])?;
    stage.on_node(1, |stage| {
        ["turns1", "turns2"]
            .map(|name| stage.run_image("linux", name, "128MiB", &["sh", "-c", IN_TURNS]))
            .to_vec()
    })?;
    stage.hands_off();
    let moves = stage.moves_within(WINDOW)?;
    outcome.expect(moves <= MOST_MOVES, format!("{moves} moves"));
    outcome.tell(format!(
        "{} busy VMs, 2 in turns: {:?} at the end",
        vms.len(),
        stage.spread()
    ));
    stage.close(&mut outcome);
    Ok(outcome)
}
