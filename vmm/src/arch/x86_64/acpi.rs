//! The few ACPI tables a guest needs to find its CPUs and to power off: RSDP, XSDT, FADT (hardware-reduced), MADT, DSDT.
//! Source: ACPI specification 6.5, chapters 4.1, 5.2.

use acpi_tables::Aml as _;
use acpi_tables::aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryError};

use super::layout;
use crate::memory::GuestMemory;

const OEM_ID: [u8; 6] = *b"SHOAL ";
const TABLE_ID: [u8; 8] = *b"SHOALVMM";
const REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;
const SDT_HEADER_LEN: u32 = 36;
/// Value of `SLP_TYPx` for S5 in our DSDT.
const S5_SLEEP_TYPE: u8 = 5;
/// What the guest writes to [`layout::ACPI_SLEEP_PORT`] to power off.
pub const POWER_OFF_VALUE: u8 = S5_SLEEP_TYPE << 2 | 1 << 5;

/// Writes the tables for `cpus` CPUs and returns the address of the RSDP.
///
/// # Errors
/// When guest memory is too small to hold them (it is not: the spec's minimum is far above).
pub fn write_tables(memory: &GuestMemory, cpus: u32) -> Result<GuestAddress, GuestMemoryError> {
    let mut next = layout::ACPI_RSDP.unchecked_add(Rsdp::len() as u64);
    let mut place = |bytes: &[u8]| -> Result<u64, GuestMemoryError> {
        let at = GuestAddress(next.raw_value().next_multiple_of(16));
        memory.mmap().write_slice(bytes, at)?;
        next = at.unchecked_add(bytes.len() as u64);
        Ok(at.raw_value())
    };
    let dsdt = place(dsdt().as_slice())?;
    let fadt = place(&fadt(dsdt))?;
    let madt = place(&madt(cpus))?;
    let mut xsdt = XSDT::new(OEM_ID, TABLE_ID, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let mut bytes = vec![];
    xsdt.to_aml_bytes(&mut bytes);
    let xsdt = place(&bytes)?;
    let mut bytes = vec![];
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut bytes);
    memory.mmap().write_slice(&bytes, layout::ACPI_RSDP)?;
    Ok(layout::ACPI_RSDP)
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut builder = FADTBuilder::new(OEM_ID, TABLE_ID, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    builder.reset_reg = port(layout::ACPI_RESET_PORT);
    builder.reset_value = 1;
    builder.sleep_control_reg = port(layout::ACPI_SLEEP_PORT);
    builder.sleep_status_reg = port(layout::ACPI_SLEEP_PORT);
    let mut bytes = vec![];
    builder.finalize().to_aml_bytes(&mut bytes);
    bytes
}

fn madt(cpus: u32) -> Vec<u8> {
    let mut table = MADT::new(
        OEM_ID,
        TABLE_ID,
        REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC),
    );
    for id in 0..u8::try_from(cpus).unwrap_or(u8::MAX) {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    let mut bytes = vec![];
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The serial port, and the sleep type that means power off.
fn dsdt() -> Sdt {
    let mut table = Sdt::new(
        *b"DSDT",
        SDT_HEADER_LEN,
        DSDT_REVISION,
        OEM_ID,
        TABLE_ID,
        REVISION,
    );
    let mut bytes = vec![];
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, layout::SERIAL_IRQ),
                    &aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&S5_SLEEP_TYPE])).to_aml_bytes(&mut bytes);
    table.append_slice(&bytes);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_sums_to_zero_and_states_its_length() {
        for table in [dsdt().as_slice().to_vec(), fadt(0xe0100), madt(4)] {
            assert_eq!(checksum(&table), 0, "{:?}", &table[..4]);
            assert_eq!(
                u32::from_le_bytes(table[4..8].try_into().expect("4 bytes")) as usize,
                table.len()
            );
        }
    }

    #[test]
    fn the_rsdp_leads_to_the_tables() {
        let memory = GuestMemory::new(2 << 20).expect("map");
        let rsdp = write_tables(&memory, 2).expect("fits");
        let mut bytes = [0u8; 36];
        memory.mmap().read_slice(&mut bytes, rsdp).expect("inside");
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!(checksum(&bytes), 0);
        let xsdt = u64::from_le_bytes(bytes[24..32].try_into().expect("8 bytes"));
        let mut signature = [0u8; 4];
        memory
            .mmap()
            .read_slice(&mut signature, GuestAddress(xsdt))
            .expect("inside");
        assert_eq!(&signature, b"XSDT");
    }
}
