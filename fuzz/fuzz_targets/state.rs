//! Saved state, up to what KVM is given.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| shoal_vmm::fuzz::read_state(bytes));
