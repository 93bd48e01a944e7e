//! What a move was worth: the run is repeated without it. Everything else is done as it was done, at the same moments: other
//! moves, starts, suspensions. So the difference is that one move's. Two moves between the same nodes in opposite directions
//! in one round are one exchange: they are left out together, and each gets half.

use super::log::{Chosen, Decision, Done, Harm, Log};
use super::{Driver, Engine};
use crate::measure::{ANY_REASON, Outcome};
use crate::random::Random;
use crate::world::Life;

/// A move is judged by so many seconds after it.
const WINDOW_SECONDS: f64 = 600.0;
/// CPU seconds, or node-seconds, that are rounding.
const NOTHING: f64 = 1e-6;

/// Does what is in a log.
#[derive(Debug, Clone)]
struct Replay<'a> {
    log: &'a Log,
    next: usize,
    /// Entries that are left out.
    without: [usize; 2],
    /// Until the last report.
    harm: Harm,
}

impl Driver for Replay<'_> {
    fn arrived(&mut self, engine: &mut Engine<'_>, vm: usize, first: bool) {
        engine.news.clear();
        let starts = |done: &Done| matches!(done.what, Decision::Start { vm: other, .. } if other == vm);
        match self.log.done.get(self.next) {
            Some(done) if starts(done) && done.time <= engine.now => {
                self.next += 1;
                engine.carry_out(&done.what);
            }
            // It was killed only here: nobody has said where it starts.
            _ if !first && !self.log.done[self.next..].iter().any(starts) => {
                if let Some(node) = engine.emptiest(vm) {
                    engine.carry_out(&Decision::Start { vm, node });
                }
            }
            _ => {}
        }
    }

    fn reported(&mut self, engine: &mut Engine<'_>) {
        engine.news.clear();
        self.harm = engine.harm();
        while let Some(done) = self.log.done.get(self.next)
            && done.time <= engine.now
        {
            if !self.without.contains(&self.next) {
                engine.carry_out(&done.what);
            }
            self.next += 1;
        }
    }
}

/// Judges up to `most` moves of a run, drawn at random where there are more, and says what came out. `start` is where the run
/// began.
pub(super) fn judge(start: Engine<'_>, log: &Log, most: usize, seed: u64, outcome: &mut Outcome) {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a small count
    let window = (WINDOW_SECONDS / start.scenario.interval).ceil() as u64;
    let last = log.harm.len() as u64;
    let mut moves: Vec<usize> = (0..log.done.len())
        .filter(|&at| chosen(&log.done[at]).is_some() && log.done[at].reports + window < last)
        .collect();
    let mut random = Random::fork(seed, "moves that are judged");
    for at in 0..moves.len().min(most) {
        let other = at + random.below(moves.len() - at);
        moves.swap(at, other);
    }
    moves.truncate(most);
    moves.sort_unstable();
    let mut engine = start;
    engine.limited = false;
    let mut replay = Replay {
        log,
        next: 0,
        without: [usize::MAX; 2],
        harm: Harm::default(),
    };
    for at in moves {
        let done = &log.done[at];
        let Some(choice) = chosen(done) else { continue };
        engine.run_to(done.reports, &mut replay);
        let (mut fork, mut without) = (engine.clone(), replay.clone());
        let back = exchange(log, at);
        without.without = [at, back.unwrap_or(usize::MAX)];
        let until = done.reports + window;
        if !fork.run_to(until + 1, &mut without) {
            continue;
        }
        let Some(with) = usize::try_from(until).ok().and_then(|at| log.harm.get(at)) else {
            continue;
        };
        let both = without.harm.lost - with.lost;
        let gain = if back.is_some() { both / 2.0 } else { both };
        let relieves = without.harm.above - with.above > NOTHING;
        outcome.judged += 1.0;
        outcome.realised += gain;
        let unpaid = gain <= NOTHING;
        outcome.unpaid += f64::from(u8::from(unpaid));
        let needless = f64::from(u8::from(unpaid && !relieves));
        outcome.needless += needless;
        if let Some(predicted) = choice.predicted {
            outcome.predicted += predicted;
            outcome.realised_of_predicted += gain;
        }
        let reason = choice
            .kind
            .map_or_else(|| ANY_REASON.to_owned(), |kind| kind.to_string());
        let by = outcome.by_reason.entry(reason).or_default();
        (by.judged, by.needless, by.realised) = (by.judged + 1.0, by.needless + needless, by.realised + gain);
    }
}

