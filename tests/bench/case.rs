//! What is migrated, and how it is asked for.

use shoal_proto::vm::{Compression, Verify};

const MIB: u64 = 1 << 20;
/// Memory of every guest whose size does not matter.
pub const MEMORY: u64 = 1 << 30;
/// Part of each GiB that is filled where memory is to be full.
const FULL: u64 = 900 * MIB;
/// Post-copy comes about by a link that is slower than the guest: so many bytes a second.
pub const POST_COPY_BANDWIDTH: u64 = 100 * MIB;

/// A guest and a way to move it.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What `--case` selects.
    pub name: &'static str,
    /// What it is part of; `--case` selects all of these, too.
    pub group: &'static str,
    /// In words.
    pub title: &'static str,
    /// The probe's options.
    pub cmdline: &'static str,
    /// Memory of the guest.
    pub memory: u64,
    /// Bytes that the probe fills before it is moved.
    pub filled: u64,
    /// How it is moved.
    pub settings: Settings,
    /// Whether QEMU can do the same.
    pub qemu: bool,
    /// Whether Cloud Hypervisor can.
    pub cloud_hypervisor: bool,
    /// Whether it is in the short benchmark.
    pub quick: bool,
    /// More runs than this take too long.
    pub max_runs: u32,
}

/// How a guest is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// For pages; 0: the VMM chooses.
    pub connections: u32,
    /// As the policy says it.
    pub compression: Compression,
    /// As the policy says it.
    pub verify: Verify,
    /// TLS 1.3 with certificates for both ends.
    pub tls: bool,
    /// A bandwidth too small for pre-copy, and a policy that allows post-copy.
    pub post_copy: bool,
    /// Within one host: memory goes by file descriptor.
    pub handover: bool,
    /// Between two network namespaces, at 1 Gbit/s.
    pub gigabit: bool,
}

const PLAIN: Settings = Settings {
    connections: 1,
    compression: Compression::Unspecified,
    verify: Verify::Unspecified,
    tls: false,
    post_copy: false,
    handover: false,
    gigabit: false,
};

const FILLED: Case = Case {
    name: "filled",
    group: "table",
    title: "idle, 900 MiB of random bytes",
    cmdline: "fill=900MiB pattern=random",
    memory: MEMORY,
    filled: FULL,
    settings: PLAIN,
    qemu: true,
    cloud_hypervisor: true,
    quick: false,
    max_runs: u32::MAX,
};

const WSS256: Case = Case {
    name: "wss256",
    title: "256 MiB dirtied at 50,000 pages/s",
    cmdline: "wss=256MiB rate=50000 pattern=random",
    filled: 256 * MIB,
    ..FILLED
};

const TEXT: Case = Case {
    group: "compression",
    title: "idle, 900 MiB of text",
    cmdline: "fill=900MiB pattern=text",
    qemu: false,
    cloud_hypervisor: false,
    ..FILLED
};

/// A guest of `gib` GiB, `cmdline` filling nine tenths.
const fn sized(case: Case, gib: u64, name: &'static str, title: &'static str, cmdline: &'static str) -> Case {
    Case {
        name,
        title,
        cmdline,
        memory: gib << 30,
        filled: gib * FULL,
        cloud_hypervisor: false,
        max_runs: 3,
        ..case
    }
}

const HANDOVER: Case = Case {
    group: "handover",
    settings: Settings {
        handover: true,
        ..PLAIN
    },
    qemu: false,
    ..FILLED
};

const SWEEP: Case = Case {
    group: "sweep",
    ..FILLED
};

/// The first of [`CASES`] that `cargo xtask bench` runs.
pub const BASIC: usize = 5;

