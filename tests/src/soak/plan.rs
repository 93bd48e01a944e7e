//! What the moves of a soak are like: decided by a seed alone, so that a run can be had again.

use shoal_proto::vm::{Compression, MemoryBacking, MigrationPolicy, OnStall, Verify};

/// Random numbers that need not be good: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        let index = self.below(choices.len() as u64);
        choices[usize::try_from(index).expect("an index")]
    }
}

/// How the two ends are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Link {
    /// TCP.
    Plain,
    /// TLS over TCP.
    Tls,
    /// A Unix socket. Memory that is a file is handed over; other memory is sent.
    SameHost,
}

/// What is to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    Nothing,
    /// It is cancelled so many ms after it was asked for; that may be too late.
    Cancel(u64),
    /// The connections are cut once so many bytes went to the destination.
    Cut(u64),
    /// The destination has this fault.
    Fault(&'static str),
}

/// One move.
#[derive(Debug, Clone)]
pub struct Move {
    /// How the ends are joined.
    pub link: Link,
    /// What the destination's memory is made of, if it is not handed over.
    pub backing: MemoryBacking,
    /// How it is to go.
    pub policy: MigrationPolicy,
    /// What is to go wrong.
    pub trouble: Trouble,
    /// A fault that strikes the VM's new VMM when it is the source of a later move.
    pub later: Option<&'static str>,
}

const FAULTS_AT_DESTINATION: [&str; 10] = [
    "destination.connect=error",
    "destination.negotiate=kill",
    "destination.memory=oom",
    "destination.pre_copy=kill",
    "destination.pause=error",
    "destination.state=error",
    "destination.state=kill",
    "destination.ready=error",
    "destination.ready=kill",
    "destination.ran_mark=disk_full",
];
/// Those that do not cost the guest its life.
const FAULTS_AT_SOURCE: [&str; 7] = [
    "source.negotiate=error",
    "source.pre_copy=error",
    "source.pause=error",
    "source.final_pages=error",
    "source.state=error",
    "source.ready=error",
    "source.commit=error",
];
const MIB: u64 = 1 << 20;

/// The next move. One in eight is troubled, another eighth is cancelled.
#[must_use]
pub fn next(random: &mut Random) -> Move {
    let link = random.one_of(&[Link::Plain, Link::Plain, Link::Tls, Link::Tls, Link::SameHost]);
    let trouble = match random.below(16) {
        0 | 1 => Trouble::Cancel(random.below(120)),
        2 if link != Link::SameHost => Trouble::Cut(random.below(24 * MIB)),
        3 => Trouble::Fault(random.one_of(&FAULTS_AT_DESTINATION)),
        _ => Trouble::Nothing,
    };
    let backing = random.one_of(&[MemoryBacking::Anonymous, MemoryBacking::Shared]);
    let later = (random.below(12) == 0).then(|| random.one_of(&FAULTS_AT_SOURCE));
    Move {
        link,
        backing,
        policy: policy(random),
        trouble,
        later,
    }
}

fn policy(random: &mut Random) -> MigrationPolicy {
    use OnStall::{Cancel, Force, PostCopy, Throttle};
    let on_stall = random.one_of(&[Cancel, Cancel, Throttle, Throttle, PostCopy, PostCopy, Force]);
    // A limit that the guest's writing does not allow, so that each policy has to act; but for `Cancel`, which would
    // wait for its end in vain.
    let (max_downtime, timeout, bandwidth) = match on_stall {
        Throttle => (5, 60_000, random.one_of(&[24, 32])),
        PostCopy => (5, 1, random.one_of(&[24, 48])),
        Force => (1, 200, random.one_of(&[32, 64])),
        _ => (300, 60_000, random.one_of(&[0, 0, 64, 256])),
    };
    MigrationPolicy {
        max_downtime_ms: Some(max_downtime),
        timeout_ms: Some(timeout),
        on_stall: on_stall.into(),
        bandwidth_bytes_per_second: Some(bandwidth * MIB),
        connections: Some(random.one_of(&[0, 1, 2, 4])),
        compression: random
            .one_of(&[
                Compression::Auto,
                Compression::Off,
                Compression::Lz4,
                Compression::Zstd,
            ])
            .into(),
        verify: random
            .one_of(&[Verify::Off, Verify::Sampled, Verify::Full])
            .into(),
        priority: None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_says_it_all_and_a_short_soak_has_some_of_everything() {
        let moves = |seed| {
            let mut random = Random::new(seed);
            (0..super::super::SHORT)
                .map(|_| next(&mut random))
                .collect::<Vec<_>>()
        };
        let plan = moves(super::super::SEED);
        let text = |plan: &[Move]| format!("{plan:?}");
        assert_eq!(text(&plan), text(&moves(super::super::SEED)));
        assert_ne!(text(&plan), text(&moves(super::super::SEED + 1)));
        let count = |what: &dyn Fn(&Move) -> String| plan.iter().map(what).collect::<BTreeSet<_>>().len();
        assert_eq!(count(&|m| format!("{:?}", m.link)), 3);
        assert_eq!(count(&|m| m.policy.on_stall().as_str_name().into()), 4);
        assert_eq!(count(&|m| m.policy.verify().as_str_name().into()), 3);
        assert_eq!(count(&|m| m.policy.compression().as_str_name().into()), 4);
        assert_eq!(count(&|m| format!("{:?}", m.policy.connections)), 4);
        let troubled = |wanted: fn(&Trouble) -> bool| plan.iter().any(|m| wanted(&m.trouble));
        assert!(troubled(|trouble| matches!(trouble, Trouble::Cancel(_))));
        assert!(troubled(|trouble| matches!(trouble, Trouble::Cut(_))));
        assert!(troubled(|trouble| matches!(trouble, Trouble::Fault(_))));
        assert!(plan.iter().any(|m| m.later.is_some()));
    }
}
