//! Placement, rebalancing and ushering: pure functions over a snapshot of the cluster. No clock, no I/O, no tasks.
//!
//! - [`model`]: what goes in; [`smooth`]: how reports become what goes in; [`policy`]: the constants
//! - [`place`]: where one VM goes; [`score`]: what the cluster's state costs
//! - [`action`]: what comes out
#![forbid(unsafe_code)]

pub mod action;
mod cluster;
pub mod model;
pub mod place;
pub mod policy;
pub mod reject;
pub mod score;
pub mod smooth;

pub use action::{Action, ActionKind, Note, NoteKind, Plan};
pub use cluster::Immobile;
pub use model::{
    Bytes, BytesPerSecond, CannotMove, ClusterSnapshot, InFlight, NodeName, NodeState, NodeView, VmId, VmView,
};
pub use place::{LaunchRequest, MigrateError, PlaceError, Placement, place_launch, place_migration};
pub use policy::{Policy, PolicyError};
pub use reject::{RejectReason, Rejection};
pub use smooth::{ExportedLoad, Growth, LocalLoad};
