//! What a run is judged by.

use std::collections::BTreeMap;

use serde::Serialize;

/// A point in time of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds.
    pub time: f64,
    /// Standard deviation over the nodes of CPU wanted / CPUs, plus that of memory held / memory.
    pub imbalance: f64,
    /// Nodes that are not empty.
    pub active: f64,
    /// Nodes above the memory threshold.
    pub above: f64,
}

/// What one policy made of one scenario: a run, or the mean of several.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Its name.
    pub policy: String,
    /// Work wanted / work done, mean over VMs; 1 is the best there is.
    pub slowdown_mean: f64,
    /// The same, 99th percentile.
    pub slowdown_p99: f64,
    /// Node-seconds above the memory threshold.
    pub above_threshold: f64,
    /// VMs killed because memory ran out.
    pub oom: f64,
    /// Migrations that were begun.
    pub begun: f64,
    /// Migrations that ended well.
    pub migrations: f64,
    /// Those that did not: the VM ended or was killed meanwhile.
    pub failed: f64,
    /// Bytes sent by all of them.
    pub bytes: f64,
    /// Longest time that a migration stopped a VM, seconds.
    pub downtime_max: f64,
    /// Moves that went back to where the VM came from less than a minute before.
    pub undone: f64,
    /// Moves that were judged: the run was repeated without each of them, up to ten minutes later.
    pub judged: f64,
    /// Those of them without which no more work would have been lost, and no node would have been above its memory threshold for
    /// longer: see [`Outcome::needless_part`].
    pub needless: f64,
    /// Those of them without which no more work would have been lost.
    pub unpaid: f64,
    /// What they gained together: CPU seconds of work that would have been lost without them.
    pub realised: f64,
    /// What the policy had expected of those of which it expected anything, and what these gained.
    pub predicted: f64,
    /// See `predicted`.
    pub realised_of_predicted: f64,
    /// The same by what a move was for, where the policy says.
    pub by_reason: BTreeMap<String, Judged>,
    /// Moves that left two nodes with what they held: a VM came back within a minute, or one just like it went the other way.
    pub equals: f64,
    /// VMs suspended to save memory.
    pub suspended: f64,
    /// VMs stopped for others of higher priority.
    pub preempted: f64,
    /// VM-seconds without a place.
    pub waiting: f64,
    /// Mean over time of [`Sample::imbalance`].
    pub imbalance: f64,
    /// Mean number of nodes that are not empty.
    pub active: f64,
    /// Energy of those, kWh.
    pub energy: f64,
    /// Part of the time of active nodes that they were at 100 % CPU: the sum over nodes, as CloudSim counts it.
    pub slatah: f64,
    /// Part of the work wanted that migrations cost, mean over VMs.
    pub pdm: f64,
    /// Energy × SLATAH × PDM.
    pub esv: f64,
    /// VMs that ended.
    pub ended: f64,
    /// VMs there at the end, with and without a place.
    pub left: f64,
    /// Over time, of the first run; at most [`MOST_SAMPLES`].
    pub series: Vec<Sample>,
}

/// Of a move of which its policy says nothing.
pub(crate) const ANY_REASON: &str = "any";

/// Moves of one kind that were judged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Judged {
    /// How many.
    pub judged: f64,
    /// Those that were needless.
    pub needless: f64,
    /// What they gained together, CPU seconds.
    pub realised: f64,
}

/// Points kept of a run.
pub const MOST_SAMPLES: usize = 120;

impl Outcome {
    /// The mean of several runs of the same policy.
    #[must_use]
    pub fn mean(runs: &[Self]) -> Option<Self> {
        let mut mean = runs.first()?.clone();
        let count = runs.len() as f64;
        let of = |field: fn(&Self) -> f64| runs.iter().map(field).sum::<f64>() / count;
        mean.slowdown_mean = of(|run| run.slowdown_mean);
        mean.slowdown_p99 = of(|run| run.slowdown_p99);
        mean.above_threshold = of(|run| run.above_threshold);
        mean.oom = of(|run| run.oom);
        mean.begun = of(|run| run.begun);
        mean.migrations = of(|run| run.migrations);
        mean.judged = of(|run| run.judged);
        mean.needless = of(|run| run.needless);
        mean.unpaid = of(|run| run.unpaid);
        mean.realised = of(|run| run.realised);
        mean.predicted = of(|run| run.predicted);
        mean.realised_of_predicted = of(|run| run.realised_of_predicted);
        mean.by_reason.clear();
        for (reason, judged) in runs.iter().flat_map(|run| &run.by_reason) {
            let by = mean.by_reason.entry(reason.clone()).or_default();
            by.judged += judged.judged / count;
            by.needless += judged.needless / count;
            by.realised += judged.realised / count;
        }
        mean.equals = of(|run| run.equals);
        mean.suspended = of(|run| run.suspended);
        mean.preempted = of(|run| run.preempted);
        mean.failed = of(|run| run.failed);
        mean.bytes = of(|run| run.bytes);
        mean.downtime_max = runs.iter().map(|run| run.downtime_max).fold(0.0, f64::max);
        mean.undone = of(|run| run.undone);
        mean.waiting = of(|run| run.waiting);
        mean.imbalance = of(|run| run.imbalance);
        mean.active = of(|run| run.active);
        mean.energy = of(|run| run.energy);
        mean.slatah = of(|run| run.slatah);
        mean.pdm = of(|run| run.pdm);
        mean.esv = of(|run| run.esv);
        mean.ended = of(|run| run.ended);
        mean.left = of(|run| run.left);
        Some(mean)
    }

    /// Part of the moves that were needless, as far as they were judged; none if none was.
    #[must_use]
    pub fn needless_part(&self) -> Option<f64> {
        (self.judged > 0.0).then(|| self.needless / self.judged)
    }
}

/// The value that a part of all values does not pass; 0 of none.
pub(crate) fn percentile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // an index below the length
    let at = ((values.len() as f64 * part).ceil() as usize).saturating_sub(1);
    values.get(at).copied().unwrap_or(0.0)
}

pub(crate) fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (mut count, mut sum) = (0.0, 0.0);
    for value in values {
        count += 1.0;
        sum += value;
    }
    if count > 0.0 { sum / count } else { 0.0 }
}

pub(crate) fn deviation(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let average = mean(values.clone());
    mean(values.map(|value| (value - average).powi(2))).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_and_deviation() {
        let mut values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&mut values, 0.99), 198.0);
        assert_eq!(percentile(&mut [], 0.99), 0.0);
        assert_eq!(deviation([1.0, 3.0].into_iter()), 1.0);
    }
}
