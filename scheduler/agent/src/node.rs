//! What all parts of an agent share.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shoal_proto::node::Heartbeat;
use shoal_proto::vm::{self, VmState};
use shoal_proto::{Epoch, NodeName, VmId};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::blobs::BlobCache;
use crate::certificates::MigrationCertificates;
use crate::cgroup::Cgroup;
use crate::config::AgentConfig;
use crate::epochs::EpochStore;
use crate::key::VmKey;
use crate::keyed_lock::KeyedLocks;
use crate::kvm::HostKvm;
use crate::node_load::{Capacity, LoadMeter};
use crate::runtime_dir::VmRecord;
use crate::schedulers::Schedulers;
use crate::spawn::{SpawnError, spawn};
use crate::supervise::supervise;
use crate::term::Terms;
use crate::uplink::Uplink;
use crate::vm::Vm;

/// The node: its VMMs and what is needed to start and watch them.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: NodeName,
    pub(crate) capacity: Capacity,
    /// What VMMs are put into; `None`: they stay in the agent's own.
    pub(crate) cgroup: Option<Cgroup>,
    /// What CPU guests get here; empty if that is not known.
    pub(crate) cpuid: Vec<u8>,
    /// MSRs that are saved and restored here; empty if that is not known.
    pub(crate) msrs: Vec<u32>,
    /// How KVM runs guests here, as it was tested last.
    pub(crate) kvm: watch::Sender<HostKvm>,
    /// A VM did not start: KVM is tested at once.
    pub(crate) kvm_doubted: Notify,
    /// Of one CPU; 0 if it was not measured.
    pub(crate) cpu_speed: f64,
    /// Between two samples of how a VM writes its memory; `None`: it is not sampled.
    pub(crate) memory_sampling: Option<Duration>,
    /// VMMs listen for migrations here.
    pub(crate) migration_ip: IpAddr,
    /// Others reach those sockets under this address.
    pub(crate) reachable_ip: IpAddr,
    /// For migrations over TLS.
    pub(crate) certificates: Option<MigrationCertificates>,
    /// What guest memory is made of.
    pub(crate) memory_backing: vm::MemoryBacking,
    pub(crate) schedulers: Schedulers,
    pub(crate) terms: Terms,
    pub(crate) uplink: Uplink,
    pub(crate) epochs: EpochStore,
    pub(crate) blobs: BlobCache,
    /// Calls that start or end VMMs of one VM take turns.
    pub(crate) turns: KeyedLocks<VmId>,
    vmm_binary: PathBuf,
    vms_dir: PathBuf,
    vms: Mutex<HashMap<VmKey, Arc<Vm>>>,
    launching: Mutex<Vec<VmKey>>,
    load: Mutex<LoadMeter>,
    supervisors: Mutex<JoinSet<()>>,
}

impl Node {
    /// Opens what is in the state directory; starts nothing.
    pub(crate) fn open(
        config: &AgentConfig,
        certificates: Option<MigrationCertificates>,
        state_dir: &Path,
        schedulers: Schedulers,
    ) -> io::Result<Self> {
        let vms_dir = state_dir.join("vms");
        std::fs::create_dir_all(&vms_dir)?;
        let capacity = Capacity::detect(config.memory_budget, config.cpus)?;
        Ok(Self {
            name: config.node.clone(),
            capacity,
            cgroup: None,
            cpuid: Vec::new(),
            msrs: Vec::new(),
            kvm: watch::Sender::default(),
            kvm_doubted: Notify::new(),
            cpu_speed: 0.0,
            memory_sampling: config.memory_sampling,
            migration_ip: config.listen.ip(),
            reachable_ip: config.reachable_ip(),
            certificates,
            memory_backing: config.memory_backing,
            schedulers,
            terms: Terms::open(state_dir)?,
            uplink: Uplink::default(),
            epochs: EpochStore::open(state_dir.join("epochs"))?,
            blobs: BlobCache::open(state_dir.join("blobs"))?,
            turns: KeyedLocks::default(),
            vmm_binary: config.vmm_binary.canonicalize()?,
            vms_dir,
            vms: Mutex::default(),
            launching: Mutex::default(),
            load: Mutex::new(LoadMeter::new(capacity)),
            supervisors: Mutex::default(),
        })
    }

    /// What a VMM is told when it is to migrate to or from that node; `None`: plain TCP.
    pub(crate) fn migration_tls(&self, peer: &str) -> Option<vm::MigrationTls> {
        self.certificates.as_ref().map(|own| own.with_peer(peer))
    }

    pub(crate) fn vmm_binary(&self) -> &Path {
        &self.vmm_binary
    }

