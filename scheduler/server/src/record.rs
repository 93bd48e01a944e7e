//! What the store keeps. Each record is the whole truth about its subject: nothing else has to be asked to go on
//! after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use shoal_plan::{Kernels, KvmKind, Labels, Rules, SoftwareKernel};
use shoal_proto::{Epoch, MigrationId, NodeName, VmId, VmName, node, vm};

use crate::cpus::CpuDigest;

/// A file of the image store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRef {
    /// SHA-256 in lower-case hex.
    pub sha256: String,
    /// Its length.
    pub size_bytes: u64,
}

impl BlobRef {
    fn to_wire(&self) -> node::Blob {
        node::Blob {
            sha256: self.sha256.clone(),
            size_bytes: self.size_bytes,
        }
    }
}

/// What an image has for hosts whose KVM has no hardware virtualization.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoftwareKvm {
    /// In place of the other kernel; none: that serves there, too.
    pub kernel: Option<BlobRef>,
    /// Added to the command line.
    pub cmdline: String,
    /// The most vCPUs, if that is a limit of its own.
    pub max_cpus: Option<u32>,
}

impl SoftwareKvm {
    fn to_wire(&self) -> node::SoftwareKvm {
        node::SoftwareKvm {
            kernel: self.kernel.as_ref().map(BlobRef::to_wire),
            cmdline: self.cmdline.clone(),
            max_cpus: self.max_cpus.unwrap_or(0),
        }
    }
}

/// An imported image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Unique name; importing the same name again replaces the record, not the VMs made from it.
    pub name: String,
    /// SHA-256 over everything below but the time.
    pub digest: String,
    /// Guest kernel; none: it has one for hosts without hardware virtualization only.
    pub kernel: Option<BlobRef>,
    /// Initial RAM disk.
    pub initrd: Option<BlobRef>,
    /// Kernel command line.
    pub cmdline: String,
    /// For hosts without hardware virtualization.
    #[serde(default)]
    pub software_kvm: Option<SoftwareKvm>,
    /// Default number of vCPUs.
    pub cpus: u32,
    /// The most vCPUs that its kernels use, if they have such a limit. Not in the digests of images without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cpus: Option<u32>,
    /// Default memory.
    pub memory_bytes: u64,
    /// Time of import.
    pub created_unix_ms: i64,
}

impl ImageRecord {
    /// Its files.
    pub fn blobs(&self) -> impl Iterator<Item = &BlobRef> {
        blobs(&self.kernel, &self.initrd, &self.software_kvm)
    }

    /// On which hosts it can start.
    pub fn kernels(&self) -> Kernels {
        kernels(&self.name, &self.kernel, &self.software_kvm)
    }
}

fn blobs<'a>(
    kernel: &'a Option<BlobRef>,
    initrd: &'a Option<BlobRef>,
    software_kvm: &'a Option<SoftwareKvm>,
) -> impl Iterator<Item = &'a BlobRef> {
    let of_software = software_kvm
        .as_ref()
        .and_then(|software| software.kernel.as_ref());
    kernel.iter().chain(initrd).chain(of_software)
}

fn kernels(image: &str, kernel: &Option<BlobRef>, software_kvm: &Option<SoftwareKvm>) -> Kernels {
    let own = software_kvm
        .as_ref()
        .and_then(|software| software.kernel.as_ref());
    Kernels {
        image: image.into(),
        hardware: kernel.is_some(),
        software: match (own, kernel) {
            (Some(_), _) => Some(SoftwareKernel::Ring3),
            (None, Some(_)) => Some(SoftwareKernel::Plain),
            (None, None) => None,
        },
        software_cpus: software_kvm.as_ref().and_then(|software| software.max_cpus),
    }
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The guest powered off or was stopped.
    Exited {
        /// What the workload reported, if it did.
        status: Option<u32>,
        /// If it did not: what its VMM says of the end. Empty in older records.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        how: String,
    },
    /// A fault, in words.
    Failed {
        /// Why.
        reason: String,
    },
}

