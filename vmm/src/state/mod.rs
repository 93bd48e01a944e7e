//! Saved VM state: a fixed header, then sections that say their kind, version, index and length. Unknown, missing or
//! repeated sections are errors that name them. Payloads are protobuf; KVM's own structures travel as the bytes of the
//! kernel's ABI (stable by the kernel's promise).

mod format;
mod payload;

pub use format::{Kind, Reader, StateError, Writer};
pub use payload::{
    ClockState, ConsoleState, IrqChipState, MsrEntry, PitState, PowerState, SerialState, VcpuState,
    from_bytes, to_bytes,
};
