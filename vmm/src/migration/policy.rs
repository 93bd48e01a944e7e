//! How one migration is to go: what was asked for, checked, with defaults filled in.

use std::time::Duration;

use shoal_proto::LEAST_BANDWIDTH;
use shoal_proto::vm::{Compression, MigrationPolicy, OnStall, Verify};

const DEFAULT_MAX_DOWNTIME_MS: u64 = 50;
const DEFAULT_TIMEOUT_MS: u64 = 600_000;
const LONGEST_MS: u64 = 7 * 24 * 3600 * 1000;
/// Connections for pages, at most.
pub const MAX_CONNECTIONS: u32 = 16;
const MAX_PRIORITY: u32 = 9;
const DEFAULT_PRIORITY: u32 = 5;

/// A policy that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("policy.{field}: {why}")]
pub struct PolicyError {
    field: &'static str,
    why: String,
}

fn refuse(field: &'static str, why: impl Into<String>) -> PolicyError {
    PolicyError {
        field,
        why: why.into(),
    }
}

/// A policy in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Longest pause.
    pub max_downtime: Duration,
    /// Longest migration, from its start to the pause.
    pub timeout: Duration,
    /// What to do when pre-copy does not converge.
    pub on_stall: OnStall,
    /// Bytes per second; 0: no cap.
    pub bandwidth: u64,
    /// Connections for pages; 0: chosen by the link.
    pub connections: u32,
    /// How pages are encoded.
    pub compression: Compression,
    /// What is compared while the VM is paused.
    pub verify: Verify,
    /// Share of a cap that several migrations have together; used by the control plane.
    pub priority: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_downtime: Duration::from_millis(DEFAULT_MAX_DOWNTIME_MS),
            timeout: Duration::from_millis(DEFAULT_TIMEOUT_MS),
            on_stall: OnStall::Cancel,
            bandwidth: 0,
            connections: 0,
            compression: Compression::Auto,
            verify: Verify::Off,
            priority: DEFAULT_PRIORITY,
        }
    }
}

fn millis(field: &'static str, ms: u64) -> Result<Duration, PolicyError> {
    if (1..=LONGEST_MS).contains(&ms) {
        Ok(Duration::from_millis(ms))
    } else {
        Err(refuse(field, format!("{ms} ms is not between 1 ms and a week")))
    }
}

fn at_most(field: &'static str, value: u32, limit: u32) -> Result<u32, PolicyError> {
    if value <= limit {
        Ok(value)
    } else {
        Err(refuse(field, format!("{value} is more than {limit}")))
    }
}

/// Not less than is asked for, so that nobody is told of a cap that does not hold.
fn allowed_bandwidth(asked: u64) -> Result<u64, PolicyError> {
    if asked == 0 || asked >= LEAST_BANDWIDTH {
        Ok(asked)
    } else {
        let why = format!("{asked} bytes a second is neither 0, for no cap, nor at least {LEAST_BANDWIDTH}");
        Err(refuse("bandwidth_bytes_per_second", why))
    }
}

impl Policy {
    /// This policy with what `change` sets.
    ///
    /// # Errors
    /// The field that is out of its limits.
    pub fn with(&self, change: &MigrationPolicy) -> Result<Self, PolicyError> {
        let unknown = |field| move |error: prost::UnknownEnumValue| refuse(field, error.to_string());
        let mut policy = self.clone();
        if let Some(ms) = change.max_downtime_ms {
            policy.max_downtime = millis("max_downtime_ms", ms)?;
        }
        if let Some(ms) = change.timeout_ms {
            policy.timeout = millis("timeout_ms", ms)?;
        }
        if let Some(bandwidth) = change.bandwidth_bytes_per_second {
            policy.bandwidth = allowed_bandwidth(bandwidth)?;
        }
        if let Some(connections) = change.connections {
            policy.connections = at_most("connections", connections, MAX_CONNECTIONS)?;
        }
        if let Some(priority) = change.priority {
            policy.priority = at_most("priority", priority, MAX_PRIORITY)?;
        }
        match OnStall::try_from(change.on_stall).map_err(unknown("on_stall"))? {
            OnStall::Unspecified => {}
            on_stall => policy.on_stall = on_stall,
        }
        match Compression::try_from(change.compression).map_err(unknown("compression"))? {
            Compression::Unspecified => {}
            compression => policy.compression = compression,
        }
        match Verify::try_from(change.verify).map_err(unknown("verify"))? {
            Verify::Unspecified => {}
            verify => policy.verify = verify,
        }
        Ok(policy)
    }

