//! The scheduler: the cluster API, its store, and the loop observe → plan → execute.
//!
//! - [`serve`] (`server`) puts it together; `scheduler` is what its parts share
//! - what users call: `api`, one call a file; `view` shows records; `limits` says what may be asked for
//! - what agents call: `registry`; what they report goes through `observe` into `nodes`
//! - several schedulers: `cluster` (who leads, and what each does), `follower` (what one that does not lead answers),
//!   `schedulers` (who there is)
//! - what is durable: `record` (the types), `store` (redb or etcd, backups), `images` (blobs), `logs` (consoles), `events`, `history`
//! - `pool`: threads for what must not wait for anything else; `streams`: how many long calls one may have open
//! - `seed`: what load tests start from
//! - what is in memory: `vms`, `nodes`, `migrations`, `failures` (what is not tried again yet)
//! - what plans are made with: `planner_policy`; how migrations are to go: `policy`, `bandwidth`; what is counted of them: `metrics`
//! - what changes the cluster: `control` (each second), `execute` (launch, migrate, settle, stop), `reconcile` (what does
//!   not agree), `drain`, `moves` (all VMs of a node), `queue` (VMs that wait); `agent` is how a node is told
#![forbid(unsafe_code)]

mod agent;
mod api;
mod bandwidth;
mod cluster;
mod config;
mod control;
mod cpus;
mod drain;
mod events;
mod execute;
mod failures;
mod follower;
mod history;
mod images;
mod limits;
mod logs;
mod metrics;
mod migrations;
mod moves;
mod nodes;
mod observe;
mod other_load;
mod planner_policy;
mod policy;
mod pool;
mod predictions;
mod queue;
mod reconcile;
mod record;
mod registry;
mod scheduler;
mod schedulers;
#[doc(hidden)]
pub mod seed;
mod server;
mod store;
mod streams;
#[cfg(test)]
mod testing;
mod view;
mod vms;

pub use config::{SchedulerConfig, Shutdown};
pub use server::{ServerError, serve};
pub use shoal_plan::{Automation, Policy};
pub use store::backup::{BackupError, StoreLocation, Summary as BackupSummary, back_up, restore};