/// Where a VM is in its life. Migrating, in doubt and unknown are not stored: they follow from an open intent and
/// from whether the node answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Its node was told, or is about to be told, to start it.
    Starting,
    /// It runs on its node.
    Running,
    /// Power-off was asked for.
    Stopping,
    /// It has run, was stopped for another, and waits to begin anew. Never stored: what waits is in the queue's table.
    Queued,
    /// It has ended; its VMM is still to be destroyed, which also hands over the last console bytes.
    Ending(Outcome),
    /// It has ended and nothing of it is left on any node.
    Ended(Outcome),
}

impl Phase {
    /// The VM has ended, or has but for the cleaning up.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Ending(_) | Self::Ended(_))
    }
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its id for life.
    pub id: VmId,
    /// Unique among VMs not removed.
    pub name: VmName,
    /// Name of its image when it was submitted.
    pub image: String,
    /// Digest of that image.
    pub image_digest: String,
    /// Arguments for the workload.
    pub args: Vec<String>,
    /// Kernel blob, as in its image.
    pub kernel: Option<BlobRef>,
    /// Initrd blob.
    pub initrd: Option<BlobRef>,
    /// Complete command line, arguments included.
    pub cmdline: String,
    /// As in its image.
    #[serde(default)]
    pub software_kvm: Option<SoftwareKvm>,
    /// vCPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Time of submission.
    pub created_unix_ms: i64,
    /// The owner.
    pub node: NodeName,
    /// The owner's epoch.
    pub epoch: Epoch,
    /// The highest epoch ever issued; the next attempt gets the one after it.
    pub last_epoch: Epoch,
    /// Every epoch up to this one, but the owner's, must never run again, whatever its node says.
    pub fenced_through: Epoch,
    /// Where it is in its life.
    pub phase: Phase,
    /// Why, where there is something to say.
    pub message: String,
    /// The CPU features it was given when it was first placed, where they are known.
    #[serde(default)]
    pub cpu: Option<CpuDigest>,
    /// They were those of a baseline; otherwise all that its node had.
    #[serde(default)]
    pub cpu_baseline: bool,
    /// The kind of KVM that this run of it was started on, where known.
    #[serde(default, with = "texts::kvm")]
    pub kvm: Option<KvmKind>,
    /// What its owner wishes.
    #[serde(default)]
    pub wishes: VmWishes,
    /// Where it was started, where known.
    #[serde(default)]
    pub home: Option<NodeName>,
    /// Why there.
    #[serde(default)]
    pub placement: String,
    /// Its vCPUs are to be stopped while this is set. The node is told until it says so, whatever is lost on the way.
    #[serde(default)]
    pub suspended: Option<Suspension>,
    /// It is being stopped for another: when it has ended it goes back to the queue.
    #[serde(default)]
    pub giving_way: Option<GivingWay>,
    /// Of this run of it, and those before.
    #[serde(default)]
    pub runs: Runs,
}

/// For whom a VM is being stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivingWay {
    /// That VM waits for the room.
    pub to: VmId,
    /// Its name.
    pub name: String,
    /// Its priority.
    pub priority: u32,
    /// When that was decided.
    pub since_unix_ms: i64,
}

/// What is known of the runs of a VM: it begins anew after it was stopped for another. The default is what older records mean.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Runs {
    /// When this one was begun; 0 if that is not known.
    pub started_unix_ms: i64,
    /// When the last one ended; 0 if that is not known, or it has not.
    pub ended_unix_ms: i64,
    /// Since when it waited to be started for the first time, if its owner lets it wait as long as it takes; 0: that was not asked for.
    pub queued_unix_ms: i64,
    /// The only node that its owner wants it on.
    pub pinned: Option<NodeName>,
    /// Where its owner would have it start.
    pub preferred: Option<NodeName>,
    /// What was written to the console before this run.
    pub console_offset: u64,
    /// How often it was stopped for another.
    pub preempted: u32,
    /// For whom the last time.
    pub last_preempted: Option<GivingWay>,
}

