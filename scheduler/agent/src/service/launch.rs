//! LaunchVm: blobs, epoch, process, boot; each failure leaves nothing behind but the epoch.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shoal_proto::node::LaunchVmRequest;
use shoal_proto::vm::{BootRequest, VmStatus};

use super::workload::{BootFiles, Workload};
use super::{Refusal, discard, refuse_company};
use crate::node::Node;

/// How long a VMM may take to build a VM and start it.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

pub(super) fn parse(request: LaunchVmRequest) -> Result<Workload, Refusal> {
    Workload::parse(request.spec)
}

pub(super) async fn launch(node: Arc<Node>, workload: Workload) -> Result<VmStatus, Refusal> {
    let key = workload.key;
    let kvm = node.kvm.borrow().clone();
    if kvm.kind.is_none() {
        node.kvm_doubted.notify_one();
    }
    let boot = workload.boot(&kvm)?;
    let _launching = node.begin_launch(key);
    refuse_company(&node, key)?;
    super::check_current(&node, key).await?;
    // Held until the VMM has read them.
    let kernel = node.blobs.get(&boot.kernel, &node.schedulers).await?;
    let initrd = match &boot.initrd {
        Some(initrd) => Some(node.blobs.get(initrd, &node.schedulers).await?),
        None => None,
    };
    let files = BootFiles {
        kernel: PathBuf::clone(&kernel),
        initrd: initrd.as_deref().cloned(),
        cmdline: boot.cmdline,
    };

    let _turn = node.turns.lock(&key.id).await;
    refuse_company(&node, key)?;
    node.epochs.claim(key).await?;
    let vm = Arc::new(node.spawn_vmm(key, &workload.record(None))?);
    let boot = BootRequest {
        spec: Some(workload.vm_spec(node.memory_backing, Some(files))),
    };
    let mut client = vm.client();
    match vm.call(BOOT_LIMIT, client.boot(boot)).await {
        Ok(status) => {
            tracing::info!(vm = %key.id, epoch = %key.epoch, pid = vm.process.identity().pid, "launched");
            vm.set_status(status);
            node.keep(Arc::clone(&vm));
            Ok(vm.status())
        }
        Err(status) => Err(discard(&node, vm, status).await),
    }
}
