//! What is migrated: a probe of 1 GiB, with different work to do.

/// Memory of every guest here.
pub const MEMORY: u64 = 1 << 30;

/// One kind of guest.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What `--case` selects.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// The probe's options.
    pub cmdline: &'static str,
    /// Bytes that the probe fills before it is moved.
    pub filled: u64,
}

/// All of them.
pub const CASES: [Case; 5] = [
    Case {
        name: "filled",
        title: "idle, 900 MiB of random bytes",
        cmdline: "fill=900MiB pattern=random",
        filled: 900 << 20,
    },
    Case {
        name: "untouched",
        title: "idle, mostly zero: memory was never touched",
        cmdline: "fill=0",
        filled: 0,
    },
    Case {
        name: "zeroed",
        title: "idle, mostly zero: 900 MiB were filled with zeros",
        cmdline: "fill=900MiB pattern=zero",
        filled: 900 << 20,
    },
    Case {
        name: "wss64",
        title: "64 MiB dirtied at 10,000 pages/s",
        cmdline: "wss=64MiB rate=10000 pattern=random",
        filled: 64 << 20,
    },
    Case {
        name: "wss256",
        title: "256 MiB dirtied at 50,000 pages/s",
        cmdline: "wss=256MiB rate=50000 pattern=random",
        filled: 256 << 20,
    },
];