/// Why a VM is suspended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspension {
    /// In words; who asked for it is in it.
    pub reason: String,
    /// When it was asked for.
    pub since_unix_ms: i64,
    /// A plan asked for it, and the VM grew so fast then, in bytes per second. None: a user did.
    #[serde(default)]
    pub planned_growth: Option<u64>,
}

/// A VM that waits for room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedRecord {
    /// In order of arrival.
    pub sequence: u64,
    /// The VM as it will be, but for its node.
    pub vm: VmRecord,
    /// The only node it may go to, if there is one.
    pub pinned: Option<NodeName>,
    /// Since when it waits; 0: since it was submitted.
    #[serde(default)]
    pub since_unix_ms: i64,
    /// Others are stopped there, or have been, so that it has room.
    #[serde(default)]
    pub room: Option<NodeName>,
}

impl QueuedRecord {
    /// Since when it waits.
    pub fn since(&self) -> i64 {
        if self.since_unix_ms == 0 {
            self.vm.created_unix_ms
        } else {
            self.since_unix_ms
        }
    }
}

/// What the owner of a VM wishes. The default is what older records mean.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmWishes {
    /// What others may ask to be with.
    #[serde(with = "texts::labels")]
    pub labels: Labels,
    /// What it asks of its node.
    #[serde(with = "texts::rules")]
    pub rules: Option<Arc<Rules>>,
    /// It is not to be moved.
    pub locked: bool,
    /// 0 to 9: the lower, the sooner it gives way.
    pub priority: u32,
    /// It may be stopped for one of higher priority, and begin anew.
    pub preemptible: bool,
    /// It starts by the rules of the queue, each time that it does: it takes slots.
    pub queued: bool,
}

impl Default for VmWishes {
    fn default() -> Self {
        Self {
            labels: Labels::default(),
            rules: None,
            locked: false,
            priority: shoal_plan::DEFAULT_PRIORITY,
            preemptible: false,
            queued: false,
        }
    }
}

impl VmRecord {
    /// As it is to be started again, at the next epoch and wherever it fits, with nothing left of how it was started before.
    pub fn to_begin_anew(&self) -> Self {
        let epoch = self.last_epoch.next();
        Self {
            phase: Phase::Starting,
            message: String::new(),
            epoch,
            last_epoch: epoch,
            fenced_through: self.last_epoch,
            cpu: None,
            cpu_baseline: false,
            kvm: None,
            home: None,
            placement: String::new(),
            ..self.clone()
        }
    }

    /// The node that it was to be started on and is locked to since.
    pub fn pinned(&self) -> Option<&NodeName> {
        self.runs.pinned.as_ref().filter(|_| self.wishes.locked)
    }

    /// For how long this run of it lasts, if it runs.
    pub fn ran(&self) -> Option<Duration> {
        let started = match self.runs.started_unix_ms {
            0 => self.created_unix_ms,
            started => started,
        };
        let ran = now_unix_ms().saturating_sub(started);
        (self.phase == Phase::Running).then(|| Duration::from_millis(u64::try_from(ran).unwrap_or(0)))
    }

    /// Its files.
    pub fn blobs(&self) -> impl Iterator<Item = &BlobRef> {
        blobs(&self.kernel, &self.initrd, &self.software_kvm)
    }

    /// On which hosts it can start.
    pub fn kernels(&self) -> Kernels {
        kernels(&self.image, &self.kernel, &self.software_kvm)
    }

    /// Whether this run of it has the kernel that runs in ring 3.
    pub fn runs_ring3_kernel(&self) -> bool {
        let own = self
            .software_kvm
            .as_ref()
            .and_then(|software| software.kernel.as_ref());
        self.kvm == Some(KvmKind::Software) && own.is_some()
    }

