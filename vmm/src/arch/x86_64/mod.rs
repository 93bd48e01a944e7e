//! x86-64: guest physical layout, boot protocols, CPUID, MSRs and ACPI tables.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod selftest;
pub mod tables;
