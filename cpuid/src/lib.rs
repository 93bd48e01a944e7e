//! CPUID tables as KVM has them (`struct kvm_cpuid_entry2`): their features by name, what one lacks of another, what
//! several have in common; and which MSRs belong to a guest with such a CPU. Pure.
//!
//! What counts are feature bits. Topology, frequencies, cache sizes and the model's name do not: they are each VM's own.
#![forbid(unsafe_code)]

mod msrs;
mod names;
mod registers;
mod table;

pub use msrs::{MAX_MSRS, Msr, missing_msrs, needed_msrs, optional_msrs};
pub use names::Feature;
pub use table::{Entry, MAX_ENTRIES, Table, TableError};
