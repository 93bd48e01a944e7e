//! The gRPC services of Shoal and the typed ids that travel in them. No logic.
//!
//! - [`cluster`]: what a user can do (served by the scheduler)
//! - [`node`]: between scheduler and agent
//! - [`vm`]: one VMM (served on a Unix socket)
#![forbid(unsafe_code)]

mod ids;

pub use ids::{Epoch, IdError, MigrationId, NodeName, VmId, VmName};

/// Least bandwidth that a migration is held to, in bytes per second. At less, connections that take turns would each be without a
/// byte for longer than their peers wait.
pub const LEAST_BANDWIDTH: u64 = 1 << 20;

/// Metadata of an error: where the scheduler is that leads, as `IP:PORT`.
pub const LEADER_HEADER: &str = "shoal-leader";
/// Metadata of a scheduler's calls to agents: the term of its lead, in decimal.
pub const TERM_HEADER: &str = "shoal-term";

/// Metadata of every call between scheduler and agent: the secret of the cluster, where it has one.
pub const SECRET_HEADER: &str = "shoal-secret";

/// Encoded descriptors of every service, for gRPC server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The generated code, in the module tree that its own paths expect.
mod shoal {
    #![allow(missing_docs, missing_debug_implementations, clippy::all, clippy::pedantic)]
    pub mod cluster {
        pub mod v1 {
            tonic::include_proto!("shoal.cluster.v1");
        }
    }
    pub mod node {
        pub mod v1 {
            tonic::include_proto!("shoal.node.v1");
        }
    }
    pub mod vm {
        pub mod v1 {
            tonic::include_proto!("shoal.vm.v1");
        }
    }
}

/// The cluster API (`proto/cluster.proto`).
pub use shoal::cluster::v1 as cluster;
/// The node API (`proto/node.proto`).
pub use shoal::node::v1 as node;
/// The VMM API (`proto/vm.proto`).
pub use shoal::vm::v1 as vm;
