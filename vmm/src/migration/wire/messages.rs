//! The messages in frames, but for pages.

/// First message of the source.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hello {
    /// Migration id, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub migration_id: Vec<u8>,
    /// The secret that the control plane gave both sides.
    #[prost(string, tag = "2")]
    pub token: String,
    /// VM id, 16 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub vm_id: Vec<u8>,
    /// The epoch the destination is to run it at.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    /// Guest RAM in bytes.
    #[prost(uint64, tag = "5")]
    pub memory_bytes: u64,
    /// vCPUs.
    #[prost(uint32, tag = "6")]
    pub cpus: u32,
    /// TSC frequency.
    #[prost(uint32, tag = "7")]
    pub tsc_khz: u32,
    /// `struct kvm_cpuid_entry2`, one after another.
    #[prost(bytes = "vec", tag = "8")]
    pub cpuid: Vec<u8>,
    /// MSRs whose values will be sent.
    #[prost(uint32, repeated, tag = "9")]
    pub msr_indices: Vec<u32>,
    /// Names of the devices in the state.
    #[prost(string, repeated, tag = "10")]
    pub devices: Vec<String>,
    /// The source's KVM emulates ring 0.
    #[prost(bool, tag = "11")]
    pub software_kvm: bool,
    /// Connections for pages that will be made.
    #[prost(uint32, tag = "12")]
    pub connections: u32,
    /// A descriptor of guest memory follows this frame; no page will be sent.
    #[prost(bool, tag = "13")]
    pub handover: bool,
    /// Post-copy is under way and its connections broke: what is still missing?
    #[prost(bool, tag = "14")]
    pub resume: bool,
    /// The vCPUs do not run, and are not to run at the destination either.
    #[prost(bool, tag = "15")]
    pub paused: bool,
}

/// The destination takes the VM.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct HelloAck {
    /// Protocol version it speaks.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Its host offers what post-copy needs.
    #[prost(bool, tag = "2")]
    pub post_copy: bool,
    /// It keeps the vCPUs paused, as Hello asks. One that does not know of that says nothing, and would run them.
    #[prost(bool, tag = "3")]
    pub paused: bool,
}

/// End of a pass on one connection; on the control connection, of the last pass on all.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Pass {
    /// From 1.
    #[prost(uint32, tag = "1")]
    pub pass: u32,
    /// Pages sent with their bytes, on this connection so far.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
    /// The guest is paused: these are its last pages, and every one must be right.
    #[prost(bool, tag = "3")]
    pub last: bool,
}

/// Acknowledges a pass.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PassAck {
    /// Which.
    #[prost(uint32, tag = "1")]
    pub pass: u32,
    /// As in [`Pass`].
    #[prost(uint64, tag = "2")]
    pub pages: u64,
    /// Guest physical addresses of pages whose bytes do not match their checksum: written while they were sent, or
    /// damaged on the way. They are sent again.
    #[prost(fixed64, repeated, tag = "3")]
    pub damaged: Vec<u64>,
}

/// More damaged pages than this in one pass on one connection is a broken link.
pub const MAX_DAMAGED: usize = 16 * 1024;

/// Damaged pages of a pass, bounded.
#[derive(Debug, Default)]
pub struct Damaged(Vec<u64>);

impl Damaged {
    /// Notes one; `false` if there are too many.
    pub fn note(&mut self, gpa: u64) -> bool {
        let room = self.0.len() < MAX_DAMAGED;
        if room {
            self.0.push(gpa);
        }
        room
    }

    /// The first.
    #[must_use]
    pub fn first(&self) -> Option<u64> {
        self.0.first().copied()
    }

    /// All of them; none are left.
    #[must_use]
    pub fn take(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.0)
    }
}

/// First frame of a connection that belongs to a migration under way.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Attach {
    /// Migration id, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub migration_id: Vec<u8>,
    /// The secret that the control plane gave both sides.
    #[prost(string, tag = "2")]
    pub token: String,
    /// Which of its kind, from 0.
    #[prost(uint32, tag = "3")]
    pub index: u32,
}

/// Asks the destination to digest its memory (Verify), and what the source has (Digest).
#[derive(Clone, PartialEq, prost::Message)]
pub struct Digest {
    /// `shoal.vm.v1.Verify`.
    #[prost(int32, tag = "1")]
    pub mode: i32,
    /// Which pages a sampled digest takes.
    #[prost(uint64, tag = "2")]
    pub seed: u64,
    /// The digest; empty in the request.
    #[prost(bytes = "vec", tag = "3")]
    pub digest: Vec<u8>,
}

/// Nothing but that it came.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Empty {}

/// Ready, Commit and Running carry nothing but which migration they mean.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Step {
    /// Migration id, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub migration_id: Vec<u8>,
}

/// Longest reason sent or shown, characters.
pub(super) const MAX_REASON: usize = 500;

impl Abort {
    /// With a reason that fits.
    #[must_use]
    pub fn because(reason: &str) -> Self {
        Self {
            reason: reason.chars().take(MAX_REASON).collect(),
        }
    }
}

/// Why a side ends it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Abort {
    /// In words.
    #[prost(string, tag = "1")]
    pub reason: String,
}
