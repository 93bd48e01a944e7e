//! Placement, rebalancing and ushering: pure functions over a snapshot of the cluster. No clock, no I/O, no tasks.
//!
//! - [`model`]: what goes in; [`smooth`]: how reports become what goes in; [`policy`]: the constants
//! - [`action`]: what comes out
#![forbid(unsafe_code)]

pub mod action;
pub mod model;
pub mod policy;
pub mod smooth;

pub use action::{Action, ActionKind, Note, NoteKind, Plan};
pub use model::{
    Bytes, BytesPerSecond, CannotMove, ClusterSnapshot, InFlight, NodeName, NodeState, NodeView, VmId, VmView,
};
pub use policy::{Policy, PolicyError};
pub use smooth::{ExportedLoad, Growth, LocalLoad};
