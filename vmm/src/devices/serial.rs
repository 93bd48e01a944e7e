//! The serial console: a 16550A (vm-superio) whose output is the VM's [`Console`].

use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::console::{Chunk, Console};
use crate::state::{self, StateError};

/// Far more than any guest writes, and far from overflowing.
const MAX_CONSOLE_OFFSET: u64 = 1 << 60;

/// The interrupt line, as an irqfd.
#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Output(Arc<Console>);

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// COM1.
pub struct SerialDevice {
    uart: Serial<Interrupt, NoEvents, Output>,
    console: Arc<Console>,
}

impl std::fmt::Debug for SerialDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialDevice").finish_non_exhaustive()
    }
}

impl SerialDevice {
    pub(super) fn new(interrupt: EventFd, console: Arc<Console>) -> Self {
        let uart = Serial::new(Interrupt(interrupt), Output(Arc::clone(&console)));
        Self { uart, console }
    }

    pub(super) fn write(&mut self, offset: u8, byte: u8) {
        if let Err(error) = self.uart.write(offset, byte) {
            tracing::debug!(?error, "serial write");
        }
    }

    pub(super) fn read(&mut self, offset: u8) -> u8 {
        self.uart.read(offset)
    }

    pub(super) fn input(&mut self, data: &[u8]) -> usize {
        let room = self.uart.fifo_capacity().min(data.len());
        self.uart.enqueue_raw_bytes(&data[..room]).unwrap_or(0)
    }

    pub(super) fn save(&self, writer: &mut state::Writer) {
        let uart = self.uart.state();
        let registers = vec![
            uart.baud_divisor_low,
            uart.baud_divisor_high,
            uart.interrupt_enable,
            uart.interrupt_identification,
            uart.line_control,
            uart.line_status,
            uart.modem_control,
            uart.modem_status,
            uart.scratch,
        ];
        writer.section(
            state::Kind::Serial,
            0,
            &state::SerialState {
                registers,
                input: uart.in_buffer,
            },
        );
        let console = self.console.save();
        writer.section(
            state::Kind::Console,
            0,
            &state::ConsoleState {
                offset: console.offset,
                data: console.data,
            },
        );
    }

    pub(super) fn restore(&mut self, reader: &state::Reader) -> Result<(), StateError> {
        let saved: state::SerialState = reader.section(state::Kind::Serial, 0)?;
        let console: state::ConsoleState = reader.section(state::Kind::Console, 0)?;
        if console.offset > MAX_CONSOLE_OFFSET {
            let why = format!(
                "offset {} is more than a console can have written",
                console.offset
            );
            let kind = state::Kind::Console;
            return Err(StateError::Malformed { kind, why });
        }
        let malformed = |why: String| StateError::Malformed {
            kind: state::Kind::Serial,
            why,
        };
        let registers: [u8; 9] = saved
            .registers
            .as_slice()
            .try_into()
            .map_err(|_| malformed(format!("{} registers", saved.registers.len())))?;
        let [
            low,
            high,
            enable,
            identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = registers;
        let uart = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: saved.input,
        };
        // A raised line is part of the restored irqchip; from_state raises it again if the UART still asks for it.
        let interrupt = Interrupt(
            self.uart
                .interrupt_evt()
                .0
                .try_clone()
                .map_err(|error| malformed(error.to_string()))?,
        );
        self.uart = Serial::from_state(&uart, interrupt, NoEvents, Output(Arc::clone(&self.console)))
            .map_err(|error| malformed(format!("{error:?}")))?;
        self.console.restore(Chunk {
            offset: console.offset,
            data: console.data,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> SerialDevice {
        SerialDevice::new(
            EventFd::new(libc::EFD_NONBLOCK).expect("eventfd"),
            Arc::new(Console::new(false)),
        )
    }

    #[test]
    fn save_change_restore_save_is_equal() {
        let mut device = device();
        device.write(3, 0x1b);
        device.write(7, 0x5a);
        device.write(1, 1);
        device.write(0, b'x');
        device.input(b"typed");
        let save = |device: &SerialDevice| {
            let mut writer = state::Writer::new();
            device.save(&mut writer);
            writer.finish()
        };
        let before = save(&device);
        device.write(7, 0xa5);
        device.write(0, b'y');
        device
            .restore(&state::Reader::parse(&before).expect("own state"))
            .expect("own state");
        assert_eq!(save(&device), before);
    }

    #[test]
    fn input_beyond_the_fifo_is_not_taken() {
        let mut device = device();
        assert!(device.input(&[b'a'; 1000]) < 1000);
        assert_eq!(device.input(b"b"), 0);
    }
}
