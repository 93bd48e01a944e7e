//! How a migration is to go: what was asked for, over the cluster's defaults, over what is built in.

use std::sync::{PoisonError, RwLock};

use bytesize::ByteSize;
use shoal_plan::ActionKind;
use shoal_proto::LEAST_BANDWIDTH;
use shoal_proto::cluster::MigrationDefaults;
use shoal_proto::vm::{Compression, MigrationPolicy, OnStall, Verify};

use crate::limits::FieldError;

const WEEK_MS: u64 = 7 * 24 * 3600 * 1000;
const MAX_CONNECTIONS: u32 = 16;
const MAX_PRIORITY: u32 = 9;

/// Why a VM is moved, as far as its policy depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A user said so.
    Requested,
    /// The planner did.
    Planned(ActionKind),
}

/// What holds if nobody says anything.
fn built_in() -> MigrationPolicy {
    MigrationPolicy {
        max_downtime_ms: Some(50),
        timeout_ms: Some(10 * 60 * 1000),
        on_stall: OnStall::Cancel.into(),
        bandwidth_bytes_per_second: Some(0),
        connections: Some(0),
        compression: Compression::Auto.into(),
        verify: Verify::Off.into(),
        priority: Some(5),
    }
}

/// Fields that `over` sets, and `under`'s for the rest.
pub fn merge(over: &MigrationPolicy, under: &MigrationPolicy) -> MigrationPolicy {
    let choose = |over: i32, under: i32| if over == 0 { under } else { over };
    MigrationPolicy {
        max_downtime_ms: over.max_downtime_ms.or(under.max_downtime_ms),
        timeout_ms: over.timeout_ms.or(under.timeout_ms),
        on_stall: choose(over.on_stall, under.on_stall),
        bandwidth_bytes_per_second: over
            .bandwidth_bytes_per_second
            .or(under.bandwidth_bytes_per_second),
        connections: over.connections.or(under.connections),
        compression: choose(over.compression, under.compression),
        verify: choose(over.verify, under.verify),
        priority: over.priority.or(under.priority),
    }
}

/// The whole policy of one migration. A VM that leaves for want of memory, or because an operator empties its node, is
/// slowed down rather than kept; one that moves for balance is never worth that.
pub fn resolve(asked: &MigrationPolicy, defaults: &MigrationPolicy, cause: Cause) -> MigrationPolicy {
    let mut policy = merge(asked, &merge(defaults, &built_in()));
    let said = asked.on_stall != 0 || defaults.on_stall != 0;
    match cause {
        Cause::Planned(ActionKind::Rebalance | ActionKind::Swap) => policy.set_on_stall(OnStall::Cancel),
        Cause::Planned(ActionKind::Usher | ActionKind::Drain) if !said => {
            policy.set_on_stall(OnStall::Throttle);
        }
        Cause::Planned(_) | Cause::Requested => {}
    }
    policy
}

/// Refuses what is out of range, by the field's name.
pub fn check(policy: &MigrationPolicy) -> Result<(), FieldError> {
    range_ms("max_downtime_ms", policy.max_downtime_ms)?;
    range_ms("timeout_ms", policy.timeout_ms)?;
    known::<OnStall>(
        "on_stall",
        policy.on_stall,
        "throttle, post-copy, cancel or force",
    )?;
    known::<Compression>("compression", policy.compression, "auto, off, lz4 or zstd")?;
    known::<Verify>("verify", policy.verify, "off, sampled or full")?;
    bandwidth("bandwidth_bytes_per_second", policy.bandwidth_bytes_per_second)?;
    at_most("connections", policy.connections, MAX_CONNECTIONS)?;
    at_most("priority", policy.priority, MAX_PRIORITY)
}

fn range_ms(field: &'static str, value: Option<u64>) -> Result<(), FieldError> {
    match value {
        Some(ms) if !(1..=WEEK_MS).contains(&ms) => {
            Err(FieldError::new(field, &format!("{ms} ms"), "1 ms to a week"))
        }
        _ => Ok(()),
    }
}

fn at_most(field: &'static str, value: Option<u32>, most: u32) -> Result<(), FieldError> {
    match value {
        Some(value) if value > most => Err(FieldError::new(
            field,
            &value.to_string(),
            &format!("0 to {most}"),
        )),
        _ => Ok(()),
    }
}

