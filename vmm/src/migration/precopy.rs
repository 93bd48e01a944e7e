//! When to stop copying and pause the VM. Pure: numbers in, decision and reason out.

use std::time::Duration;

/// Stop once the predicted downtime is this small: another pass would cost more than it saves.
const NEGLIGIBLE: Duration = Duration::from_micros(1500);
/// While passes shrink by at least this factor, another one still pays, even if the limit is met already.
const WORTHWHILE_SHRINK: f64 = 0.5;
/// At most this many passes after the limit is met, so that a guest that idles and bursts cannot hold the end off.
const EXTRA_PASSES: u32 = 5;

/// A pass that leaves more than this share of what the one before left does not get anywhere.
const NOT_SHRINKING: f64 = 0.85;
/// So many such passes in a row are a stall.
const STALLED_PASSES: u32 = 2;

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest pause.
    pub max_downtime: Duration,
    /// Longest migration, from its start to the pause.
    pub timeout: Duration,
}

/// What is known after a pass.
#[derive(Debug, Clone, Copy)]
pub struct PassFacts {
    /// Bytes that became dirty while the pass was sent: what the next one would have to send.
    pub dirty_bytes: u64,
    /// The same after the pass before, if there was one.
    pub previous_dirty_bytes: Option<u64>,
    /// Measured throughput, bytes per second.
    pub rate: f64,
    /// Pause that is there even with nothing to send: stop, state, round trips.
    pub fixed_cost: Duration,
    /// Since the migration started.
    pub elapsed: Duration,
    /// Passes since the predicted downtime first met the limit.
    pub passes_within_limit: u32,
    /// Passes in a row, before this one, that did not shrink what is left.
    pub passes_stalled: u32,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Send another pass while the guest runs.
    Continue,
    /// Pause and send the rest.
    Stop,
    /// It does not converge, for this reason; what then is the policy's to say. There is time left.
    Stalled(String),
    /// The time is up.
    TimedOut(String),
}

/// Predicted pause if the VM were stopped now.
#[must_use]
pub fn predicted_downtime(facts: &PassFacts) -> Duration {
    let seconds = facts.dirty_bytes as f64 / facts.rate.max(1.0);
    facts.fixed_cost + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 2)
}

/// Decides after a pass.
#[must_use]
pub fn decide(limits: &Limits, facts: &PassFacts) -> Decision {
    let predicted = predicted_downtime(facts);
    if predicted <= limits.max_downtime {
        let shrinking = facts
            .previous_dirty_bytes
            .is_none_or(|previous| (facts.dirty_bytes as f64) < previous as f64 * WORTHWHILE_SHRINK);
        let negligible = predicted <= NEGLIGIBLE.max(facts.fixed_cost * 2);
        if negligible
            || !shrinking
            || facts.passes_within_limit >= EXTRA_PASSES
            || facts.elapsed >= limits.timeout
        {
            return Decision::Stop;
        }
        return Decision::Continue;
    }
    let late = facts.elapsed >= limits.timeout;
    let stalled = is_stalled(facts) && facts.passes_stalled + 1 >= STALLED_PASSES;
    if !late && !stalled {
        return Decision::Continue;
    }
    let why = if facts.fixed_cost > limits.max_downtime {
        format!(
            "a pause takes {:.1} ms on this link with nothing to send, and the limit is {:.1} ms; allow more with --max-downtime",
            facts.fixed_cost.as_secs_f64() * 1e3,
            limits.max_downtime.as_secs_f64() * 1e3,
        )
    } else {
        format!(
            "did not converge within {:.1} s: {:.1} MiB are dirtied per pass, the link takes {:.1} MiB/s, so the pause would be \
             {:.0} ms and the limit is {:.0} ms; allow more with --max-downtime or --timeout, or choose --on-stall",
            facts.elapsed.as_secs_f64(),
            mebibytes(facts.dirty_bytes as f64),
            mebibytes(facts.rate),
            predicted.as_secs_f64() * 1e3,
            limits.max_downtime.as_secs_f64() * 1e3,
        )
    };
    if late {
        Decision::TimedOut(why)
    } else {
        Decision::Stalled(why)
    }
}

/// Whether this pass left hardly less than the one before.
#[must_use]
pub fn is_stalled(facts: &PassFacts) -> bool {
    facts
        .previous_dirty_bytes
        .is_some_and(|previous| facts.dirty_bytes as f64 > previous as f64 * NOT_SHRINKING)
}

fn mebibytes(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits {
        max_downtime: Duration::from_millis(50),
        timeout: Duration::from_secs(60),
    };

    fn facts() -> PassFacts {
        PassFacts {
            dirty_bytes: 0,
            previous_dirty_bytes: Some(1 << 30),
            rate: 1e9,
            fixed_cost: Duration::from_micros(500),
            elapsed: Duration::from_secs(1),
            passes_within_limit: 0,
            passes_stalled: 0,
        }
    }

    #[test]
    fn an_idle_guest_stops_after_the_first_pass() {
        assert_eq!(decide(&LIMITS, &facts()), Decision::Stop);
    }

    #[test]
    fn a_pass_that_fits_is_followed_by_another_while_that_still_shrinks_it() {
        let fits = PassFacts {
            dirty_bytes: 20_000_000,
            ..facts()
        };
        assert_eq!(decide(&LIMITS, &fits), Decision::Continue);
        let steady = PassFacts {
            previous_dirty_bytes: Some(21_000_000),
            ..fits
        };
        assert_eq!(decide(&LIMITS, &steady), Decision::Stop);
        let long_enough = PassFacts {
            passes_within_limit: EXTRA_PASSES,
            ..fits
        };
        assert_eq!(decide(&LIMITS, &long_enough), Decision::Stop);
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_given_up_at_the_timeout_with_numbers() {
        let busy = PassFacts {
            dirty_bytes: 1 << 30,
            ..facts()
        };
        assert_eq!(decide(&LIMITS, &busy), Decision::Continue);
        let again = PassFacts {
            passes_stalled: 1,
            ..busy
        };
        assert!(matches!(decide(&LIMITS, &again), Decision::Stalled(_)));
        let late = PassFacts {
            elapsed: Duration::from_secs(61),
            ..busy
        };
        let Decision::TimedOut(reason) = decide(&LIMITS, &late) else {
            panic!("not given up")
        };
        assert!(
            reason.contains("1024.0 MiB") && reason.contains("--max-downtime"),
            "{reason}"
        );
    }

    proptest! {
        #[test]
        fn it_never_stops_over_the_limit_and_always_ends(dirty: u64, previous: Option<u64>, rate in 0f64..1e12, elapsed_ms in 0u64..120_000, within in 0u32..10, stalled in 0u32..3) {
            let facts = PassFacts {
                dirty_bytes: dirty,
                previous_dirty_bytes: previous,
                rate,
                elapsed: Duration::from_millis(elapsed_ms),
                passes_within_limit: within,
                passes_stalled: stalled,
                ..facts()
            };
            let decision = decide(&LIMITS, &facts);
            if decision == Decision::Stop {
                prop_assert!(predicted_downtime(&facts) <= LIMITS.max_downtime);
            }
            if facts.elapsed >= LIMITS.timeout {
                prop_assert!(matches!(decision, Decision::Stop | Decision::TimedOut(_)));
            }
        }
    }
}
