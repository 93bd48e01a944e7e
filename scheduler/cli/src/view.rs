//! What is shown of VMs, nodes, images, migrations and events. The JSON keys are an interface: scripts rely on them.

use serde::Serialize;
use shoal_proto::cluster;

use crate::format;

mod migration;

pub use migration::{DefaultsView, MigrationDetails, MigrationView, PolicyView, cap, phase};

/// A VM, for `ps`, `run`, `stop` and `inspect`.
#[derive(Debug, Serialize)]
pub struct VmView {
    /// UUID.
    pub id: String,
    /// Unique name.
    pub name: String,
    /// Where it is; empty while pending.
    pub node: String,
    /// In one word. One that is booting runs, and its guest has written nothing yet, for at most 60 s.
    pub state: &'static str,
    /// Which incarnation owns it.
    pub epoch: u64,
    /// What it booted.
    pub image: String,
    /// How many vCPUs.
    pub cpus: u32,
    /// Guest memory, as declared.
    pub memory_bytes: u64,
    /// Since it was asked for.
    pub age_seconds: u64,
    /// Of the VMM process, guest memory included.
    pub resident_bytes: u64,
    /// CPUs in use.
    pub cpu_use: f64,
    /// What the workload reported, if it did.
    pub exit_status: Option<u32>,
    /// Why, where there is something to say.
    pub message: String,
    /// Arguments for the workload.
    pub args: Vec<String>,
    /// KEY=VALUE, by key.
    pub labels: Vec<String>,
    /// What it asks of its node.
    pub rules: RulesView,
    /// It is not to be moved.
    pub locked: bool,
    /// The node that `run --node` named, as long as that holds; empty: none.
    pub pinned: String,
    /// 0 to 9: the lower, the sooner it gives way.
    pub priority: u32,
    /// Where it was started; empty if not known.
    pub home: String,
    /// CPUs that it waited for while others had them; null where not known, as are the next four.
    pub cpu_steal: Option<f64>,
    /// Memory that it writes, smoothed.
    pub dirty_rate_bytes_per_second: Option<u64>,
    /// Memory that it writes again and again, smoothed.
    pub working_set_bytes: Option<u64>,
    /// From storage.
    pub read_bytes_per_second: Option<u64>,
    /// To storage.
    pub write_bytes_per_second: Option<u64>,
    /// Why its vCPUs are stopped; null if they are not.
    pub suspended: Option<SuspensionView>,
    /// It may be stopped for one of higher priority, and begin anew.
    pub preemptible: bool,
    /// How often that was done; null if never.
    pub preempted: Option<PreemptedView>,
    /// The kind of KVM that it was started on, hardware or software; null while that is not known, as are the next two.
    pub kvm: Option<&'static str>,
    /// plain or ring3.
    pub kernel: Option<&'static str>,
    /// Its kernel is isolated from its programs: by hardware virtualization only.
    pub guest_kernel_isolation: Option<bool>,
}

/// A kind of KVM in one word, where known.
fn kvm_kind(kind: cluster::KvmKind) -> Option<&'static str> {
    match kind {
        cluster::KvmKind::Hardware => Some("hardware"),
        cluster::KvmKind::Software => Some("software"),
        cluster::KvmKind::Unspecified => None,
    }
}

/// How often a VM was stopped for others.
#[derive(Debug, Serialize)]
pub struct PreemptedView {
    /// So often.
    pub times: u32,
    /// For which VM the last time.
    pub by: String,
    /// Of what priority that was.
    pub by_priority: u32,
    /// How long ago.
    pub seconds: u64,
}

impl From<&cluster::Preempted> for PreemptedView {
    fn from(preempted: &cluster::Preempted) -> Self {
        Self {
            times: preempted.times,
            by: preempted.by.clone(),
            by_priority: preempted.by_priority,
            seconds: format::seconds_since(preempted.unix_ms),
        }
    }
}

/// Why a VM is suspended.
#[derive(Debug, Serialize)]
pub struct SuspensionView {
    /// In words.
    pub reason: String,
    /// For how long.
    pub seconds: u64,
}

/// What a VM asks of its node, as terms.
#[derive(Debug, Default, Serialize)]
pub struct RulesView {
    /// Of the node's labels.
    pub selector: Vec<String>,
    /// Taints that it does not mind.
    pub tolerations: Vec<String>,
    /// Of another VM on the node.
    pub affinity: Vec<String>,
    /// Of no other VM on the node.
    pub anti_affinity: Vec<String>,
    /// No other VM is on the node.
    pub exclusive: bool,
}

impl From<&cluster::Rules> for RulesView {
    fn from(rules: &cluster::Rules) -> Self {
        Self {
            selector: rules.selector.clone(),
            tolerations: rules.tolerations.clone(),
            affinity: rules.affinity.clone(),
            anti_affinity: rules.anti_affinity.clone(),
            exclusive: rules.exclusive,
        }
    }
}

