//! A cluster as plain text, so that a decision can be kept, replayed and argued about. docs/planning.md shows an example.
//!
//! One thing a line: `policy KEY=VALUE…`, `node NAME KEY=VALUE…` `vm ID KEY=VALUE…`, `held ID KEY=VALUE…` or `launch NAME KEY=VALUE…`, after a first line
//! that names the format and its version. `#` starts a comment. What is left out has its default. Sizes are bytes, or whole KiB, MiB, GiB
//! or TiB ("384MiB"); durations are whole s, ms, us or ns; rates are sizes per second. Names are percent-encoded where
//! they hold anything but visible ASCII, or one of `%=#`.

use crate::kvm::SoftwareKernel;

mod fields;
mod parse;
mod policy;
mod print;
mod value;

pub use parse::{Scenario, TextError, parse};
pub use policy::{print_policy_fields, set_policy_fields};
pub use print::{print, print_launches, print_placements, print_plan, print_preemptions};
pub use value::{parse_duration, parse_number, parse_size};

/// The first line.
const HEADER: &str = "shoal-cluster 1";

/// What kernels an image has: the one for hardware virtualization, and that for hosts without.
const KERNELS: [((bool, Option<SoftwareKernel>), &str); 6] = [
    ((false, None), "none"),
    ((true, None), "hardware"),
    ((false, Some(SoftwareKernel::Plain)), "software"),
    ((false, Some(SoftwareKernel::Ring3)), "ring3"),
    ((true, Some(SoftwareKernel::Plain)), "hardware,software"),
    ((true, Some(SoftwareKernel::Ring3)), "hardware,ring3"),
];
