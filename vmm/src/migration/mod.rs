//! Live migration by pre-copy, VMM to VMM. The protocol is described in docs/migration.md.
//!
//! [`source`] and [`destination`] go through the same phases under the same names: negotiate, pre_copy, pause,
//! final_pages, state, commit.

pub mod cancel;
pub mod destination;
pub mod negotiate;
pub mod pages;
pub mod precopy;
pub mod report;
pub mod source;
pub mod wire;