    pub(crate) fn vms_dir(&self) -> &Path {
        &self.vms_dir
    }

    /// Starts a VMM process for a VM; nothing watches it until [`Self::keep`].
    pub(crate) fn spawn_vmm(&self, key: VmKey, record: &VmRecord) -> Result<Vm, SpawnError> {
        spawn(&self.vmm_binary, &self.vms_dir, self.cgroup.as_ref(), key, record)
    }

    /// From now on the VMM is supervised and reported.
    pub(crate) fn keep(self: &Arc<Self>, vm: Arc<Vm>) {
        self.lock_vms().insert(vm.key, Arc::clone(&vm));
        self.uplink.vm_changed(vm.key);
        let mut supervisors = self.supervisors.lock().unwrap_or_else(PoisonError::into_inner);
        while supervisors.try_join_next().is_some() {}
        supervisors.spawn(supervise(Arc::clone(self), vm));
    }

    /// The opposite of [`Self::keep`], once the VMM has ended.
    pub(crate) fn forget(&self, key: VmKey) {
        self.lock_vms().remove(&key);
    }

    pub(crate) fn vm(&self, key: VmKey) -> Option<Arc<Vm>> {
        self.lock_vms().get(&key).cloned()
    }

    /// Every VMM of one VM.
    pub(crate) fn incarnations(&self, id: VmId) -> Vec<Arc<Vm>> {
        self.lock_vms()
            .values()
            .filter(|vm| vm.key.id == id)
            .cloned()
            .collect()
    }

    /// Other incarnations of the VM that run here, or still could.
    pub(crate) fn rivals(&self, key: VmKey) -> Vec<(Epoch, VmState)> {
        let harmless = |state| matches!(state, VmState::Exited | VmState::Failed | VmState::Migrated);
        let others = self
            .incarnations(key.id)
            .into_iter()
            .filter(|vm| vm.key != key && !vm.process.is_gone());
        others
            .map(|vm| (vm.key.epoch, vm.state()))
            .filter(|&(_, state)| !harmless(state))
            .collect()
    }

    /// Marks a launch that has begun and has no VMM yet, until the guard is dropped.
    pub(crate) fn begin_launch(self: &Arc<Self>, key: VmKey) -> Launching {
        self.lock_launching().push(key);
        Launching {
            node: Arc::clone(self),
            key,
        }
    }

    pub(crate) fn is_launching(&self, key: VmKey) -> bool {
        self.lock_launching().contains(&key)
    }

    /// The node and every VM, sampled now. Reads many small files of `/proc`: not for an async thread.
    pub(crate) fn heartbeat(&self) -> io::Result<Heartbeat> {
        let now = Instant::now();
        let vms: Vec<_> = self.lock_vms().values().cloned().collect();
        let usages: Vec<_> = vms.iter().map(|vm| vm.sample_usage(now)).collect();
        let load = self
            .load
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .sample(&usages, now)?;
        Ok(Heartbeat {
            memory_available_bytes: load.memory_available_bytes,
            cpu_use: load.cpu_use,
            run_queue: load.run_queue,
            pressure: Some(load.pressure),
            vms: vms
                .iter()
                .filter(|vm| !vm.is_retiring())
                .map(|vm| vm.facts())
                .collect(),
            sequence: 0,
            swap_in_bytes_per_second: load.rates.swap_in_bytes_per_second,
            swap_out_bytes_per_second: load.rates.swap_out_bytes_per_second,
            network_receive_bytes_per_second: load.rates.network_receive_bytes_per_second,
            network_transmit_bytes_per_second: load.rates.network_transmit_bytes_per_second,
            numa: load.numa,
            other_cpu: load.other_cpu.map(|other| other.mean),
            other_cpu_error: load.other_cpu.map(|other| other.error),
            vmm_cpu: load.other_cpu.map(|_| load.vmm_cpu),
        })
    }

    /// Ends the tasks that watch VMMs; the VMMs themselves go on.
    pub(crate) fn stop_supervising(&self) {
        self.supervisors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .abort_all();
    }

    // Each of these holds plain data that no panic can leave half changed.
    fn lock_vms(&self) -> MutexGuard<'_, HashMap<VmKey, Arc<Vm>>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_launching(&self) -> MutexGuard<'_, Vec<VmKey>> {
        self.launching.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A launch that is under way.
#[derive(Debug)]
pub(crate) struct Launching {
    node: Arc<Node>,
    key: VmKey,
}

impl Drop for Launching {
    fn drop(&mut self) {
        let mut launching = self.node.lock_launching();
        if let Some(position) = launching.iter().position(|&key| key == self.key) {
            launching.swap_remove(position);
        }
    }
}
