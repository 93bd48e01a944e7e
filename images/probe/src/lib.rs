//! The parts of the probe that need no bare machine, so that they can be tested on any.
//!
//! The probe is a guest that knows what every byte of its memory must be. It fills memory, dirties a working set at a given
//! rate, checks what it wrote, and says at each heartbeat on its console how it fared. See docs/images.md for its options and output.
//!
//! - [`options`]: the command line
//! - [`ranges`]: guest RAM as one run of numbered pages
//! - [`page`]: what a page holds, written and checked
//! - [`sweep`]: the order in which the working set is dirtied, and so the generation every page must have
//! - [`clock`]: KVM's clock
//! - [`pace`]: ticks, rates and the worst gap
//! - [`worker`]: the main loop's step, one page at most
//! - [`text`]: lines on their way to the console
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod clock;
pub mod options;
pub mod pace;
pub mod page;
pub mod ranges;
pub mod sweep;
pub mod text;
pub mod worker;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;
