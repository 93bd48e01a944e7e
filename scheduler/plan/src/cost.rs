//! What a migration is expected to take and to cost, and whether it pays.
//!
//! Pre-copy sends all memory, then what was written meanwhile, and so on; each pass is *dirty rate / link rate* of the one
//! before, and never more than the working set of its writes. The VM is paused for the last, when it takes no longer than the
//! downtime that is aimed for.

use std::time::Duration;

use crate::cluster::Vm;
use crate::policy::Policy;

/// To stop the VM, send its devices' state and start it again.
const FIXED_DOWNTIME_SECONDS: f64 = 0.005;
/// No VM is taken for younger when it is asked how long it will run on.
const YOUNGEST_SECONDS: f64 = 60.0;
/// A guest that writes so fast that passes do not shrink is paused after so many.
const MOST_PASSES: i32 = 30;

/// How balancing weighs gain and cost: the policy's values at its aggressiveness.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    /// The least gain worth a move, its cost taken off.
    pub min_gain: f64,
    /// In this time it must have paid back.
    payback_seconds: f64,
}

/// What one migration costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cost {
    /// How long it takes.
    pub seconds: f64,
    /// For how long the VM is paused.
    pub downtime: f64,
    /// Score times seconds.
    pub total: f64,
    /// For how many seconds the VM has run; infinite if that is not known.
    pub age: f64,
}

impl Terms {
    /// None: nothing is moved for balance.
    pub fn new(policy: &Policy) -> Option<Self> {
        let (gain, time) = match policy.aggressiveness {
            0 | 1 => return None,
            2 => (2.0, 0.5),
            3 => (1.0, 1.0),
            4 => (0.5, 2.0),
            _ => (0.25, 4.0),
        };
        Some(Self {
            min_gain: policy.min_gain * gain,
            payback_seconds: policy.payback.as_secs_f64() * time,
        })
    }

    /// What is left of a gain when the time without it and the cost are taken off, spread over the time to pay back in.
    /// Not more than 0: it does not pay back.
    pub fn net(&self, gain: f64, cost: Cost) -> f64 {
        let lasts = expected_within(self.payback_seconds, cost.age);
        (gain * (lasts - cost.seconds) - cost.total) / self.payback_seconds
    }

    /// When a move with this gain has paid back, from its start.
    pub fn pays_back_after(gain: f64, cost: Cost) -> Duration {
        crate::cluster::duration(cost.seconds + cost.total / gain.max(1e-9))
    }
}

impl Cost {
    /// Of two moves, one after the other.
    pub fn then(self, other: Self) -> Self {
        Self {
            seconds: self.seconds + other.seconds,
            ..self.and(other)
        }
    }

    /// Of two moves at the same time.
    pub fn and(self, other: Self) -> Self {
        Self {
            seconds: self.seconds.max(other.seconds),
            downtime: self.downtime.max(other.downtime),
            total: self.total + other.total,
            age: self.age.min(other.age),
        }
    }
}

/// What moving a VM costs now. One of high priority is dearer.
pub(crate) fn cost(policy: &Policy, vm: &Vm<'_>) -> Cost {
    let predicted = downtime(policy, vm.resident, vm.dirty, vm.working_set, vm.link);
    // What has hurt it before may again.
    let downtime = vm
        .view
        .longest_pause
        .map_or(predicted, |pause| predicted.max(pause.as_secs_f64()));
    let price = policy.cost_per_second * vm.move_seconds + policy.cost_of_downtime * downtime;
    Cost {
        seconds: vm.move_seconds,
        downtime,
        total: price * f64::from(vm.view.priority.min(9) + 1) / 6.0,
        age: vm.view.ran.map_or(f64::INFINITY, |ran| ran.as_secs_f64()),
    }
}

/// For how many of the next seconds a VM of that age will run, on average: what has run for so long runs on for as long again with
/// probability one half, as processes do (Harchol-Balter and Downey, Exploiting Process Lifetime Distributions for Dynamic Load
/// Balancing, 1997).
fn expected_within(seconds: f64, age: f64) -> f64 {
    if age.is_infinite() {
        return seconds;
    }
    let age = age.max(YOUNGEST_SECONDS);
    age * (seconds / age).ln_1p()
}

/// Seconds of pause at the end of pre-copy.
fn downtime(policy: &Policy, resident: f64, dirty: f64, working_set: f64, link: f64) -> f64 {
    let aim = policy.max_downtime.as_secs_f64() * link;
    let shrinks = (dirty / link).min(0.99);
    let mut left = resident;
    for _ in 0..MOST_PASSES {
        left = (left * shrinks).min(working_set);
        if left <= aim {
            break;
        }
    }
    FIXED_DOWNTIME_SECONDS + left / link
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downtime_is_what_the_last_pass_takes() {
        let policy = Policy::default();
        let (gib, link) = (f64::from(1 << 30), 125e6);
        let downtime = |dirty: f64, set: f64| downtime(&policy, gib, dirty, set, link);
        let all = f64::INFINITY;
        assert_eq!(downtime(0.0, all), FIXED_DOWNTIME_SECONDS);
        // 8.6 s of link, a tenth of it dirtied in each pass: 0.86 s, 0.086 s, 0.0086 s.
        let third = downtime(12.5e6, all) - FIXED_DOWNTIME_SECONDS;
        assert!((third - 0.00859).abs() < 1e-4, "{third}");
        // It does not converge: all but what 30 passes take off.
        assert!(downtime(1e9, all) > 6.0);
        // All it writes is sent in 8 ms, however fast it writes.
        assert!((downtime(1e9, 1e6) - FIXED_DOWNTIME_SECONDS - 0.008).abs() < 1e-9);
    }

    #[test]
    fn what_has_run_for_long_is_expected_to_run_on() {
        let of_age = |age| expected_within(600.0, age);
        assert_eq!(of_age(f64::INFINITY), 600.0);
        assert!((of_age(600.0) - 600.0 * 2f64.ln()).abs() < 1e-9);
        assert!(of_age(1e7) > 599.0 && of_age(3600.0) > of_age(600.0) && of_age(60.0) < 150.0);
        assert_eq!(of_age(1.0), of_age(60.0));
    }

    #[test]
    fn a_level_more_moves_for_less_and_waits_longer_for_it() {
        let level = |aggressiveness| {
            Terms::new(&Policy {
                aggressiveness,
                ..Policy::default()
            })
        };
        assert!(level(1).is_none());
        for now in 2..5 {
            let (now, more) = (level(now).expect("a level"), level(now + 1).expect("a level"));
            assert!(more.min_gain < now.min_gain && more.payback_seconds > now.payback_seconds);
        }
        let cost = Cost {
            seconds: 20.0,
            downtime: 0.05,
            total: 25.0,
            age: f64::INFINITY,
        };
        let terms = level(3).expect("a level");
        assert!((terms.net(3.0, cost) - (3.0 * 580.0 - 25.0) / 600.0).abs() < 1e-9);
        assert!(
            terms.net(
                3.0,
                Cost {
                    seconds: 700.0,
                    ..cost
                }
            ) < 0.0
        );
        assert_eq!(Terms::pays_back_after(5.0, cost), Duration::from_secs(25));
    }
}
