//! The guest's console output as a stream with absolute offsets, so that no byte is lost or repeated by a migration.
//!
//! Bytes stay here until they are acknowledged (stored elsewhere). What is not yet acknowledged moves with the VM.

use std::collections::VecDeque;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Most unacknowledged bytes kept; past it the oldest are dropped, which readers see as a gap in the offsets.
pub const CAPACITY: usize = 1 << 20;

/// Console output of one VM; it is numbered on from what earlier runs of it wrote.
#[derive(Debug, Default)]
pub struct Console {
    buffer: Mutex<Buffer>,
    reader_waits: AtomicBool,
    written: Notify,
    mirror_to_stdout: bool,
}

#[derive(Debug, Default)]
struct Buffer {
    /// Absolute offset of the first byte of `bytes`.
    base: u64,
    bytes: VecDeque<u8>,
}

impl Buffer {
    fn end(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    fn drop_before(&mut self, offset: u64) {
        let count = offset.saturating_sub(self.base).min(self.bytes.len() as u64);
        self.bytes
            .drain(..usize::try_from(count).expect("at most the capacity"));
        self.base += count;
    }
}

/// Part of the stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chunk {
    /// Absolute offset of the first byte.
    pub offset: u64,
    /// The bytes.
    pub data: Vec<u8>,
}

impl Console {
    /// An empty console; with `mirror_to_stdout`, for a VM run by hand, output also goes to standard output.
    #[must_use]
    pub fn new(mirror_to_stdout: bool) -> Self {
        Self {
            mirror_to_stdout,
            ..Self::default()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends what the guest wrote.
    pub fn write(&self, data: &[u8]) {
        {
            let mut buffer = self.lock();
            buffer.bytes.extend(data);
            if buffer.bytes.len() > CAPACITY {
                let oldest = buffer.end() - CAPACITY as u64;
                buffer.drop_before(oldest);
            }
        }
        if self.mirror_to_stdout {
            let mut stdout = std::io::stdout().lock();
            // A closed standard output must not stop the guest.
            let _ = stdout.write_all(data).and_then(|()| stdout.flush());
        }
        if self.reader_waits.swap(false, Ordering::SeqCst) {
            self.written.notify_waiters();
        }
    }

    /// Absolute offset after the last byte written.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.lock().end()
    }

    /// Up to `limit` bytes from `from` on, or from the oldest byte kept if that is later.
    #[must_use]
    pub fn read(&self, from: u64, limit: usize) -> Chunk {
        let buffer = self.lock();
        let offset = from.clamp(buffer.base, buffer.end());
        let skip = usize::try_from(offset - buffer.base).expect("at most the capacity");
        Chunk {
            offset,
            data: buffer.bytes.iter().skip(skip).take(limit).copied().collect(),
        }
    }

    /// Waits until there is a byte at or after `from`.
    pub async fn wait_past(&self, from: u64) {
        loop {
            let written = self.written.notified();
            tokio::pin!(written);
            // Registered before the check, so that a write between the check and the wait is not missed.
            written.as_mut().enable();
            self.reader_waits.store(true, Ordering::SeqCst);
            if self.end() > from {
                return;
            }
            written.await;
        }
    }

    /// Bytes before `offset` are stored elsewhere.
    pub fn acknowledge(&self, offset: u64) {
        self.lock().drop_before(offset);
    }

    /// Everything not yet acknowledged, to move with the VM.
    #[must_use]
    pub fn save(&self) -> Chunk {
        self.read(0, CAPACITY)
    }

    /// The first byte has this number: earlier runs of the VM wrote those before it.
    pub fn begin_at(&self, offset: u64) {
        self.lock().base = offset;
    }

    /// Takes over the stream of a VM that moved here. Longer than [`CAPACITY`]: the oldest bytes are dropped.
    pub fn restore(&self, saved: Chunk) {
        let excess = saved.data.len().saturating_sub(CAPACITY) as u64;
        let mut buffer = self.lock();
        buffer.base = saved.offset;
        buffer.bytes = saved.data.into();
        let oldest = buffer.base + excess;
        buffer.drop_before(oldest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn offsets_go_on_across_a_move() {
        let source = Console::new(false);
        source.write(b"hello ");
        source.acknowledge(4);
        let destination = Console::new(false);
        destination.restore(source.save());
        destination.write(b"world");
        assert_eq!(
            destination.read(0, 100),
            Chunk {
                offset: 4,
                data: b"o world".to_vec()
            }
        );
        assert_eq!(destination.end(), 11);
    }

    #[test]
    fn a_new_run_is_numbered_on_from_the_one_before() {
        let console = Console::new(false);
        console.begin_at(70);
        console.write(b"again");
        assert_eq!(console.read(0, 100).offset, 70);
        console.acknowledge(60); // of the run before, late
        let all = Chunk {
            offset: 70,
            data: b"again".to_vec(),
        };
        assert_eq!((console.save(), console.end()), (all, 75));
    }

    #[test]
    fn an_overrun_is_visible_as_a_gap() {
        let console = Console::new(false);
        console.write(&vec![b'a'; CAPACITY]);
        console.write(b"bcd");
        assert_eq!(console.read(0, 1).offset, 3);
        assert_eq!(console.end(), CAPACITY as u64 + 3);
    }

    proptest! {
        #[test]
        fn a_reader_that_acknowledges_sees_every_byte_once(writes in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 0..50), 0..50), step in 1usize..40) {
            let console = Console::new(false);
            let (mut seen, mut expected) = (vec![], vec![]);
            for data in writes {
                console.write(&data);
                expected.extend_from_slice(&data);
                let chunk = console.read(seen.len() as u64, step);
                prop_assert_eq!(chunk.offset, seen.len() as u64);
                seen.extend_from_slice(&chunk.data);
                console.acknowledge(seen.len() as u64);
            }
            seen.extend(console.read(seen.len() as u64, usize::MAX).data);
            prop_assert_eq!(seen, expected);
        }
    }
}