impl From<&cluster::Vm> for VmView {
    fn from(vm: &cluster::Vm) -> Self {
        let kvm = kvm_kind(vm.kvm());
        Self {
            id: vm.id.clone(),
            name: vm.name.clone(),
            node: vm.node.clone(),
            state: if vm.booting {
                "booting"
            } else {
                vm_state(vm.phase())
            },
            epoch: vm.epoch,
            image: vm.image.clone(),
            cpus: vm.cpus,
            memory_bytes: vm.memory_bytes,
            age_seconds: format::seconds_since(vm.created_unix_ms),
            resident_bytes: vm.resident_bytes,
            cpu_use: vm.cpu_use,
            exit_status: vm.exit_status,
            message: vm.message.clone(),
            args: vm.args.clone(),
            labels: vm.labels.clone(),
            rules: vm.rules.as_ref().map(RulesView::from).unwrap_or_default(),
            locked: vm.locked,
            pinned: vm.pinned.clone(),
            priority: vm.priority,
            home: vm.home.clone(),
            cpu_steal: vm.cpu_steal,
            dirty_rate_bytes_per_second: vm.dirty_rate_bytes_per_second,
            working_set_bytes: vm.working_set_bytes,
            read_bytes_per_second: vm.read_bytes_per_second,
            write_bytes_per_second: vm.write_bytes_per_second,
            suspended: vm.suspension.as_ref().map(|suspension| SuspensionView {
                reason: suspension.reason.clone(),
                seconds: format::seconds_since(suspension.since_unix_ms),
            }),
            preemptible: vm.preemptible,
            preempted: vm.preempted.as_ref().map(PreemptedView::from),
            kvm,
            kernel: kvm.map(|_| if vm.ring3_kernel { "ring3" } else { "plain" }),
            guest_kernel_isolation: kvm.map(|_| vm.kvm() == cluster::KvmKind::Hardware),
        }
    }
}

/// A VM's phase in one word.
#[must_use]
pub fn vm_state(phase: cluster::VmPhase) -> &'static str {
    use cluster::VmPhase;
    match phase {
        VmPhase::Pending => "pending",
        VmPhase::Starting => "starting",
        VmPhase::Running => "running",
        VmPhase::Migrating => "migrating",
        VmPhase::InDoubt => "in-doubt",
        VmPhase::Stopping => "stopping",
        VmPhase::Exited => "exited",
        VmPhase::Failed => "failed",
        VmPhase::Suspended => "suspended",
        VmPhase::Unknown | VmPhase::Unspecified => "unknown",
    }
}

/// A node, for `nodes` and `uncordon`.
#[derive(Debug, Serialize)]
pub struct NodeView {
    /// Unique name.
    pub name: String,
    /// Where its agent answers.
    pub address: String,
    /// In one word.
    pub state: &'static str,
    /// What it lends.
    pub cpus: u32,
    /// What it lends.
    pub memory_bytes: u64,
    /// What is left of it.
    pub memory_available_bytes: u64,
    /// Smoothed, in CPUs.
    pub cpu_load: f64,
    /// How many VMs it owns.
    pub vms: u32,
    /// PSI "some avg10" of memory, percent.
    pub pressure_memory: f64,
    /// PSI "some avg10" of CPU, percent.
    pub pressure_cpu: f64,
    /// KEY=VALUE, by key.
    pub labels: Vec<String>,
    /// KEY or KEY=VALUE, by key.
    pub taints: Vec<String>,
    /// Memory kept free of VMs.
    pub reserved_memory_bytes: u64,
    /// CPUs that VMs are not counted on.
    pub reserved_cpus: f64,
    /// live; suspect after 5 s of silence, lost after 30.
    pub liveness: &'static str,
    /// Since its last report; null if none has come since the scheduler started.
    pub silent_ms: Option<u64>,
    /// CPUs in use now.
    pub cpu_use: f64,
    /// Threads that run or could.
    pub run_queue: f64,
    /// As it names itself.
    pub cpu_model: String,
    /// Of one CPU, by that of the cluster's typical node.
    pub cpu_speed: f64,
    /// CPUs that its VMs get at most together; null without a quota.
    pub cpu_quota: Option<f64>,
    /// PSI "some avg10", percent; null where the kernel does not say.
    pub psi_cpu: Option<f64>,
    /// PSI "some avg10", percent.
    pub psi_memory: Option<f64>,
    /// PSI "some avg10", percent.
    pub psi_io: Option<f64>,
    /// Of the host; null with a budget, as are the next three.
    pub swap_in_bytes_per_second: Option<u64>,
    /// Of the host.
    pub swap_out_bytes_per_second: Option<u64>,
    /// Of the host's network devices.
    pub network_receive_bytes_per_second: Option<u64>,
    /// Of the host's network devices.
    pub network_transmit_bytes_per_second: Option<u64>,
    /// Its NUMA nodes.
    pub numa: Vec<NumaView>,
    /// How its KVM runs guests, hardware or software; null where that is not known.
    pub kvm: Option<&'static str>,
    /// Why KVM cannot be used there, if `kvm` is null, or why kernels in ring 3 cannot run, if it is software; empty: they can.
    pub kvm_trouble: String,
    /// Why it takes no VMs although nobody has said so; empty: nothing.
    pub trouble: String,
}

