//! Loading a kernel: ELF by its PVH note, ELF by the Linux 64-bit boot protocol, or bzImage.
//!
//! Sources: Linux Documentation/arch/x86/boot.rst (64-bit boot protocol), Xen's x86/HVM direct boot ABI (PVH).

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::path::{Path, PathBuf};

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator as _, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{BzImage, Elf, KernelLoader as _, KernelLoaderResult, elf::PvhBootCapability};
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryError};

use super::layout;
use super::tables::BootMode;
use crate::memory::{GuestMemory, ram_ranges};
use crate::spec::PAGE_SIZE;

const E820_RAM: u32 = 1;
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
const PVH_MAGIC: u32 = 0x336e_c578;
const BZIMAGE_64_ENTRY: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;
/// `initrd_addr_max` of the 64-bit protocol without XLF_CAN_BE_LOADED_ABOVE_4G.
const INITRD_LIMIT: u64 = 0x8000_0000;

/// Why an image cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be opened or read.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Neither ELF nor bzImage.
    #[error("kernel {}: neither an ELF file nor a bzImage", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// The loader refused it.
    #[error("kernel {}: {source}; is the file whole, and does it fit the VM's memory of {memory_bytes} bytes?", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Guest RAM.
        memory_bytes: u64,
        /// The loader's reason.
        source: linux_loader::loader::Error,
    },
    /// A bzImage with a segment or entry point that cannot be used.
    #[error("kernel {}: {why}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No room for the initrd above the kernel.
    #[error("initrd {}: {size} bytes do not fit the VM's memory of {memory_bytes} bytes above the kernel", path.display())]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// Guest RAM.
        memory_bytes: u64,
    },
    /// Guest memory access, for the boot structures.
    #[error("boot structures: {0}")]
    Memory(#[from] GuestMemoryError),
    /// Boot structures, as the configurator sees it.
    #[error("boot structures: {0}")]
    Configurator(#[from] linux_loader::configurator::Error),
}

/// What the boot CPU needs to know of the loaded kernel.
#[derive(Debug, Clone, Copy)]
pub struct LoadedKernel {
    /// Where it starts.
    pub entry: GuestAddress,
    /// In which CPU mode.
    pub mode: BootMode,
}

struct Initrd {
    start: GuestAddress,
    size: u64,
}

/// Loads kernel and initrd and writes the boot structures.
///
/// # Errors
/// Names the file and what is wrong with it.
pub fn load(
    memory: &GuestMemory,
    kernel: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
    rsdp: GuestAddress,
) -> Result<LoadedKernel, BootError> {
    let (loaded, format) = load_kernel(memory, kernel)?;
    let initrd = initrd
        .map(|path| load_initrd(memory, path, loaded.kernel_end))
        .transpose()?;
    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    memory.mmap().write_slice(&text, layout::CMDLINE)?;
    let cmdline_len = u32::try_from(cmdline.len()).unwrap_or(u32::MAX);
    match format {
        Format::Pvh(entry) => {
            write_start_info(memory, initrd.as_ref(), rsdp)?;
            Ok(LoadedKernel {
                entry,
                mode: BootMode::Pvh,
            })
        }
        Format::Linux64(entry) => {
            write_zero_page(memory, &loaded, initrd.as_ref(), cmdline_len, rsdp)?;
            Ok(LoadedKernel {
                entry,
                mode: BootMode::Linux64,
            })
        }
    }
}

enum Format {
    Pvh(GuestAddress),
    Linux64(GuestAddress),
}

fn load_kernel(memory: &GuestMemory, path: &Path) -> Result<(KernelLoaderResult, Format), BootError> {
    let file_error = |source| BootError::File {
        what: "kernel",
        path: path.to_owned(),
        source,
    };
    let loader_error = |source| BootError::Kernel {
        path: path.to_owned(),
        memory_bytes: memory.len(),
        source,
    };
    let unusable = |why: String| BootError::Unusable {
        path: path.to_owned(),
        why,
    };
    let mut file = File::open(path).map_err(file_error)?;
    let mut magic = [0u8; 4];
    file.read_exact(&mut magic).map_err(file_error)?;
    file.rewind().map_err(file_error)?;
    let highmem = Some(layout::HIGH_MEMORY_START);

    if magic == *b"\x7fELF" {
        let loaded = Elf::load(memory.mmap(), None, &mut file, highmem).map_err(loader_error)?;
        if loaded.kernel_end > 0
            && !memory
                .mmap()
                .address_in_range(GuestAddress(loaded.kernel_end - 1))
        {
            return Err(unusable(format!(
                "needs memory up to {:#x}, more than the VM has",
                loaded.kernel_end
            )));
        }
        let format = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => Format::Pvh(entry),
            _ => Format::Linux64(loaded.kernel_load),
        };
        return Ok((loaded, format));
    }
    let mut loaded =
        BzImage::load(memory.mmap(), None, &mut file, highmem).map_err(|source| match source {
            linux_loader::loader::Error::Bzimage(linux_loader::loader::bzimage::Error::InvalidBzImage) => {
                BootError::UnknownFormat {
                    path: path.to_owned(),
                }
            }
            source => loader_error(source),
        })?;
    let header = loaded.setup_header.unwrap_or_default();
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(unusable("this bzImage has no 64-bit entry point".into()));
    }
    let entry = loaded
        .kernel_load
        .checked_add(BZIMAGE_64_ENTRY)
        .ok_or_else(|| unusable("entry point overflows".into()))?;
    let setup_sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let promised = (setup_sectors + 1) * 512 + u64::from(header.syssize) * 16;
    let length = file.metadata().map_err(file_error)?.len();
    if length < promised {
        return Err(unusable(format!(
            "has {length} of the {promised} bytes that its header promises; is the file whole?"
        )));
    }
    // What the kernel uses while it unpacks itself, and afterwards (boot.rst, init_size).
    let unpacked = header.pref_address.saturating_add(u64::from(header.init_size));
    loaded.kernel_end = loaded.kernel_end.max(unpacked);
    if !memory
        .mmap()
        .address_in_range(GuestAddress(loaded.kernel_end - 1))
    {
        return Err(unusable(format!(
            "needs memory up to {:#x}, more than the VM has",
            loaded.kernel_end
        )));
    }
    Ok((loaded, Format::Linux64(entry)))
}