fn bandwidth(field: &'static str, value: Option<u64>) -> Result<(), FieldError> {
    match value {
        Some(rate) if rate != 0 && rate < LEAST_BANDWIDTH => Err(FieldError::new(
            field,
            &format!("{rate} bytes a second"),
            &format!(
                "0 for no cap, or at least {} a second",
                ByteSize::b(LEAST_BANDWIDTH)
            ),
        )),
        _ => Ok(()),
    }
}

fn known<E: TryFrom<i32>>(field: &'static str, value: i32, expected: &str) -> Result<(), FieldError> {
    match E::try_from(value) {
        Ok(_) => Ok(()),
        Err(_) => Err(FieldError::new(field, &value.to_string(), expected)),
    }
}

/// The cluster's defaults in memory; the store is written first.
#[derive(Debug, Default)]
pub struct Defaults {
    set: RwLock<MigrationDefaults>,
    /// Held while they are changed.
    pub changing: tokio::sync::Mutex<()>,
}

impl Defaults {
    /// As they were stored, maybe by a scheduler that took smaller caps than hold: then the least there is.
    pub fn new(mut stored: MigrationDefaults) -> Self {
        let policy = stored.policy.as_mut();
        let caps = [
            policy.and_then(|policy| policy.bandwidth_bytes_per_second.as_mut()),
            stored.cluster_bandwidth_bytes_per_second.as_mut(),
            stored.link_bandwidth_bytes_per_second.as_mut(),
        ];
        for cap in caps.into_iter().flatten().filter(|cap| **cap != 0) {
            *cap = (*cap).max(LEAST_BANDWIDTH);
        }
        Self {
            set: RwLock::new(stored),
            changing: tokio::sync::Mutex::default(),
        }
    }

