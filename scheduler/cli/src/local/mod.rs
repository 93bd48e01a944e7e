//! A whole cluster on this machine: a scheduler and N agents as child processes, each with its own directory.
//!
//! - [`record`]: `up.json`, which names the processes
//! - [`start`]: starts them and waits until every node is ready
//! - [`stop`]: ends them and every VMM
//!
//! ```text
//! STATE/up.json  STATE/lock  STATE/scheduler.log  STATE/scheduler/  STATE/node1.log  STATE/node1/vms/…
//! ```

pub mod record;
pub mod start;
pub mod stop;