/// Puts the initrd as high as it may go, so that it is out of the kernel's way.
fn load_initrd(memory: &GuestMemory, path: &Path, kernel_end: u64) -> Result<Initrd, BootError> {
    let file_error = |source| BootError::File {
        what: "initrd",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(file_error)?;
    let size = file.metadata().map_err(file_error)?.len();
    let low_ram = ram_ranges(memory.len())[0].1.min(INITRD_LIMIT);
    let start = low_ram
        .checked_sub(size)
        .map(|start| start / PAGE_SIZE * PAGE_SIZE);
    let Some(start) = start.filter(|&start| start >= kernel_end.max(layout::HIGH_MEMORY_START.raw_value()))
    else {
        return Err(BootError::InitrdTooLarge {
            path: path.to_owned(),
            size,
            memory_bytes: memory.len(),
        });
    };
    let start = GuestAddress(start);
    let count = usize::try_from(size).expect("smaller than guest memory");
    memory.mmap().read_exact_volatile_from(start, &mut file, count)?;
    Ok(Initrd { start, size })
}

fn memory_map(memory: &GuestMemory) -> Vec<(u64, u64)> {
    let high_start = layout::HIGH_MEMORY_START.raw_value();
    let mut map = vec![(0, layout::LOW_MEMORY_END)];
    for (start, len) in ram_ranges(memory.len()) {
        let start = start.raw_value();
        map.push(if start == 0 {
            (high_start, len - high_start)
        } else {
            (start, len)
        });
    }
    map
}

fn write_start_info(
    memory: &GuestMemory,
    initrd: Option<&Initrd>,
    rsdp: GuestAddress,
) -> Result<(), BootError> {
    let memmap: Vec<_> = memory_map(memory)
        .into_iter()
        .map(|(addr, size)| hvm_memmap_table_entry {
            addr,
            size,
            type_: E820_RAM,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.start.raw_value(),
            size: initrd.size,
            ..Default::default()
        })
        .collect();
    let start_info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: u32::try_from(modules.len()).expect("at most one"),
        modlist_paddr: if modules.is_empty() {
            0
        } else {
            layout::PVH_MODULES.raw_value()
        },
        cmdline_paddr: layout::CMDLINE.raw_value(),
        rsdp_paddr: rsdp.raw_value(),
        memmap_paddr: layout::PVH_MEMMAP.raw_value(),
        memmap_entries: u32::try_from(memmap.len()).expect("at most three"),
        reserved: 0,
    };
    let mut params = BootParams::new(&start_info, layout::PVH_START_INFO);
    params.set_sections(&memmap, layout::PVH_MEMMAP);
    if !modules.is_empty() {
        params.set_modules(&modules, layout::PVH_MODULES);
    }
    PvhBootConfigurator::write_bootparams(&params, memory.mmap())?;
    Ok(())
}

