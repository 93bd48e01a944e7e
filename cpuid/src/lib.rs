//! CPUID tables as KVM has them (`struct kvm_cpuid_entry2`): their features by name, what one lacks of another, what
//! several have in common. Pure.
//!
//! What counts are feature bits. Topology, frequencies, cache sizes and the model's name do not: they are each VM's own.
#![forbid(unsafe_code)]

mod names;
mod registers;
mod table;

pub use names::Feature;
pub use table::{Entry, MAX_ENTRIES, Table, TableError};
