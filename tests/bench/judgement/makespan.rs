//! What all of it is for: sixty jobs on three machines should be done when one machine of all their CPUs would have them done.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::stage::{BUSY, HALF, Stage, list, work_a_second};
use super::{Outcome, Settings};

const JOBS: usize = 60;
/// Of all jobs, if no CPU is ever idle.
const IDEAL_SECONDS: f64 = 110.0;
/// One that takes longer is not waited for, so that all three are over in ten minutes.
const PATIENCE: Duration = Duration::from_secs(185);
const MEASURE: Duration = Duration::from_secs(12);
const NODES: [f64; 3] = [HALF; 3];
const MOST_OF_ONE_NODE: f64 = 1.15;

/// Runs the same jobs three times.
pub fn run(settings: &Settings) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let speed = speed_of_a_node(settings, &mut outcome)?;
    let jobs = jobs(speed / HALF * NODES.iter().sum::<f64>() * IDEAL_SECONDS);
    let whole: [f64; 1] = [NODES.iter().sum()];
    let mut took = Vec::new();
    for (name, quotas, automatic) in [
        ("off", &NODES[..], false),
        ("on", &NODES[..], true),
        ("one node", &whole[..], false),
    ] {
        let mut one = Outcome::default();
        let seconds = makespan(settings, quotas, automatic, &jobs, &mut one)?;
        println!(
            "    {name}: {seconds:.0} s, {} moves",
            one.figure_of("moves_begun")
        );
        outcome.figure(format!("makespan of {name}"), seconds);
        outcome.tell(format!("{name}: {seconds:.0} s; {}", one.facts.join("; ")));
        outcome.failures.append(&mut one.failures);
        outcome.moves.append(&mut one.moves);
        took.push(seconds);
    }
    let (off, on, one) = (took[0], took[1], took[2]);
    outcome.tell(format!(
        "balanced: {:.2} times as long as not, {:.2} times as long as on one node",
        on / off,
        on / one
    ));
    outcome.expect(on <= off, format!("balanced {on:.0} s, not balanced {off:.0} s"));
    outcome.expect(
        on <= one * MOST_OF_ONE_NODE,
        format!("balanced {on:.0} s, on one node {one:.0} s"),
    );
    Ok(outcome)
}

/// Pages a second that a guest gets done which has a node for itself.
fn speed_of_a_node(settings: &Settings, outcome: &mut Outcome) -> Result<f64> {
    let mut stage = Stage::start(settings, &[HALF])?;
    let vms = stage.busy_guests(&[1])?;
    let first = stage.reading(&vms)?;
    stage.watch(MEASURE, |_| false)?;
    let speed = work_a_second(&first, &stage.reading(&vms)?);
    ensure!(speed > 0.0, "the guest gets nothing done");
    outcome.figure("work_of_a_node_a_second", speed);
    Ok(speed)
}

/// Pages that each job is to dirty: a few have much of the work, as jobs do, and nobody is told which.
fn jobs(all_work: f64) -> Vec<String> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let shares: Vec<f64> = (0..JOBS)
        .map(|_| {
            // xorshift64*, of which the upper 32 bits are good.
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let number = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
            let part = (f64::from(u32::try_from(number).unwrap_or(u32::MAX)) + 1.0) / 2.0_f64.powi(32);
            -part.ln()
        })
        .collect();
    let sum: f64 = shares.iter().sum();
    let work = |share: &f64| format!("work={:.0}", (share / sum * all_work).max(1.0));
    shares.iter().map(work).collect()
}

/// From the first `run` to the end of the last job, in seconds.
fn makespan(
    settings: &Settings,
    quotas: &[f64],
    automatic: bool,
    jobs: &[String],
    outcome: &mut Outcome,
) -> Result<f64> {
    let mut stage = Stage::start(settings, quotas)?;
    if automatic {
        stage.hands_off();
    }
    let begun = Instant::now();
    for (number, work) in jobs.iter().enumerate() {
        let mut args = BUSY.to_vec();
        args.push(work);
        stage.run(&format!("job{}", number + 1), "32MiB", &args);
    }
    outcome.tell(format!(
        "placed {:?} in {:.0} s",
        stage.spread(),
        begun.elapsed().as_secs_f64()
    ));
    let ended = |stage: &Stage| list(&stage.cluster.shoal.json(&["ps"])).is_empty();
    let all = stage.watch(PATIENCE.saturating_sub(begun.elapsed()), ended)?;
    let seconds = begun.elapsed().as_secs_f64();
    outcome.expect(all, format!("not all jobs were done in {seconds:.0} s"));
    stage.close(outcome);
    Ok(seconds)
}
