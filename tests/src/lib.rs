//! The harness of the end-to-end tests: real processes, real KVM guests, driven as a user would.
//!
//! - [`machine`]: one test at a time, and only where there is KVM
//! - [`cluster`]: a cluster of its own for each test, made by `shoal up`; how to kill and restart its parts
//! - [`shoal`]: the `shoal` command
//! - [`migration`]: a migration that is watched while it runs
//! - [`vmm`]: VMMs driven directly, without a cluster
//! - [`guest`]: what guests print, and checks for holes and repeats
//! - [`proxy`]: a TCP connection that can be cut
//! - [`netns`]: hosts of their own, joined by links of a given speed
//! - [`wait`]: conditions with a deadline
//!
//! The programs and images are those that `cargo xtask test` has built beside the tests. Where there is no `/dev/kvm` a
//! test fails; with `SHOAL_SKIP_KVM=1` it says that it was skipped.
#![forbid(unsafe_code)]
#![allow(
    clippy::missing_panics_doc,
    reason = "a test harness panics where a test would"
)]

pub mod cluster;
pub mod guest;
pub mod machine;
pub mod migration;
pub mod netns;
pub mod paths;
pub mod proxy;
pub mod shoal;
pub mod vmm;
pub mod wait;
