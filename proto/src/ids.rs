//! Typed ids. On the wire they are strings and integers; everything that comes in is parsed into one of these first.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Why a string is not the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: '{value}' is not {expected}")]
pub struct IdError {
    field: &'static str,
    value: String,
    expected: &'static str,
}

impl IdError {
    fn new(field: &'static str, value: &str, expected: &'static str) -> Self {
        let value = value.chars().take(80).collect();
        Self {
            field,
            value,
            expected,
        }
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new random id.
            #[must_use]
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Self(Uuid::new_v4())
            }

            /// The 16 bytes of the UUID.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(s: &str) -> Result<Self, IdError> {
                Uuid::parse_str(s).map(Self).map_err(|_| IdError::new($field, s, "a UUID"))
            }
        }
    };
}

uuid_id!(
    /// A VM, for its whole life, wherever it runs.
    VmId,
    "vm_id"
);
uuid_id!(
    /// One attempt to move one VM.
    MigrationId,
    "migration_id"
);

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(s: &str) -> Result<Self, IdError> {
                if is_dns_label(s) {
                    Ok(Self(s.to_owned()))
                } else {
                    Err(IdError::new($field, s, "1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit"))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(s: String) -> Result<Self, IdError> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

name_id!(
    /// A node's name: a DNS label (RFC 1123).
    NodeName,
    "node"
);
name_id!(
    /// A VM's name: a DNS label, unique among VMs that have not been removed.
    VmName,
    "name"
);

fn is_dns_label(s: &str) -> bool {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = s.as_bytes();
    (1..=63).contains(&bytes.len())
        && edge(bytes[0])
        && edge(bytes[bytes.len() - 1])
        && bytes.iter().all(|&b| edge(b) || b == b'-')
}

/// Which incarnation of a VM may run. Stored before anything starts; a higher epoch fences every lower one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// No VM is started and moved more often: what is higher was not counted by a scheduler.
    pub const MOST: Self = Self(1 << 48);

    /// From a message.
    ///
    /// # Errors
    /// If it is more than [`Self::MOST`].
    pub fn from_wire(epoch: u64) -> Result<Self, IdError> {
        if epoch > Self::MOST.0 {
            return Err(IdError {
                field: "epoch",
                value: epoch.to_string(),
                expected: "an epoch that a VM can have reached",
            });
        }
        Ok(Self(epoch))
    }

    /// The next epoch.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "node1", "n-1", &"x".repeat(63)] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "ü", "../x", &"x".repeat(64)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_name_the_field_and_cut_long_values() {
        let text = "z"
            .repeat(10_000)
            .parse::<VmId>()
            .expect_err("not a UUID")
            .to_string();
        assert!(text.starts_with("vm_id: 'zzz"), "{text}");
        assert!(text.len() < 200);
    }
}
