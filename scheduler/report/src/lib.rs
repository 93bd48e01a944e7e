//! An agent's report of each second: whole, or what has changed since the one before.
//!
//! [`Encoder`] is the agent's end and keeps what the scheduler has been told; [`Decoder`] is the scheduler's and keeps the
//! same. Reports are numbered within a stream. A delta that does not follow the report before, or names a VM that is not
//! known, is not applied, and nothing more is until a whole report comes: the scheduler asks for one. A whole report is sent
//! first in each stream, when it is asked for, and every [`WHOLE_EVERY`] reports, so that no fault lasts.
//!
//! What changes by no more than its [`Thresholds`] is not sent. The comparison is with what was sent, not with the sample
//! before: however slowly a value drifts, the scheduler's is never further off than that.
#![forbid(unsafe_code)]

mod decode;
mod encode;
mod thresholds;

pub use decode::{Decoder, Gap, MOST_VMS, Report};
pub use encode::{Encoder, WHOLE_EVERY};
pub use thresholds::{Threshold, Thresholds};
