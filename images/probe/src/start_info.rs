//! What the VMM says about the machine: PVH's start info structure.

use probe::ranges::{GuestAddress, Ranges};

use crate::ram::{self, mapped};

/// Xen's `hvm_start_info`, version 1 (xen/include/public/arch-x86/hvm/start_info.h).
#[repr(C)]
struct HvmStartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const START_INFO_MAGIC: u32 = 0x336e_c578;
const KIND_RAM: u32 = 1;
const MAX_MAP_ENTRIES: u32 = 128;
const COMMAND_LINE_SIZE: usize = 2048;

/// What the VMM said, copied out of memory that the probe is about to overwrite.
pub struct StartInfo {
    command_line: [u8; COMMAND_LINE_SIZE],
    ranges: Ranges,
}

impl StartInfo {
    /// Reads it all. What lies above the first GiB is not mapped yet and is passed over.
    ///
    /// # Safety
    /// `address` must be where the VMM put its start info; the memory it leads to must not have been overwritten.
    pub unsafe fn read(address: u64) -> Self {
        let mut info = Self {
            command_line: [0; COMMAND_LINE_SIZE],
            ranges: Ranges::default(),
        };
        // SAFETY: the caller's promise; mapped because it is checked to lie in the first GiB.
        let Some(start) = mapped::<HvmStartInfo>(address).map(|start| unsafe { start.read_unaligned() })
        else {
            return info;
        };
        if start.magic != START_INFO_MAGIC {
            return info;
        }
        for (byte, source) in info.command_line.iter_mut().zip(start.command_line..) {
            // SAFETY: as above.
            let value = mapped::<u8>(source).map_or(0, |source| unsafe { source.read() });
            if start.command_line == 0 || value == 0 {
                break;
            }
            *byte = value;
        }
        let map_entries = if start.version >= 1 {
            start.memory_map_entries.min(MAX_MAP_ENTRIES)
        } else {
            0
        };
        for index in 0..u64::from(map_entries) {
            let source = start
                .memory_map
                .saturating_add(index * size_of::<MemoryMapEntry>() as u64);
            // SAFETY: as above.
            let Some(entry) = mapped::<MemoryMapEntry>(source).map(|entry| unsafe { entry.read_unaligned() })
            else {
                break;
            };
            if entry.kind == KIND_RAM {
                info.ranges.add(
                    GuestAddress(entry.address),
                    entry.size,
                    ram::floor(),
                    ram::ceiling(),
                );
            }
        }
        info
    }

    /// The command line; empty if it is not UTF-8.
    pub fn command_line(&self) -> &str {
        let length = self
            .command_line
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(COMMAND_LINE_SIZE);
        str::from_utf8(&self.command_line[..length]).unwrap_or("")
    }

    /// RAM above the probe itself.
    pub fn ranges(&self) -> Ranges {
        self.ranges
    }
}
