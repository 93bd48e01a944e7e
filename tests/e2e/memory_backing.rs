//! Guest memory of each kind, between two VMMs without a cluster around them.

use std::time::Duration;

use shoal_proto::vm::{GetStatusRequest, MemoryBacking, MigrationResult, VmSpec, VmState};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::vmm::{Vmm, probe_spec};
use tokio::time::timeout;

const MEMORY: u64 = 96 << 20;
const FILL: u64 = 48 << 20;
const PROBE: &str = "beat=200 fill=48MiB wss=8MiB rate=2000 pattern=random";
const VM: &str = "0b6a3f5e-5df7-4f55-9e5c-8c1f5d1f1a03";

fn spec(epoch: u64, backing: MemoryBacking) -> VmSpec {
    VmSpec {
        memory_backing: backing.into(),
        ..probe_spec(VM, epoch, MEMORY, PROBE)
    }
}

#[test]
fn a_guest_is_unharmed_whatever_its_memory_is_made_of() {
    let Some(_machine) = Machine::with_kvm("moves between kinds of memory") else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (anonymous, shared) = (MemoryBacking::Anonymous, MemoryBacking::Shared);
        let mut source = Vmm::start().await;
        source.boot(spec(1, shared)).await;
        heartbeats_after(&mut source, 0).await;
        for (epoch, from, to) in [
            (2, shared, shared),
            (3, shared, anonymous),
            (4, anonymous, shared),
        ] {
            assert_eq!(backing(&mut source).await, from);
            let mut destination = Vmm::start().await;
            let address = destination.prepare_incoming(spec(epoch, to)).await;
            let max_downtime = Duration::from_millis(500);
            let report = source.migrate(address, epoch, max_downtime, |_| {}).await;
            assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
            assert!(report.pages_sent >= FILL / 4096, "{report:?}");
            while destination.state().await != VmState::Running {
                tokio::task::yield_now().await;
            }
            assert_eq!(backing(&mut destination).await, to);
            let seen = guest::heartbeats(&source.console().await).len();
            heartbeats_after(&mut destination, seen).await;
            guest::assert_unharmed(&destination.console().await);
            source = destination;
        }
    });
}

async fn backing(vmm: &mut Vmm) -> MemoryBacking {
    let status = vmm.client.get_status(GetStatusRequest {}).await;
    status.expect("a status").into_inner().memory_backing()
}

/// Waits for more than so many heartbeats, the last of which says that all is filled.
async fn heartbeats_after(vmm: &mut Vmm, seen: usize) {
    let more = |text: &str| {
        let beats = guest::heartbeats(text);
        beats.len() > seen && beats.last().is_some_and(|beat| beat.filled >= FILL)
    };
    timeout(Duration::from_secs(30), vmm.follow_console(more))
        .await
        .expect("heartbeats");
}
