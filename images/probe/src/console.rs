//! The serial console (16550, COM1).

use core::fmt::{self, Write};

use probe::text::Lines;

use crate::machine::{read_port, write_port};

const SERIAL_DATA: u16 = 0x3f8;
const SERIAL_FIFO_CONTROL: u16 = 0x3fa;
const SERIAL_LINE_STATUS: u16 = 0x3fd;
const SERIAL_TRANSMITTER_EMPTY: u8 = 0x20;
const SERIAL_FIFO_SIZE: u8 = 16;

/// Writes a line at once, waiting for every byte: before the main loop, and when all is lost.
pub fn say(line: fmt::Arguments<'_>) {
    struct Serial;
    impl Write for Serial {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            for byte in text.bytes() {
                while read_port(SERIAL_LINE_STATUS) & SERIAL_TRANSMITTER_EMPTY == 0 {}
                write_port(SERIAL_DATA, byte);
            }
            Ok(())
        }
    }
    // `Serial` never fails, and there is nowhere else to complain.
    let _ = Serial.write_fmt(line).and_then(|()| Serial.write_char('\n'));
}

/// The serial port as the main loop uses it: at most one access per iteration.
#[derive(Debug, Default)]
pub struct Console {
    fifo_enabled: bool,
    /// Bytes that the port takes before its status must be asked again.
    room: u8,
}

impl Console {
    /// Does one port access, if there is anything to send.
    pub fn pump(&mut self, lines: &mut Lines) {
        if lines.is_empty() {
            return;
        }
        if !self.fifo_enabled {
            write_port(SERIAL_FIFO_CONTROL, 1);
            self.fifo_enabled = true;
        } else if self.room == 0 {
            let empty = read_port(SERIAL_LINE_STATUS) & SERIAL_TRANSMITTER_EMPTY != 0;
            self.room = if empty { SERIAL_FIFO_SIZE } else { 0 };
        } else if let Some(byte) = lines.pop() {
            write_port(SERIAL_DATA, byte);
            self.room -= 1;
        }
    }
}
