//! End-to-end tests, each on a cluster of its own. `cargo xtask test` builds what they need and runs them.
#![forbid(unsafe_code)]

mod api;
mod cgroups;
mod clock;
mod cluster_life;
mod cluster_postcopy;
mod cluster_tls;
mod commands;
mod cpu_baseline;
mod crowds;
mod cut_connection;
mod daemon_faults;
mod fault_table;
mod fleet;
mod ha;
mod interrupts;
mod kvm_kinds;
mod linux;
mod linux_checks;
mod memory_backing;
mod memory_sampling;
mod metrics;
mod migration_control;
mod migration_history;
mod moves;
mod overload;
mod postcopy;
mod previous_protocol;
mod real_hosts;
mod refusals;
mod scheduling;
mod soak;
mod strangers;
mod suspend;
mod up;
mod upgrade;
mod vmm_faults;

/// A probe that writes faster than any limit of 1 ms on downtime allows to catch up with: a migration of it with that
/// limit stays in pre-copy.
const RESTLESS: &str = "beat=200 fill=320MiB wss=256MiB rate=60000 pattern=random";
/// A probe that a migration catches up with at once.
const CALM: &str = "beat=200 fill=64MiB wss=4MiB rate=100 pattern=random";
