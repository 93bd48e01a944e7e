//! Devices the guest sees: a serial console, the keyboard controller's reset line, ACPI power registers, and ports where it
//! may tell its exit status, why it fails, and what time it missed. All are reached by port I/O; there is no MMIO device yet.

mod guest_gap;
mod last_words;
mod serial;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vm_superio::{I8042Device, Trigger};
use vmm_sys_util::eventfd::EventFd;

pub use guest_gap::GuestGap;
pub use serial::SerialDevice;

use self::last_words::LastWords;
use crate::arch::{acpi, layout};
use crate::console::Console;
use crate::state::{self, StateError};

/// The guest asked the machine to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PowerRequest {
    /// ACPI S5.
    Off,
    /// Keyboard controller or ACPI reset. A VM is not rebooted in place: the workload has ended.
    Reset,
    /// It can go no further, and says why.
    Failed(String),
}

const NO_STATUS: u32 = u32::MAX;
const OPEN_BUS: u8 = 0xff;

/// All devices of one VM.
#[derive(Debug)]
pub struct Devices {
    serial: Mutex<SerialDevice>,
    keyboard: Mutex<I8042Device<ResetLine>>,
    reset: Arc<AtomicBool>,
    exit_status: AtomicU32,
    guest_gap: Arc<GuestGap>,
    last_words: LastWords,
}

#[derive(Debug)]
struct ResetLine(Arc<AtomicBool>);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;
    fn trigger(&self) -> Result<(), Self::E> {
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }
}

/// Why devices could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No event descriptor.
    #[error("eventfd for the serial port: {0}")]
    EventFd(std::io::Error),
    /// KVM would not connect it to the interrupt line.
    #[error("KVM_IRQFD for the serial port: {0}")]
    IrqFd(kvm_ioctls::Error),
}

impl Devices {
    /// Devices connected to `vm`'s interrupt lines, with output to `console`.
    ///
    /// # Errors
    /// When an interrupt cannot be connected.
    pub fn new(vm: &VmFd, console: Arc<Console>, guest_gap: Arc<GuestGap>) -> Result<Self, DeviceError> {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(DeviceError::EventFd)?;
        vm.register_irqfd(&interrupt, layout::SERIAL_IRQ)
            .map_err(DeviceError::IrqFd)?;
        let reset = Arc::new(AtomicBool::new(false));
        Ok(Self {
            serial: Mutex::new(SerialDevice::new(interrupt, console)),
            keyboard: Mutex::new(I8042Device::new(ResetLine(Arc::clone(&reset)))),
            reset,
            exit_status: AtomicU32::new(NO_STATUS),
            guest_gap,
            last_words: LastWords::default(),
        })
    }

    /// The guest wrote `data` to `port`, one byte after another; those after a request to stop are lost with the guest.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<PowerRequest> {
        if port == layout::GUEST_GAP_PORT {
            self.guest_gap.write(data);
            return None;
        }
        data.iter().find_map(|&byte| self.port_write_byte(port, byte))
    }

    fn port_write_byte(&self, port: u16, byte: u8) -> Option<PowerRequest> {
        if let Some(offset) = serial_offset(port) {
            lock(&self.serial).write(offset, byte);
            return None;
        }
        match port {
            layout::I8042_COMMAND_PORT => {
                let Ok(()) = lock(&self.keyboard).write(4, byte);
                self.reset
                    .swap(false, Ordering::SeqCst)
                    .then_some(PowerRequest::Reset)
            }
            layout::ACPI_SLEEP_PORT => (byte == acpi::POWER_OFF_VALUE).then_some(PowerRequest::Off),
            layout::ACPI_RESET_PORT => Some(PowerRequest::Reset),
            layout::EXIT_STATUS_PORT => {
                self.exit_status.store(u32::from(byte), Ordering::SeqCst);
                None
            }
            layout::LAST_WORDS_PORT => self.last_words.write(byte).map(PowerRequest::Failed),
            _ => None,
        }
    }

    /// Why the guest fails, if it had begun to say so when it ended.
    #[must_use]
    pub fn unfinished_last_words(&self) -> Option<String> {
        self.last_words.unfinished()
    }

    /// The guest reads `data.len()` bytes from `port`. Ports without a device read as an open bus.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = match port {
                layout::I8042_COMMAND_PORT => lock(&self.keyboard).read(4),
                layout::ACPI_SLEEP_PORT => 0,
                _ => serial_offset(port).map_or(OPEN_BUS, |offset| lock(&self.serial).read(offset)),
            };
        }
    }

    /// Bytes from the user to the guest's console; answers how many its FIFO took.
    pub fn console_input(&self, data: &[u8]) -> usize {
        lock(&self.serial).input(data)
    }

    /// What the workload reported as its exit status, if it did.
    #[must_use]
    pub fn exit_status(&self) -> Option<u8> {
        u8::try_from(self.exit_status.load(Ordering::SeqCst)).ok()
    }

    /// Device state, as sections of the VM's state. vCPUs must be paused.
    pub fn save(&self, writer: &mut state::Writer) {
        lock(&self.serial).save(writer);
        writer.section(
            state::Kind::Power,
            0,
            &state::PowerState {
                exit_status: self.exit_status().map(u32::from),
                guest_gap_us: self.guest_gap.longest_us(),
                last_words: self.last_words.save(),
            },
        );
    }

    /// Takes over saved device state.
    ///
    /// # Errors
    /// When a section is missing or malformed.
    pub fn restore(&self, reader: &state::Reader) -> Result<(), StateError> {
        lock(&self.serial).restore(reader)?;
        let power: state::PowerState = reader.section(state::Kind::Power, 0)?;
        self.exit_status
            .store(power.exit_status.unwrap_or(NO_STATUS), Ordering::SeqCst);
        self.guest_gap.restore(power.guest_gap_us);
        self.last_words.restore(power.last_words);
        Ok(())
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    port.checked_sub(layout::SERIAL_PORT)
        .and_then(|offset| u8::try_from(offset).ok())
        .filter(|&offset| offset < 8)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
