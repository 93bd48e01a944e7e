//! Placement, rebalancing and ushering: pure functions over a snapshot of the cluster. No clock, no I/O, no tasks.
//!
//! - [`model`]: what goes in; [`smooth`]: how reports become what goes in; [`policy`]: the constants
//! - [`labels`]: what nodes and VMs are, and what VMs ask of nodes and of each other
//! - [`kvm`]: on which hosts a VM can start, and go on
//! - [`place`]: where one VM goes; [`score`]: what the cluster's state costs
//! - [`queue`]: who waits, and starts when; [`preempt`]: who is stopped for whom
//! - [`action`]: what comes out; [`text`]: all of it as plain text, for replay
#![forbid(unsafe_code)]

pub mod action;
mod cluster;
mod comply;
mod cost;
mod cpus;
mod destinations;
mod drain;
mod effect;
mod explain;
mod failover;
pub mod kvm;
pub mod labels;
mod last_resort;
pub mod margins;
mod model;
mod newcomer;
mod pack;
pub mod place;
pub mod policy;
pub mod preempt;
pub mod queue;
mod rebalance;
pub mod reject;
mod round;
pub mod score;
pub mod smooth;
mod swap;
pub mod text;
mod together;
mod usher;

pub use action::{Action, ActionKind, Hold, Note, NoteKind, Plan};
pub use cluster::Immobile;
pub use drain::{bring, expel};
pub use explain::{Alternative, Explanation, explain};
pub use kvm::{Kernels, KvmKind, SoftwareKernel};
pub use labels::{Label, LabelError, Labels, Rules, Term};
pub use last_resort::LastResort;
pub use margins::{Margins, Predictions};
pub use model::{
    Bytes, BytesPerSecond, CannotMove, ClusterSnapshot, CpuClass, CpuLacks, DEFAULT_PRIORITY, Failing,
    InFlight, NodeName, NodeState, NodeView, VmId, VmView,
};
pub use place::{
    Largest, LaunchRequest, MigrateError, PlaceError, Placement, place_handover, place_launch,
    place_launches, place_migration,
};
pub use policy::{Automation, Mode, Policy, PolicyError};
pub use preempt::{Held, Preemption, make_room};
pub use queue::{Turn, Waiting, take_turns};
pub use reject::{RejectReason, Rejection};
pub use round::{round, urgent};
pub use shoal_estimate::Estimate;
pub use smooth::{Growth, Peak, SMOOTHING, SteadyGrowth};