    /// The VM as an agent is told to start or to receive it, at an epoch.
    pub fn to_spec(&self, epoch: Epoch) -> node::WorkloadSpec {
        node::WorkloadSpec {
            vm_id: self.id.to_string(),
            name: self.name.to_string(),
            epoch: epoch.0,
            cpus: self.cpus,
            memory_bytes: self.memory_bytes,
            kernel: self.kernel.as_ref().map(BlobRef::to_wire),
            initrd: self.initrd.as_ref().map(BlobRef::to_wire),
            cmdline: self.cmdline.clone(),
            software_kvm: self.software_kvm.as_ref().map(SoftwareKvm::to_wire),
            ..node::WorkloadSpec::default()
        }
    }
}

/// An attempt to move a VM, from before anything is told to any node until the owner is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The VM; there is at most one intent for it.
    pub vm: VmId,
    /// This attempt.
    pub migration: MigrationId,
    /// The owner.
    pub from: NodeName,
    /// The owner's epoch.
    pub from_epoch: Epoch,
    /// The destination.
    pub to: NodeName,
    /// The epoch the VM would have there.
    pub epoch: Epoch,
    /// Why it moves.
    pub reason: String,
    /// When it was decided.
    pub started_unix_ms: i64,
    /// How it is to go, in full; empty in what schema 1 stored.
    #[serde(default, with = "encoded")]
    pub policy: vm::MigrationPolicy,
    /// How long the planner expects it to take; none if someone asked for it, or it is only found again.
    #[serde(default)]
    pub expected: Option<Duration>,
}

/// A protobuf message in a record, as its bytes.
mod encoded {
    use prost::Message;
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub fn serialize<M: Message, S: Serializer>(message: &M, serializer: S) -> Result<S::Ok, S::Error> {
        message.encode_to_vec().serialize(serializer)
    }

    pub fn deserialize<'de, M: Message + Default, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<M, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        M::decode(bytes.as_slice()).map_err(D::Error::custom)
    }
}

/// Whether new VMs may come to a node, by its operator's will.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cordon {
    /// They may.
    Open,
    /// They may not, and those there are moved away.
    Draining,
    /// They may not; the node has been drained.
    Cordoned,
}

/// A node that has registered at least once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub name: NodeName,
    /// Where its agent is reached.
    pub address: String,
    /// CPUs it lends.
    pub cpus: u32,
    /// Memory it lends.
    pub memory_bytes: u64,
    /// It has a certificate for migrations, and takes and makes them over TLS only.
    #[serde(default)]
    pub migration_tls: bool,
    /// Its operator's will.
    pub cordon: Cordon,
    /// The CPU features that it offers VMs, where it has told them.
    #[serde(default)]
    pub cpu: Option<CpuDigest>,
    /// Its CPU's model.
    #[serde(default)]
    pub cpu_model: String,
    /// How its KVM runs guests, where known.
    #[serde(default, with = "texts::kvm")]
    pub kvm: Option<KvmKind>,
    /// What its agent found wrong with its KVM; see `node.proto`.
    #[serde(default)]
    pub kvm_trouble: String,
    /// More of its operator's will.
    #[serde(default)]
    pub wishes: NodeWishes,
    /// Its operator has said that it is off and stays off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<Lost>,
    /// Its operator has removed it. The record is kept for what must not run there, should it come back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
}

/// What must not run on a node any more that was declared lost.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// When that was said.
    pub since_unix_ms: i64,
    /// VMs that it had, or was to get, each up to this epoch.
    pub fenced: BTreeMap<VmId, Epoch>,
}

impl NodeRecord {
    /// Its agent has found that no VM can start there.
    pub fn kvm_is_unusable(&self) -> bool {
        self.kvm.is_none() && !self.kvm_trouble.is_empty()
    }
}

/// What the operator of a node wishes. The default is what older records mean.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeWishes {
    /// What selectors ask about.
    #[serde(with = "texts::labels")]
    pub labels: Labels,
    /// What keeps VMs away that do not tolerate it.
    #[serde(with = "texts::labels")]
    pub taints: Labels,
    /// Memory kept free of VMs.
    pub reserved_memory_bytes: u64,
    /// Thousandths of CPUs that VMs are not counted on.
    pub reserved_millicpus: u32,
}

mod texts;

/// Milliseconds since 1970.
pub fn now_unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
