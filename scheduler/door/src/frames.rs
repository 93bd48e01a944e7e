//! How far a client has come in HTTP/2: whether it has greeted, and whether it has begun a call.

/// The client's half of the connection preface (RFC 9113, 3.4), in bytes.
pub const PREFACE: usize = 24;
/// What each frame begins with (RFC 9113, 4.1): 3 bytes length of what follows, 1 byte type, 5 bytes of no interest here.
pub const HEADER: usize = 9;
/// Type of the frame that begins a call.
pub const HEADERS: u8 = 1;

/// Follows the bytes of a client up to its first call. Whether they make sense is for the server to judge.
#[derive(Debug)]
pub struct Frames {
    /// Bytes until the next frame begins.
    skip: usize,
    /// Of a frame, as far as it has come.
    header: [u8; HEADER],
    come: usize,
    greeted: bool,
    called: bool,
}

impl Frames {
    pub const fn new() -> Self {
        Self {
            skip: PREFACE,
            header: [0; HEADER],
            come: 0,
            greeted: false,
            called: false,
        }
    }

    /// Takes what came next.
    pub fn hear(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.called {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            self.greeted |= self.skip == 0;
            let taken = if self.skip == 0 {
                (HEADER - self.come).min(bytes.len())
            } else {
                0
            };
            self.header[self.come..self.come + taken].copy_from_slice(&bytes[..taken]);
            self.come += taken;
            bytes = &bytes[taken..];
            if self.come == HEADER {
                let [a, b, c, kind, ..] = self.header;
                self.called = kind == HEADERS;
                self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
                self.come = 0;
            }
        }
    }

    /// Whether all of the preface has come.
    pub const fn have_greeting(&self) -> bool {
        self.greeted
    }

    /// Whether a call has begun.
    pub const fn have_call(&self) -> bool {
        self.called
    }
}
