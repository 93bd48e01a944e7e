//! Live migration, VMM to VMM. The protocol is described in docs/migration.md.
//!
//! [`source`] and [`destination`] go through the same phases under the same names: negotiate, pre_copy, pause,
//! final_pages, verify, state, commit. One control connection carries the phases, others the pages.
//!
//! - asked for: [`policy`], changed and cancelled through [`controls`], held to a bandwidth by [`pacer`]
//! - on the wire: [`transport`], [`wire`], [`negotiate`], [`pages`], [`codec`], [`verify`]
//! - decided: [`precopy`] (when to pause), [`widen`] (how many connections)
//! - told: [`report`]

pub mod codec;
pub mod controls;
pub mod destination;
pub mod negotiate;
pub mod pacer;
pub mod pages;
pub mod policy;
pub mod postcopy;
pub mod precopy;
pub mod report;
pub mod sched;
pub mod source;
pub mod transport;
pub mod verify;
pub mod widen;
pub mod wire;
