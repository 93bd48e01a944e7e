//! What depends on the CPU architecture. Only x86-64 so far.

mod x86_64;

pub use x86_64::*;