    /// As [`Policy::with`], for a migration under way, whose connections are made and whose pages are being encoded.
    ///
    /// # Errors
    /// The field that is out of its limits or cannot change any more.
    pub fn changed_under_way(&self, change: &MigrationPolicy) -> Result<Self, PolicyError> {
        let fixed = "cannot change while the migration runs; cancel it and start another";
        if change.connections.is_some() {
            return Err(refuse("connections", fixed));
        }
        if change.compression != 0 {
            return Err(refuse("compression", fixed));
        }
        if change.verify != 0 {
            return Err(refuse("verify", fixed));
        }
        self.with(change)
    }
}

impl From<&Policy> for MigrationPolicy {
    fn from(policy: &Policy) -> Self {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Self {
            max_downtime_ms: Some(millis(policy.max_downtime)),
            timeout_ms: Some(millis(policy.timeout)),
            on_stall: policy.on_stall.into(),
            bandwidth_bytes_per_second: Some(policy.bandwidth),
            connections: Some(policy.connections),
            compression: policy.compression.into(),
            verify: policy.verify.into(),
            priority: Some(policy.priority),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_replaces_and_the_rest_stays() {
        let change = MigrationPolicy {
            max_downtime_ms: Some(7),
            on_stall: OnStall::Force.into(),
            ..Default::default()
        };
        let policy = Policy::default().with(&change).expect("valid");
        assert_eq!(policy.max_downtime, Duration::from_millis(7));
        assert_eq!(policy.on_stall, OnStall::Force);
        assert_eq!(policy.timeout, Policy::default().timeout);
        assert_eq!(
            Policy::default().with(&MigrationPolicy::from(&policy)),
            Ok(policy)
        );
    }

    #[test]
    fn what_cannot_be_names_its_field() {
        let bad = [
            (
                MigrationPolicy {
                    max_downtime_ms: Some(0),
                    ..Default::default()
                },
                "policy.max_downtime_ms",
            ),
            (
                MigrationPolicy {
                    timeout_ms: Some(u64::MAX),
                    ..Default::default()
                },
                "policy.timeout_ms",
            ),
            (
                MigrationPolicy {
                    bandwidth_bytes_per_second: Some(LEAST_BANDWIDTH - 1),
                    ..Default::default()
                },
                "policy.bandwidth_bytes_per_second",
            ),
            (
                MigrationPolicy {
                    connections: Some(17),
                    ..Default::default()
                },
                "policy.connections",
            ),
            (
                MigrationPolicy {
                    priority: Some(10),
                    ..Default::default()
                },
                "policy.priority",
            ),
            (
                MigrationPolicy {
                    on_stall: 99,
                    ..Default::default()
                },
                "policy.on_stall",
            ),
            (
                MigrationPolicy {
                    verify: -1,
                    ..Default::default()
                },
                "policy.verify",
            ),
        ];
        for (change, field) in bad {
            let error = Policy::default().with(&change).expect_err(field).to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn connections_do_not_change_under_way() {
        let change = MigrationPolicy {
            connections: Some(2),
            ..Default::default()
        };
        assert!(Policy::default().changed_under_way(&change).is_err());
        let change = MigrationPolicy {
            bandwidth_bytes_per_second: Some(2 << 20),
            ..Default::default()
        };
        assert_eq!(
            Policy::default()
                .changed_under_way(&change)
                .expect("may change")
                .bandwidth,
            2 << 20
        );
    }
}
