//! Why a VM cannot be moved.

use std::fmt;
use std::time::Duration;

use crate::model::{CannotMove, NodeName};

/// Why a VM cannot be moved now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Immobile {
    /// As told in the snapshot.
    Told(CannotMove),
    /// It moves already.
    Migrating(NodeName),
    /// Its node does not answer.
    NodeUnreachable(NodeName),
    /// It moved, or tried to, not long ago.
    CoolDown {
        /// For how much longer.
        left: Duration,
    },
    /// It has not run for long enough to be moved for balance.
    JustStarted {
        /// For how much longer.
        left: Duration,
    },
}

impl Immobile {
    /// It ends by itself.
    pub(crate) fn is_temporary(&self) -> bool {
        matches!(
            self,
            Self::CoolDown { .. }
                | Self::JustStarted { .. }
                | Self::Migrating(_)
                | Self::Told(CannotMove::Starting | CannotMove::Stopping | CannotMove::Settling)
        )
    }
}

impl fmt::Display for Immobile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Told(reason) => reason.fmt(f),
            Self::Migrating(to) => write!(f, "it is migrating to {to}"),
            Self::NodeUnreachable(node) => write!(f, "its node {node} is unreachable"),
            Self::JustStarted { left } => {
                write!(
                    f,
                    "it has just started; not moved for balance for another {:.0} s",
                    left.as_secs_f64().ceil()
                )
            }
            Self::CoolDown { left } => {
                write!(
                    f,
                    "it has just moved, or failed to; not again for {:.0} s",
                    left.as_secs_f64().ceil()
                )
            }
        }
    }
}
