//! The validated description of one VM. Nothing past this module sees an unchecked field.

use std::path::PathBuf;

use shoal_cpuid::{Table, TableError};
use shoal_proto::vm::{MemoryBacking, VmSpec as WireSpec};
use shoal_proto::{Epoch, IdError, VmId};

/// Guest page size, bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Least guest memory: room for the boot structures and a small kernel.
pub const MIN_MEMORY: u64 = 2 << 20;
/// Most guest memory: well within one KVM memory slot (2^31 - 1 pages).
pub const MAX_MEMORY: u64 = 4 << 40;
/// Most vCPUs: one 8-bit xAPIC id each, with room for the I/O APIC.
pub const MAX_CPUS: u32 = 64;
/// The last number that a console may begin with: none that is counted on from there overflows.
pub const MAX_CONSOLE_OFFSET: u64 = 1 << 60;
/// Longest kernel command line, bytes, without the terminating zero (Linux x86: COMMAND_LINE_SIZE 2048).
pub const MAX_CMDLINE: usize = 2047;

/// A checked VM specification.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// The VM, for its whole life.
    pub vm_id: VmId,
    /// Its name, for logs.
    pub name: String,
    /// The incarnation this process may run.
    pub epoch: Epoch,
    /// vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Guest RAM in bytes, a multiple of [`PAGE_SIZE`].
    pub memory_bytes: u64,
    /// Kernel: ELF or bzImage. Not opened for an incoming migration.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// What guest RAM is to be made of.
    pub memory_backing: MemoryBacking,
    /// The only CPU features the guest may see; empty: all that the host has.
    pub cpu_baseline: Table,
    /// Number of the first byte of its console.
    pub console_offset: u64,
}

/// Which field of a spec is wrong, and how.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// An id or name does not parse.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The whole message is missing.
    #[error("spec: missing")]
    Missing,
    /// Guest memory out of range.
    #[error("memory_bytes: {0} is not between 2 MiB and 4 TiB")]
    MemoryRange(u64),
    /// Guest memory is not whole pages.
    #[error("memory_bytes: {0} is not a multiple of 4096")]
    MemoryAlignment(u64),
    /// Not a kind of memory.
    #[error("memory_backing: {0} is unknown; it is AUTO (0), ANONYMOUS (1) or SHARED (2)")]
    MemoryBacking(i32),
    /// Not a CPUID table.
    #[error("cpu_baseline: {0}")]
    CpuBaseline(#[from] TableError),
    /// More than any guest writes.
    #[error("console_offset: {0} is more than 2^60")]
    ConsoleOffset(u64),
    /// vCPU count out of range.
    #[error("cpus: {0} is not between 1 and 64")]
    Cpus(u32),
    /// The command line does not fit.
    #[error("cmdline: {0} bytes are more than the 2047 a kernel takes")]
    CmdlineLength(usize),
    /// The command line holds a byte that would end or corrupt it.
    #[error("cmdline: contains a NUL or a non-ASCII byte")]
    CmdlineBytes,
}

impl TryFrom<Option<WireSpec>> for VmSpec {
    type Error = SpecError;

    fn try_from(wire: Option<WireSpec>) -> Result<Self, SpecError> {
        let wire = wire.ok_or(SpecError::Missing)?;
        let spec = Self {
            vm_id: wire.vm_id.parse()?,
            name: wire.name.chars().take(63).collect(),
            epoch: Epoch(wire.epoch),
            cpus: wire.cpus,
            memory_bytes: wire.memory_bytes,
            kernel: wire.kernel_path.into(),
            initrd: (!wire.initrd_path.is_empty()).then(|| wire.initrd_path.into()),
            cmdline: wire.cmdline,
            memory_backing: MemoryBacking::try_from(wire.memory_backing)
                .map_err(|_| SpecError::MemoryBacking(wire.memory_backing))?,
            cpu_baseline: Table::from_bytes(&wire.cpu_baseline)?,
            console_offset: wire.console_offset,
        };
        spec.check()?;
        Ok(spec)
    }
}

impl VmSpec {
    /// Checks the ranges that the rest of the VMM relies on.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn check(&self) -> Result<(), SpecError> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&self.memory_bytes) {
            return Err(SpecError::MemoryRange(self.memory_bytes));
        }
        if !self.memory_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(SpecError::MemoryAlignment(self.memory_bytes));
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(SpecError::Cpus(self.cpus));
        }
        if self.console_offset > MAX_CONSOLE_OFFSET {
            return Err(SpecError::ConsoleOffset(self.console_offset));
        }
        if self.cmdline.len() > MAX_CMDLINE {
            return Err(SpecError::CmdlineLength(self.cmdline.len()));
        }
        if !self.cmdline.bytes().all(|b| b.is_ascii() && b != 0) {
            return Err(SpecError::CmdlineBytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> WireSpec {
        WireSpec {
            vm_id: VmId::new().to_string(),
            name: "t".into(),
            epoch: 1,
            cpus: 1,
            memory_bytes: 64 << 20,
            ..WireSpec::default()
        }
    }

    #[test]
    fn refuses_what_is_out_of_range_and_names_the_field() {
        type Change = fn(&mut WireSpec);
        let cases: [(&str, Change); 9] = [
            ("vm_id", |s| s.vm_id = "x".into()),
            ("memory_bytes", |s| s.memory_bytes = 0),
            ("memory_bytes", |s| s.memory_bytes = 100 << 40),
            ("memory_bytes", |s| s.memory_bytes = (64 << 20) + 1),
            ("memory_backing", |s| s.memory_backing = 3),
            ("cpu_baseline", |s| s.cpu_baseline = vec![0; 39]),
            ("console_offset", |s| s.console_offset = u64::MAX),
            ("cpus", |s| s.cpus = 0),
            ("cmdline", |s| s.cmdline = "x".repeat(4000)),
        ];
        assert!(VmSpec::try_from(Some(wire())).is_ok());
        for (field, change) in cases {
            let mut spec = wire();
            change(&mut spec);
            let error = VmSpec::try_from(Some(spec)).expect_err(field).to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