/// All of them.
pub const CASES: [Case; 30] = [
    Case {
        quick: true,
        ..FILLED
    },
    Case {
        name: "untouched",
        title: "idle, mostly zero: memory was never touched",
        cmdline: "fill=0",
        filled: 0,
        ..FILLED
    },
    Case {
        name: "zeroed",
        title: "idle, mostly zero: 900 MiB were filled with zeros",
        cmdline: "fill=900MiB pattern=zero",
        ..FILLED
    },
    Case {
        name: "wss64",
        title: "64 MiB dirtied at 10,000 pages/s",
        cmdline: "wss=64MiB rate=10000 pattern=random",
        filled: 64 * MIB,
        ..FILLED
    },
    Case {
        quick: true,
        ..WSS256
    },
    Case {
        name: "filled-auto",
        group: "connections",
        title: "filled, as many connections as the VMM chooses",
        settings: Settings {
            connections: 0,
            ..PLAIN
        },
        qemu: false,
        cloud_hypervisor: false,
        ..FILLED
    },
    Case {
        name: "filled-2",
        group: "connections",
        title: "filled, 2 connections",
        settings: Settings {
            connections: 2,
            ..PLAIN
        },
        ..FILLED
    },
    Case {
        name: "filled-4",
        group: "connections",
        title: "filled, 4 connections",
        settings: Settings {
            connections: 4,
            ..PLAIN
        },
        quick: true,
        ..FILLED
    },
    Case {
        name: "tls-filled",
        group: "tls",
        title: "filled, over TLS 1.3",
        settings: Settings { tls: true, ..PLAIN },
        cloud_hypervisor: false,
        quick: true,
        ..FILLED
    },
    Case {
        name: "tls-wss256",
        group: "tls",
        title: "256 MiB dirtied at 50,000 pages/s, over TLS 1.3",
        settings: Settings { tls: true, ..PLAIN },
        cloud_hypervisor: false,
        ..WSS256
    },
    Case {
        name: "text-off",
        title: "idle, 900 MiB of text, compression off",
        settings: Settings {
            compression: Compression::Off,
            ..PLAIN
        },
        qemu: true,
        ..TEXT
    },
    Case {
        name: "text-auto",
        settings: Settings {
            compression: Compression::Auto,
            ..PLAIN
        },
        quick: true,
        ..TEXT
    },
    Case {
        name: "text-lz4",
        title: "idle, 900 MiB of text, LZ4",
        settings: Settings {
            compression: Compression::Lz4,
            ..PLAIN
        },
        ..TEXT
    },
    Case {
        name: "text-zstd",
        title: "idle, 900 MiB of text, Zstandard",
        settings: Settings {
            compression: Compression::Zstd,
            ..PLAIN
        },
        qemu: true,
        ..TEXT
    },
    Case {
        name: "random-lz4",
        title: "idle, 900 MiB of random bytes, LZ4 though it cannot help",
        cmdline: FILLED.cmdline,
        settings: Settings {
            compression: Compression::Lz4,
            ..PLAIN
        },
        ..TEXT
    },
    Case {
        name: "post-copy",
        group: "post-copy",
        title: "256 MiB dirtied at 50,000 pages/s, pre-copy held to 100 MiB/s, then post-copy",
        settings: Settings {
            post_copy: true,
            ..PLAIN
        },
        cloud_hypervisor: false,
        quick: true,
        ..WSS256
    },
    Case {
        name: "verify-sampled",
        group: "verify",
        title: "filled, one page in 64 compared",
        settings: Settings {
            verify: Verify::Sampled,
            ..PLAIN
        },
        qemu: false,
        cloud_hypervisor: false,
        ..FILLED
    },
    Case {
        name: "verify-full",
        group: "verify",
        title: "filled, every page compared",
        settings: Settings {
            verify: Verify::Full,
            ..PLAIN
        },
        qemu: false,
        cloud_hypervisor: false,
        quick: true,
        ..FILLED
    },
    Case {
        quick: true,
        ..sized(
            HANDOVER,
            1,
            "handover-1g",
            "filled, 1 GiB, within the host",
            FILLED.cmdline,
        )
    },
    sized(
        HANDOVER,
        2,
        "handover-2g",
        "filled, 2 GiB, within the host",
        "fill=1800MiB pattern=random",
    ),
    sized(
        HANDOVER,
        4,
        "handover-4g",
        "filled, 4 GiB, within the host",
        "fill=3600MiB pattern=random",
    ),
    sized(
        HANDOVER,
        8,
        "handover-8g",
        "filled, 8 GiB, within the host",
        "fill=7200MiB pattern=random",
    ),
    Case {
        name: "handover-wss256",
        title: "256 MiB dirtied at 50,000 pages/s, within the host",
        cmdline: WSS256.cmdline,
        filled: WSS256.filled,
        cloud_hypervisor: false,
        ..HANDOVER
    },
    sized(
        SWEEP,
        2,
        "sweep-2g",
        "filled, 2 GiB",
        "fill=1800MiB pattern=random",
    ),
    sized(
        SWEEP,
        4,
        "sweep-4g",
        "filled, 4 GiB",
        "fill=3600MiB pattern=random",
    ),
    sized(
        SWEEP,
        8,
        "sweep-8g",
        "filled, 8 GiB",
        "fill=7200MiB pattern=random",
    ),
    gigabit(
        "link-random",
        "900 MiB of random bytes over 1 Gbit/s",
        FILLED.cmdline,
        PLAIN.compression,
    ),
    gigabit(
        "link-text",
        "900 MiB of text over 1 Gbit/s",
        TEXT.cmdline,
        Compression::Auto,
    ),
    gigabit(
        "link-text-zstd",
        "900 MiB of text over 1 Gbit/s, Zstandard",
        TEXT.cmdline,
        Compression::Zstd,
    ),
    Case {
        filled: 64 * MIB,
        ..gigabit(
            "link-wss64",
            "64 MiB dirtied at 10,000 pages/s over 1 Gbit/s",
            "wss=64MiB rate=10000 pattern=random",
            PLAIN.compression,
        )
    },
];

const fn gigabit(
    name: &'static str,
    title: &'static str,
    cmdline: &'static str,
    compression: Compression,
) -> Case {
    Case {
        name,
        group: "link",
        title,
        cmdline,
        settings: Settings {
            compression,
            gigabit: true,
            ..PLAIN
        },
        cloud_hypervisor: false,
        max_runs: 3,
        ..FILLED
    }
}

/// What `--case` may say: names, then groups.
pub fn selectors() -> Vec<&'static str> {
    let mut words: Vec<_> = CASES.iter().map(|case| case.name).collect();
    for case in CASES {
        if !words.contains(&case.group) {
            words.push(case.group);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_guests_fit() {
        let names: HashSet<_> = CASES.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), CASES.len());
        for case in CASES {
            assert!(case.filled < case.memory, "{}", case.name);
            let full = format!("={}MiB", case.filled / MIB);
            assert!(case.filled == 0 || case.cmdline.contains(&full), "{}", case.name);
        }
        assert!(CASES[..BASIC].iter().all(|case| case.group == "table"));
        assert!(CASES[BASIC..].iter().all(|case| case.group != "table"));
    }
}