fn write_zero_page(
    memory: &GuestMemory,
    loaded: &KernelLoaderResult,
    initrd: Option<&Initrd>,
    cmdline_len: u32,
    rsdp: GuestAddress,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: loaded.setup_header.unwrap_or_default(),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HDRS;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE.raw_value()).expect("below 1 MiB");
    params.hdr.cmdline_size = cmdline_len;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = u32::try_from(initrd.start.raw_value()).expect("below 2 GiB");
        params.hdr.ramdisk_size = u32::try_from(initrd.size).expect("below 2 GiB");
    }
    params.acpi_rsdp_addr = rsdp.raw_value();
    let map = memory_map(memory);
    params.e820_entries = u8::try_from(map.len()).expect("at most three");
    for (slot, (addr, size)) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: E820_RAM,
        };
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, layout::ZERO_PAGE), memory.mmap())?;
    Ok(())
}

/// Whether kernel and initrd can be loaded, for checking an image before a VM is made of it. Needs no KVM.
///
/// # Errors
/// As [`load`].
pub fn check_image(kernel: &Path, initrd: Option<&Path>) -> Result<(), BootError> {
    const ROOM: u64 = 1 << 30;
    let probe = GuestMemory::new(ROOM).map_err(|error| BootError::Unusable {
        path: kernel.to_owned(),
        why: error.to_string(),
    })?;
    load(&probe, kernel, initrd, "", layout::ACPI_RSDP).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scratch(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("kernel");
        std::fs::write(&path, bytes).expect("write");
        (dir, path)
    }

    #[test]
    fn garbage_is_neither_elf_nor_bzimage() {
        let garbage: Vec<u8> = (0..1u32 << 20)
            .map(|i| u8::try_from(i.wrapping_mul(2_654_435_761) >> 24).expect("8 bits"))
            .collect();
        let (_dir, path) = scratch(&garbage);
        assert!(matches!(
            check_image(&path, None),
            Err(BootError::UnknownFormat { .. })
        ));
    }

    #[test]
    fn a_truncated_elf_is_refused_by_name() {
        let (_dir, path) = scratch(b"\x7fELF\x02\x01\x01 and no more");
        let error = check_image(&path, None).expect_err("truncated").to_string();
        assert!(
            error.contains("kernel") && error.contains("is the file whole"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_or_empty_file_is_named() {
        let (_dir, path) = scratch(b"");
        assert!(matches!(
            check_image(&path, None),
            Err(BootError::File { what: "kernel", .. })
        ));
        assert!(matches!(
            check_image(Path::new("no-such-kernel"), None),
            Err(BootError::File { .. })
        ));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_header_panics_the_loader(header in proptest::collection::vec(any::<u8>(), 0..600), elf in any::<bool>()) {
            let mut bytes = header;
            if elf {
                bytes.splice(0..0, *b"\x7fELF\x02\x01\x01");
            } else if bytes.len() > 0x206 {
                bytes[0x202..0x206].copy_from_slice(b"HdrS");
            }
            let (_dir, path) = scratch(&bytes);
            let _ = check_image(&path, None);
        }
    }
}
