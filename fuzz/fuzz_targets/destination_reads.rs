//! A destination reads what a hostile peer sent.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use shoal_vmm::{fuzz, memory::GuestMemory};

static MEMORY: LazyLock<GuestMemory> = LazyLock::new(|| GuestMemory::new(fuzz::MEMORY).expect("map"));

fuzz_target!(|bytes: &[u8]| {
    fuzz::destination_reads(bytes, &MEMORY);
});