fn chosen(done: &Done) -> Option<&Chosen> {
    match &done.what {
        Decision::Move(chosen) => Some(chosen),
        _ => None,
    }
}

/// The move of the same round that goes the other way, if there is exactly one each way.
fn exchange(log: &Log, at: usize) -> Option<usize> {
    let done = &log.done[at];
    let to = chosen(done)?.to;
    let round = |other: &Done| other.reports == done.reports && chosen(other).is_some();
    let before = log.done[..at]
        .iter()
        .rev()
        .take_while(|other| other.reports == done.reports);
    let first = at - before.count();
    let of_round: Vec<usize> = (first..log.done.len())
        .take_while(|&other| log.done[other].reports == done.reports)
        .filter(|&other| round(&log.done[other]))
        .collect();
    let ways = |from: usize, to: usize| -> Vec<usize> {
        let same = |&&other: &&usize| {
            log.done[other].from == from && chosen(&log.done[other]).is_some_and(|chosen| chosen.to == to)
        };
        of_round.iter().filter(same).copied().collect()
    };
    match (ways(done.from, to).as_slice(), ways(to, done.from).as_slice()) {
        ([_], [back]) => Some(*back),
        _ => None,
    }
}

impl Engine<'_> {
    /// The node with the fewest VMs that has enough memory for one more.
    fn emptiest(&self, vm: usize) -> Option<usize> {
        let declared = self.vms[vm].spec.declared;
        let overcommit = self.scenario.policy.overcommit;
        let fits = |&node: &usize| {
            let node = &self.nodes[node];
            let given: f64 = node.vms.iter().map(|&vm| self.vms[vm].spec.declared).sum();
            given + declared <= node.spec.memory as f64 * overcommit
        };
        (0..self.nodes.len())
            .filter(fits)
            .min_by_key(|&node| self.nodes[node].vms.len())
    }

    /// Carries out a decision, if it still can be; answers where a VM that moves came from.
    pub(super) fn carry_out(&mut self, decision: &Decision) -> Option<usize> {
        match *decision {
            Decision::Start { vm, node } => {
                let waits = self.vms[vm].life == Life::Waiting;
                waits.then(|| {
                    self.start(vm, node);
                    node
                })
            }
            Decision::Move(chosen) => self.begin(chosen),
            Decision::Suspend { vm, growth } => self.suspend(vm, growth),
            Decision::Resume(vm) => self.resume(vm),
            Decision::Preempt(vm) => self.preempt(vm),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log of all decisions gives the very same run.
    #[test]
    fn a_run_that_is_repeated_is_the_same() {
        for name in ["hot-node", "leak", "herd"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("scenarios/{name}.txt"));
            let mut scenario = crate::load(&path).expect("a scenario");
            scenario.duration = 900.0;
            for kind in [
                crate::PolicyKind::Shoal,
                crate::PolicyKind::OpenMosix,
                crate::PolicyKind::Random,
            ] {
                let specs = crate::engine::vm_specs(&scenario, 1);
                let mut engine = Engine::new(&scenario, &specs, 1);
                let mut live = crate::engine::Live::new(&engine, kind.build(&scenario, 1));
                engine.run(&mut live);
                let mut again = Engine::new(&scenario, &specs, 1);
                again.limited = false;
                let mut replay = Replay {
                    log: &live.log,
                    next: 0,
                    without: [usize::MAX; 2],
                    harm: Harm::default(),
                };
                for (at, harm) in live.log.harm.iter().enumerate() {
                    assert!(again.run_to(at as u64 + 1, &mut replay));
                    assert_eq!(replay.harm, *harm, "{name} {} at {at}", kind.name());
                }
                assert_eq!(live.log.harm.len(), 900, "a report a second");
                assert_eq!(replay.next, live.log.done.len(), "everything was done again");
            }
        }
    }
}
