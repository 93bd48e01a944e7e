//! A state directory as a scheduler leaves it that has run VMs on many nodes: what load tests start from, since to launch a
//! hundred thousand VMs one by one would take longer than they run.

use std::path::Path;

use shoal_proto::{Epoch, NodeName, VmId};

use crate::record::{BlobRef, Cordon, NodeRecord, NodeWishes, Phase, Runs, VmRecord, VmWishes, now_unix_ms};
use crate::server::{STORE_FILE, ServerError};
use crate::store::{Store, Write};

/// Writes in one transaction, below what a store takes at once.
const BATCH: usize = 100;

/// A node to be.
#[derive(Debug, Clone)]
pub struct SeedNode {
    /// Its name.
    pub name: NodeName,
    /// Where its agent answers.
    pub address: String,
    /// CPUs it lends.
    pub cpus: u32,
    /// Memory it lends.
    pub memory_bytes: u64,
}

/// A VM that runs at epoch 1.
#[derive(Debug, Clone)]
pub struct SeedVm {
    /// Its id.
    pub id: VmId,
    /// Where it runs.
    pub node: NodeName,
    /// vCPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
}

/// Writes them to a state directory that no scheduler uses.
///
/// # Errors
/// If it cannot be used.
pub async fn seed(state_dir: &Path, nodes: Vec<SeedNode>, vms: Vec<SeedVm>) -> Result<(), ServerError> {
    let (store, _) = Store::open_file(&state_dir.join(STORE_FILE)).await?;
    let nodes = nodes.into_iter().map(node);
    let vms = vms
        .into_iter()
        .map(|seed| vm(seed).map(|vm| Write::PutVm(vm.into())));
    let mut writes: Vec<Write> = Vec::with_capacity(BATCH);
    for write in nodes.map(Some).chain(vms) {
        writes.extend(write);
        if writes.len() >= BATCH {
            store.apply(std::mem::take(&mut writes)).await?;
        }
    }
    store.apply(writes).await?;
    Ok(())
}

fn node(seed: SeedNode) -> Write {
    Write::PutNode(NodeRecord {
        name: seed.name,
        address: seed.address,
        cpus: seed.cpus,
        memory_bytes: seed.memory_bytes,
        migration_tls: false,
        cordon: Cordon::Open,
        cpu: None,
        cpu_model: String::new(),
        kvm: None,
        kvm_trouble: String::new(),
        wishes: NodeWishes::default(),
        lost: None,
        removed: false,
    })
}

/// Named after its id, which is a name of a VM too.
fn vm(seed: SeedVm) -> Option<VmRecord> {
    Some(VmRecord {
        id: seed.id,
        name: format!("vm-{}", seed.id).parse().ok()?,
        image: "seed".to_owned(),
        image_digest: String::new(),
        args: Vec::new(),
        kernel: Some(BlobRef {
            sha256: "0".repeat(64),
            size_bytes: 1,
        }),
        initrd: None,
        cmdline: String::new(),
        software_kvm: None,
        cpus: seed.cpus,
        memory_bytes: seed.memory_bytes,
        created_unix_ms: now_unix_ms(),
        home: Some(seed.node.clone()),
        node: seed.node,
        epoch: Epoch(1),
        last_epoch: Epoch(1),
        fenced_through: Epoch(0),
        phase: Phase::Running,
        message: String::new(),
        cpu: None,
        cpu_baseline: false,
        kvm: None,
        wishes: VmWishes::default(),
        placement: String::new(),
        suspended: None,
        giving_way: None,
        runs: Runs::default(),
    })
}
