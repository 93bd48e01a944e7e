//! Simulation of a cluster under several policies, side by side on the same input: discrete events, seeded, the same result
//! for the same text on every machine. Shoal's own policy is the plan crate itself. docs/simulation.md explains the model.
//!
//! - [`text`]: a simulation as text; [`trace`]: recorded VMs; [`workload`]: generated ones; [`model`]: what all that becomes
//! - [`noise`]: what is never as smooth as a model
//! - [`engine`]: the run; [`policy`]: what is compared; [`observe`]: what a policy sees; [`pack`]: Shoal's consolidation
//! - [`recording`]: real clusters, second by second, and what would have been done
//! - [`measure`]: what comes out; [`report`], [`plot`]: tables and pictures of it
#![forbid(unsafe_code)]

pub mod engine;
mod foresight;
pub mod measure;
mod migration;
pub mod model;
pub mod noise;
mod observe;
pub mod pack;
pub mod plot;
pub mod policy;
pub mod power;
pub mod random;
pub mod recording;
pub mod report;
mod smooth;
pub mod text;
pub mod trace;
pub mod workload;
mod world;

pub use engine::run;
pub use measure::Outcome;
pub use model::{Mode, Scenario};
pub use noise::Noise;
pub use policy::PolicyKind;
pub use report::{Comparison, compare};
pub use text::{SimulationError, load};
