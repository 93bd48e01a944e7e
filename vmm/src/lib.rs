//! The Shoal VMM: one process, one microVM. It knows nothing of clusters.
//!
//! Where to start reading:
//! - [`spec`]: what a VM is made from; [`build`]: how, in one readable order; [`vm`]: the result
//! - [`control`]: the one owner of the VM, a queue of commands; [`api`]: gRPC in front of it
//! - [`migration`]: pre-copy, `source` and `destination` with the same phases
//! - [`sample`]: how fast the guest dirties memory, now and then
//! - [`throttle`]: slows a guest down that writes faster than its migration sends
//! - [`vcpu`], [`devices`], [`memory`], [`dirty`], [`console`], [`arch`]: the machine; [`state`]: the machine saved
//! - [`fault`]: faults that tests inject

pub mod api;
pub mod arch;
pub mod build;
pub mod console;
pub mod control;
pub mod devices;
pub mod dirty;
pub mod fault;
#[doc(hidden)]
pub mod fuzz;
pub mod memory;
pub mod migration;
pub mod ran_mark;
pub mod sample;
pub mod spec;
pub mod state;
pub mod throttle;
pub mod vcpu;
pub mod vm;
