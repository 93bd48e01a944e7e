//! The harness of the end-to-end tests: real processes, real KVM guests, driven as a user would.
//!
//! - [`machine`]: one test at a time, and only where there is KVM
//! - [`cluster`]: a cluster of its own for each test, made by `shoal up`; how to kill and restart its parts
//! - [`etcd`]: a real etcd; [`schedulers`]: several schedulers with it
//! - [`shoal`]: the `shoal` command
//! - [`migration`]: a migration that is watched while it runs
//! - [`moving`]: a migration that was begun with the `shoal` command, and is looked at with it
//! - [`vmm`]: VMMs driven directly, without a cluster
//! - [`certificates`]: an authority and certificates for the two ends of a migration
//! - [`pair`]: two of them with a migration in between, and who runs the VM afterwards
//! - [`guest`]: what guests print, and checks for holes and repeats
//! - [`proxy`]: TCP connections that can be cut, silenced, damaged and recorded
//! - [`protocol1`]: a source that speaks migration protocol 1, from a recording
//! - [`cgroups`]: CPU quotas for the nodes of a cluster
//! - [`netns`]: hosts of their own, joined by links of a given speed
//! - [`process`]: what a process holds, so that nothing is left
//! - [`soak`]: many migrations in a row
//! - [`fleet`]: many simulated agents, and a real scheduler for them
//! - [`wait`]: conditions with a deadline
//!
//! The programs and images are those that `cargo xtask test` has built beside the tests. Where there is no `/dev/kvm` a
//! test fails; with `SHOAL_SKIP_KVM=1` it says that it was skipped.
#![forbid(unsafe_code)]
#![allow(
    clippy::missing_panics_doc,
    reason = "a test harness panics where a test would"
)]

pub mod certificates;
pub mod cgroups;
pub mod cluster;
pub mod etcd;
pub mod fleet;
pub mod guest;
pub mod machine;
pub mod migration;
pub mod moving;
pub mod netns;
pub mod pair;
pub mod paths;
pub mod process;
pub mod protocol1;
pub mod proxy;
pub mod schedulers;
pub mod shoal;
pub mod soak;
pub mod vmm;
pub mod wait;