/// A NUMA node.
#[derive(Debug, Serialize)]
pub struct NumaView {
    /// As the host numbers it.
    pub id: u32,
    /// Its CPUs.
    pub cpus: u32,
    /// Its memory.
    pub memory_bytes: u64,
    /// Free, or of files.
    pub memory_available_bytes: u64,
}

impl From<&cluster::NumaNode> for NumaView {
    fn from(node: &cluster::NumaNode) -> Self {
        Self {
            id: node.id,
            cpus: node.cpus,
            memory_bytes: node.memory_bytes,
            memory_available_bytes: node.memory_available_bytes,
        }
    }
}

fn liveness(of: cluster::Liveness) -> &'static str {
    match of {
        cluster::Liveness::Live => "live",
        cluster::Liveness::Suspect => "suspect",
        cluster::Liveness::Lost => "lost",
        cluster::Liveness::Unspecified => "unknown",
    }
}

impl From<&cluster::Node> for NodeView {
    fn from(node: &cluster::Node) -> Self {
        use cluster::NodeState;
        Self {
            name: node.name.clone(),
            address: node.address.clone(),
            state: match node.state() {
                NodeState::Ready => "ready",
                NodeState::Draining => "draining",
                NodeState::Cordoned => "cordoned",
                NodeState::Unreachable => "unreachable",
                NodeState::NotReady => "not-ready",
                NodeState::Lost => "lost",
                // Asked of a scheduler that does not lead, and so does not hear from nodes.
                NodeState::Unspecified => "unknown",
            },
            cpus: node.cpus,
            memory_bytes: node.memory_bytes,
            memory_available_bytes: node.memory_available_bytes,
            cpu_load: node.cpu_load,
            vms: node.vms,
            pressure_memory: node.pressure_memory,
            pressure_cpu: node.pressure_cpu,
            labels: node.labels.clone(),
            taints: node.taints.clone(),
            reserved_memory_bytes: node.reserved_memory_bytes,
            reserved_cpus: node.reserved_cpus,
            liveness: liveness(node.liveness()),
            silent_ms: node.silent_ms,
            cpu_use: node.cpu_use,
            run_queue: node.run_queue,
            cpu_model: node.cpu_model.clone(),
            cpu_speed: node.cpu_speed,
            cpu_quota: node.cpu_quota,
            psi_cpu: node.psi_cpu,
            psi_memory: node.psi_memory,
            psi_io: node.psi_io,
            swap_in_bytes_per_second: node.swap_in_bytes_per_second,
            swap_out_bytes_per_second: node.swap_out_bytes_per_second,
            network_receive_bytes_per_second: node.network_receive_bytes_per_second,
            network_transmit_bytes_per_second: node.network_transmit_bytes_per_second,
            numa: node.numa.iter().map(NumaView::from).collect(),
            kvm: kvm_kind(node.kvm()),
            kvm_trouble: node.kvm_trouble.clone(),
            trouble: node.trouble.clone(),
        }
    }
}

/// An image, for `image ls` and `image import`.
#[derive(Debug, Serialize)]
pub struct ImageView {
    /// Unique name.
    pub name: String,
    /// SHA-256 over the canonical manifest.
    pub digest: String,
    /// Kernels and initrd together.
    pub size_bytes: u64,
    /// Default number of vCPUs.
    pub cpus: u32,
    /// Default guest memory.
    pub memory_bytes: u64,
    /// Kernel command line.
    pub cmdline: String,
    /// Since it was imported.
    pub age_seconds: u64,
    /// The kinds of KVM that it has a kernel for: hardware, software.
    pub kvm: Vec<&'static str>,
    /// The kernel for software KVM runs in ring 3.
    pub ring3_kernel: bool,
}

impl From<&cluster::Image> for ImageView {
    fn from(image: &cluster::Image) -> Self {
        Self {
            name: image.name.clone(),
            digest: image.digest.clone(),
            size_bytes: image.size_bytes,
            cpus: image.cpus,
            memory_bytes: image.memory_bytes,
            cmdline: image.cmdline.clone(),
            age_seconds: format::seconds_since(image.created_unix_ms),
            kvm: image.kvm().filter_map(kvm_kind).collect(),
            ring3_kernel: image.ring3_kernel,
        }
    }
}

/// Something that happened, for `events`.
#[derive(Debug, Serialize)]
pub struct EventView {
    /// Rises by one.
    pub sequence: u64,
    /// When.
    pub time: String,
    /// What: vm-started, migration-planned, …
    pub kind: String,
    /// Which VM, if one.
    pub vm: String,
    /// Which node, if one.
    pub node: String,
    /// In words.
    pub message: String,
    /// Which migration, if one.
    pub migration_id: String,
}

impl From<&cluster::Event> for EventView {
    fn from(event: &cluster::Event) -> Self {
        Self {
            sequence: event.sequence,
            time: format::time(event.time_unix_ms),
            kind: event.kind.clone(),
            vm: event.vm.clone(),
            node: event.node.clone(),
            message: event.message.clone(),
            migration_id: event.migration_id.clone(),
        }
    }
}