    /// What an operator has set, and nothing else.
    pub fn set(&self) -> MigrationDefaults {
        *self.set.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of what an operator has set, the policy.
    pub fn policy(&self) -> MigrationPolicy {
        self.set().policy.unwrap_or_default()
    }

    /// Shows what has been stored.
    pub fn replace(&self, defaults: MigrationDefaults) {
        *self.set.write().unwrap_or_else(PoisonError::into_inner) = defaults;
    }
}

/// What is to be stored after a request to change the defaults.
pub fn change(now: &MigrationDefaults, request: &MigrationDefaults) -> Result<MigrationDefaults, FieldError> {
    let policy = request.policy.unwrap_or_default();
    check(&policy)?;
    bandwidth(
        "cluster_bandwidth_bytes_per_second",
        request.cluster_bandwidth_bytes_per_second,
    )?;
    bandwidth(
        "link_bandwidth_bytes_per_second",
        request.link_bandwidth_bytes_per_second,
    )?;
    let now = if request.reset {
        &MigrationDefaults::default()
    } else {
        now
    };
    Ok(MigrationDefaults {
        policy: Some(merge(&policy, &now.policy.unwrap_or_default())),
        cluster_bandwidth_bytes_per_second: request
            .cluster_bandwidth_bytes_per_second
            .or(now.cluster_bandwidth_bytes_per_second),
        link_bandwidth_bytes_per_second: request
            .link_bandwidth_bytes_per_second
            .or(now.link_bandwidth_bytes_per_second),
        reset: false,
    })
}

/// Everything that holds, for people: what is set, and what is built in for the rest. `on_stall` stays unset if nobody
/// set it, because it then depends on why a VM moves.
pub fn whole(set: &MigrationDefaults) -> MigrationDefaults {
    let policy = set.policy.unwrap_or_default();
    let mut whole = merge(&policy, &built_in());
    whole.on_stall = policy.on_stall;
    MigrationDefaults {
        policy: Some(whole),
        cluster_bandwidth_bytes_per_second: Some(set.cluster_bandwidth_bytes_per_second.unwrap_or(0)),
        link_bandwidth_bytes_per_second: Some(set.link_bandwidth_bytes_per_second.unwrap_or(0)),
        reset: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_goes_over_the_defaults_and_these_over_what_is_built_in() {
        let defaults = MigrationPolicy {
            max_downtime_ms: Some(20),
            priority: Some(0),
            ..Default::default()
        };
        let asked = MigrationPolicy {
            priority: Some(9),
            verify: Verify::Full.into(),
            ..Default::default()
        };
        let policy = resolve(&asked, &defaults, Cause::Requested);
        assert_eq!((policy.max_downtime_ms, policy.priority), (Some(20), Some(9)));
        assert_eq!(
            (policy.verify(), policy.timeout_ms),
            (Verify::Full, Some(600_000))
        );
        assert_eq!(policy.on_stall(), OnStall::Cancel);
    }

    #[test]
    fn what_is_done_at_a_stall_depends_on_why_a_vm_moves() {
        let nothing = MigrationPolicy::default();
        let said = MigrationPolicy {
            on_stall: OnStall::PostCopy.into(),
            ..Default::default()
        };
        for (kind, unsaid, with_defaults) in [
            (ActionKind::Usher, OnStall::Throttle, OnStall::PostCopy),
            (ActionKind::Drain, OnStall::Throttle, OnStall::PostCopy),
            (ActionKind::Rules, OnStall::Cancel, OnStall::PostCopy),
            (ActionKind::Rebalance, OnStall::Cancel, OnStall::Cancel),
            (ActionKind::Swap, OnStall::Cancel, OnStall::Cancel),
        ] {
            let resolved = |defaults| resolve(&nothing, defaults, Cause::Planned(kind)).on_stall();
            assert_eq!(
                (resolved(&nothing), resolved(&said)),
                (unsaid, with_defaults),
                "{kind}"
            );
        }
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        let policy = MigrationPolicy::default;
        for (bad, field) in [
            (
                MigrationPolicy {
                    max_downtime_ms: Some(0),
                    ..policy()
                },
                "max_downtime_ms",
            ),
            (
                MigrationPolicy {
                    timeout_ms: Some(u64::MAX),
                    ..policy()
                },
                "timeout_ms",
            ),
            (
                MigrationPolicy {
                    on_stall: 77,
                    ..policy()
                },
                "on_stall",
            ),
            (
                MigrationPolicy {
                    bandwidth_bytes_per_second: Some(LEAST_BANDWIDTH - 1),
                    ..policy()
                },
                "bandwidth_bytes_per_second",
            ),
            (
                MigrationPolicy {
                    connections: Some(17),
                    ..policy()
                },
                "connections",
            ),
            (
                MigrationPolicy {
                    compression: -1,
                    ..policy()
                },
                "compression",
            ),
            (
                MigrationPolicy {
                    verify: 9,
                    ..policy()
                },
                "verify",
            ),
            (
                MigrationPolicy {
                    priority: Some(10),
                    ..policy()
                },
                "priority",
            ),
        ] {
            let error = check(&bad).expect_err(field).to_string();
            assert!(error.starts_with(&format!("{field}: ")), "{error}");
        }
        check(&built_in()).expect("within its own limits");
        check(&policy()).expect("nothing is asked for");
    }

    #[test]
    fn defaults_are_changed_field_by_field_and_can_be_reset() {
        let first = MigrationDefaults {
            policy: Some(MigrationPolicy {
                timeout_ms: Some(1000),
                ..Default::default()
            }),
            link_bandwidth_bytes_per_second: Some(1 << 20),
            ..Default::default()
        };
        let set = change(&MigrationDefaults::default(), &first).expect("good");
        let second = MigrationDefaults {
            policy: Some(MigrationPolicy {
                priority: Some(1),
                ..Default::default()
            }),
            ..Default::default()
        };
        let set = change(&set, &second).expect("good");
        let policy = set.policy.expect("a policy");
        assert_eq!((policy.timeout_ms, policy.priority), (Some(1000), Some(1)));
        assert_eq!(set.link_bandwidth_bytes_per_second, Some(1 << 20));
        let reset = MigrationDefaults {
            reset: true,
            ..Default::default()
        };
        let set = change(&set, &reset).expect("good");
        assert_eq!(whole(&set), whole(&MigrationDefaults::default()));
        let bad = MigrationDefaults {
            cluster_bandwidth_bytes_per_second: Some(5),
            ..Default::default()
        };
        let error = change(&set, &bad).expect_err("too little").to_string();
        assert!(error.starts_with("cluster_bandwidth"), "{error}");
    }

    #[test]
    fn caps_stored_by_an_older_scheduler_are_raised_to_what_holds() {
        let stored = MigrationDefaults {
            policy: Some(MigrationPolicy {
                bandwidth_bytes_per_second: Some(64 << 10),
                ..Default::default()
            }),
            cluster_bandwidth_bytes_per_second: Some(64 << 10),
            link_bandwidth_bytes_per_second: Some(0),
            reset: false,
        };
        let set = Defaults::new(stored).set();
        let policy = set.policy.expect("a policy");
        assert_eq!(policy.bandwidth_bytes_per_second, Some(LEAST_BANDWIDTH));
        assert_eq!(set.cluster_bandwidth_bytes_per_second, Some(LEAST_BANDWIDTH));
        assert_eq!(set.link_bandwidth_bytes_per_second, Some(0), "no cap");
    }
}
