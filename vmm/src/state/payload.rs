//! What each section holds.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{Kind, StateError};

/// One vCPU; each `bytes` field is the KVM structure of that name.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VcpuState {
    /// `struct kvm_regs`.
    #[prost(bytes = "vec", tag = "1")]
    pub regs: Vec<u8>,
    /// `struct kvm_sregs`.
    #[prost(bytes = "vec", tag = "2")]
    pub sregs: Vec<u8>,
    /// `struct kvm_xsave`.
    #[prost(bytes = "vec", tag = "3")]
    pub xsave: Vec<u8>,
    /// `struct kvm_xcrs`.
    #[prost(bytes = "vec", tag = "4")]
    pub xcrs: Vec<u8>,
    /// `struct kvm_lapic_state`.
    #[prost(bytes = "vec", tag = "5")]
    pub lapic: Vec<u8>,
    /// `struct kvm_debugregs`.
    #[prost(bytes = "vec", tag = "6")]
    pub debug_regs: Vec<u8>,
    /// `struct kvm_vcpu_events`.
    #[prost(bytes = "vec", tag = "7")]
    pub events: Vec<u8>,
    /// `struct kvm_mp_state`.
    #[prost(bytes = "vec", tag = "8")]
    pub mp_state: Vec<u8>,
    /// In the order in which they are to be set.
    #[prost(message, repeated, tag = "9")]
    pub msrs: Vec<MsrEntry>,
}

/// One model-specific register.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct MsrEntry {
    /// Register number.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Its value.
    #[prost(fixed64, tag = "2")]
    pub data: u64,
}

/// One interrupt controller: master PIC, slave PIC, I/O APIC by index.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IrqChipState {
    /// `struct kvm_irqchip`.
    #[prost(bytes = "vec", tag = "1")]
    pub chip: Vec<u8>,
}

/// The i8254 timer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PitState {
    /// `struct kvm_pit_state2`.
    #[prost(bytes = "vec", tag = "1")]
    pub pit: Vec<u8>,
}

/// The VM's clocks at the moment its vCPUs stopped.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ClockState {
    /// kvmclock, ns.
    #[prost(fixed64, tag = "1")]
    pub kvmclock_ns: u64,
    /// CLOCK_REALTIME of the source at that moment, ns.
    #[prost(fixed64, tag = "2")]
    pub realtime_ns: u64,
    /// Frequency of the guest's TSC.
    #[prost(uint32, tag = "3")]
    pub tsc_khz: u32,
}

/// 16550A registers and what waits in its input FIFO.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SerialState {
    /// DLL, DLM, IER, IIR, LCR, LSR, MCR, MSR, SCR.
    #[prost(bytes = "vec", tag = "1")]
    pub registers: Vec<u8>,
    /// Not yet read by the guest.
    #[prost(bytes = "vec", tag = "2")]
    pub input: Vec<u8>,
}

/// Console output that is not yet stored elsewhere.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConsoleState {
    /// Absolute offset of the first byte of `data`.
    #[prost(uint64, tag = "1")]
    pub offset: u64,
    /// The bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub data: Vec<u8>,
}

/// What the guest has told the machine about itself.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PowerState {
    /// Last byte written to the exit status port.
    #[prost(uint32, optional, tag = "1")]
    pub exit_status: Option<u32>,
    /// Longest time it says it has missed since its latest migration began, µs. Absent in state of protocol 1.
    #[prost(uint32, optional, tag = "2")]
    pub guest_gap_us: Option<u32>,
    /// A line that it has begun on the port for last words.
    #[prost(bytes = "vec", tag = "3")]
    pub last_words: Vec<u8>,
}

/// The bytes of a KVM structure.
pub fn to_bytes<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// A KVM structure from its bytes.
///
/// # Errors
/// When the length is not the structure's.
pub fn from_bytes<T: FromBytes>(kind: Kind, field: &'static str, bytes: &[u8]) -> Result<T, StateError> {
    T::read_from_bytes(bytes).map_err(|_| StateError::Malformed {
        kind,
        why: format!("{field} has {} bytes instead of {}", bytes.len(), size_of::<T>()),
    })
}
