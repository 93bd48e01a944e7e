//! How a row is run, and what its end has to look like.

use std::net::SocketAddr;
use std::time::Duration;

use shoal_proto::vm::{
    Compression, GetStatusRequest, MemoryBacking, MigrationPolicy, MigrationReport, MigrationResult, OnStall,
    ResumeRequest, StartMigrationRequest, StopRequest, Verify, VmState, VmStatus,
};
use shoal_tests::certificates::Certificates;
use shoal_tests::pair::{Pair, Runner, Setup, Side};
use shoal_tests::process;
use shoal_tests::proxy::{self, Proxy};
use shoal_tests::vmm::{self, Vmm, outgoing};
use tokio::time::timeout;

use super::rows::{End, Kind, Row, Strike, Trouble};

const MEMORY: u64 = 48 << 20;
/// The pause may take four times this.
const MAX_DOWNTIME: Duration = Duration::from_secs(1);
/// Long enough for the harness to see it and to do something, and shorter than the pause may be.
const HELD: &str = "delay:1500";
/// A first pass at this rate takes seconds, in which the guest of [`Kind::PostCopy`] writes a third of its memory again.
const POST_COPY_BANDWIDTH: u64 = 6 << 20;
/// Slow enough that much is missing still when the sides first talk of it.
const POST_COPY_PROBE: &str = "fill=32MiB wss=32MiB rate=600 pattern=random";
/// A destination whose source does not come gives up after this; much longer than a source takes on a busy host.
const ACCEPT_TIMEOUT_MS: u64 = 12_000;
/// Words before a command; see full(4).
const LOG_ON_A_FULL_DISK: [&str; 4] = ["sh", "-c", "exec \"$@\" 2>/dev/full", "sh"];
/// A destination with all of its memory listens for a minute more for a source that has not heard so.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// Runs a row. Panics where it does not end as it should.
pub async fn run(row: Row) {
    let mut pair = Pair::start(setup(&row)).await;
    let before = process::descriptors(pair.source.pid());
    let certificates = (row.kind == Kind::Tls).then(|| Certificates::of(&["a", "b"]));
    let address = prepare(&mut pair, row.kind, certificates.as_ref()).await;
    let proxy = address.parse::<SocketAddr>().ok().map(|address| {
        let trouble = match row.strike {
            Strike::LinkFromStart(Trouble::CorruptByte(at)) => {
                proxy::Trouble::Corrupt(proxy::Towards::Destination, at)
            }
            _ => proxy::Trouble::None,
        };
        Proxy::start(address, trouble)
    });
    let to = proxy
        .as_ref()
        .map_or(address, |proxy| proxy.address().to_string());
    let request = request(&row, to, certificates.as_ref());
    let written = match row.kind {
        Kind::Paused => Some(pair.pause().await),
        _ => None,
    };
    match row.ends {
        [End::MemoryLost] => memory_lost(&mut pair, request, is_hang(&row)).await,
        [End::Unreachable] => unreachable(&mut pair, request, is_hang(&row)).await,
        ends => {
            let report = migrate(&pair, &row, request, proxy.as_ref()).await;
            let runner = pair.settle(report.as_ref()).await;
            let end = ended(report.as_ref(), runner);
            assert!(ends.contains(&end), "it ended as {end:?}: {report:?}");
            check_report(&row, end, report.as_ref());
            if let Some(written) = written {
                pair.resume(runner, written).await;
            }
            pair.check(runner).await;
        }
    }
    if let Some(side) = row.side() {
        pair.struck(side).await;
    }
    let hangs = row.side().filter(|_| is_hang(&row));
    check_nothing_is_left(&mut pair, hangs, before).await;
}

fn is_hang(row: &Row) -> bool {
    matches!(row.strike, Strike::Fault(_, "hang"))
}

fn setup(row: &Row) -> Setup {
    let under = |side| {
        let armed = match row.strike {
            Strike::Fault(point, action) => Some(format!("SHOAL_FAULT={point}={action}")),
            Strike::Link(_, point) => Some(format!("SHOAL_FAULT={point}={HELD}")),
            Strike::LogFull(full) if full == side => return LOG_ON_A_FULL_DISK.map(str::to_owned).to_vec(),
            Strike::LinkFromStart(_) | Strike::LogFull(_) => None,
        };
        let armed = armed.filter(|_| row.side() == Some(side));
        armed.map_or(vec![], |armed| vec!["env".to_owned(), armed])
    };
    let (fill, probe) = if row.kind == Kind::PostCopy {
        (32, POST_COPY_PROBE)
    } else {
        (16, "fill=16MiB wss=4MiB rate=400 pattern=random")
    };
    Setup {
        source_under: under(Side::Source),
        destination_under: under(Side::Destination),
        memory: MEMORY,
        backing: if row.kind == Kind::HandOver {
            MemoryBacking::Shared
        } else {
            MemoryBacking::Auto
        },
        probe: probe.into(),
        fill: fill << 20,
        ..Setup::default()
    }
}

async fn prepare(pair: &mut Pair, kind: Kind, certificates: Option<&Certificates>) -> String {
    let socket = pair.destination.directory().join("migration.sock");
    pair.prepare_with(|request| {
        request.accept_timeout_ms = ACCEPT_TIMEOUT_MS;
        request.tls = certificates.map(|certificates| certificates.tls("b", "a"));
        if kind == Kind::HandOver {
            request.listen_address = format!("unix:{}", socket.display());
        }
    })
    .await
}

fn request(row: &Row, to: String, certificates: Option<&Certificates>) -> StartMigrationRequest {
    let mut request = outgoing(to, 2, MAX_DOWNTIME);
    request.tls = certificates.map(|certificates| certificates.tls("a", "b"));
    let policy = request.policy.take().unwrap_or_default();
    request.policy = Some(if row.kind == Kind::PostCopy {
        MigrationPolicy {
            max_downtime_ms: Some(5),
            timeout_ms: Some(1),
            on_stall: OnStall::PostCopy.into(),
            bandwidth_bytes_per_second: Some(POST_COPY_BANDWIDTH),
            connections: Some(1),
            ..policy
        }
    } else {
        MigrationPolicy {
            verify: Verify::Full.into(),
            compression: Compression::Off.into(),
            ..policy
        }
    });
    request
}

/// Migrates, and troubles the link on the way if the row says so.
async fn migrate(
    pair: &Pair,
    row: &Row,
    request: StartMigrationRequest,
    proxy: Option<&Proxy>,
) -> Option<MigrationReport> {
    let (Strike::Link(trouble, _), Some(proxy), Some(side)) = (row.strike, proxy, row.side()) else {
        return pair.migrate(request).await;
    };
    let meddle = async {
        pair.struck(side).await;
        match trouble {
            Trouble::Cut => proxy.cut(),
            Trouble::Silence => proxy.silence_both(),
            Trouble::Corrupt(towards) => proxy.corrupt_next(towards),
            Trouble::CorruptByte(_) => {}
        }
        // Only post-copy comes back; by itself where the connections can be made again.
        if row.ends.contains(&End::Moves) && matches!(trouble, Trouble::Cut | Trouble::Silence) {
            // In doubt if the link was gone before Running had come; it settles that by itself, too.
            let lost = |status: &VmStatus| {
                status.status_message.contains("cannot be reached") || status.state() == VmState::InDoubt
            };
            wait_for(&pair.source, "the source to notice", lost).await;
            proxy.heal();
        }
    };
    tokio::join!(pair.migrate(request), meddle).0
}

pub fn ended(report: Option<&MigrationReport>, runner: Runner) -> End {
    match (report.map(MigrationReport::result), runner) {
        (Some(MigrationResult::Failed), Runner::Source) => End::Stays,
        (Some(MigrationResult::Completed), Runner::Destination) => End::Moves,
        (Some(MigrationResult::InDoubt), Runner::Source) => End::Resumed,
        (Some(MigrationResult::InDoubt) | None, Runner::Destination) => End::RunsThere,
        (None, Runner::Source) => End::RunsOn,
        (None, Runner::Nobody) => End::Lost,
        (Some(MigrationResult::Completed | MigrationResult::InDoubt), Runner::Nobody) => End::Died,
        other => panic!("it ended as {other:?}: {report:?}"),
    }
}

fn check_report(row: &Row, end: End, report: Option<&MigrationReport>) {
    let Some(report) = report else { return };
    if matches!(end, End::Stays | End::Resumed) {
        assert!(!report.reason.is_empty(), "the report must say why: {report:?}");
    }
    if let (Strike::Fault(_, "disk_full"), End::Resumed) = (row.strike, end) {
        assert!(report.reason.contains("No space left"), "{report:?}");
    }
    let recovers = matches!(row.strike, Strike::Fault(_, "error") | Strike::Link(..));
    if row.kind == Kind::PostCopy && end == End::Moves {
        assert!(report.post_copy, "{report:?}");
        assert_eq!(recovers, report.recoveries > 0, "{report:?}");
    }
    if let (Strike::LinkFromStart(_), End::Moves) = (row.strike, end) {
        assert!(report.resent_pages > 0, "damage is found: {report:?}");
    }
}

/// The source goes down in post-copy with memory that the destination lacks.
async fn memory_lost(pair: &mut Pair, request: StartMigrationRequest, hangs: bool) {
    let moving = start(pair, request);
    pair.struck(Side::Source).await;
    wait_for(&pair.destination, "the destination to notice", |status| {
        status.link_lost || (hangs && status.missing_bytes == 0)
    })
    .await;
    if hangs && !pair.destination.status().await.expect("alive").link_lost {
        // The thread that hangs only hears how it goes; by then the others have sent all there was.
        pair.check(Runner::Destination).await;
        moving.abort();
        return;
    }
    if hangs {
        pair.source.kill();
    }
    let waiting = pair.destination.status().await.expect("alive");
    assert_eq!(waiting.state(), VmState::Running, "{waiting:?}");
    assert!(
        waiting.missing_bytes > 0 && !waiting.status_message.is_empty(),
        "{waiting:?}"
    );
    assert_eq!(stop(&mut pair.destination).await.state(), VmState::Exited);
    assert!(pair.source.status().await.is_none(), "it is gone");
    moving.abort();
}

/// The destination goes down in post-copy.
async fn unreachable(pair: &mut Pair, request: StartMigrationRequest, hangs: bool) {
    let moving = start(pair, request);
    pair.struck(Side::Destination).await;
    wait_for(&pair.source, "the source to notice", |status| {
        status.state() == VmState::PostCopy && status.status_message.contains("cannot be reached")
    })
    .await;
    if hangs {
        pair.destination.kill();
    }
    let resumed = pair.source.client.resume(ResumeRequest { epoch: 1 }).await;
    resumed.expect_err("it has run elsewhere");
    pair.check_stands_still(Side::Source).await;
    let stopped = stop(&mut pair.source).await;
    assert_eq!(stopped.state(), VmState::Exited, "{stopped:?}");
    assert!(stopped.status_message.contains("is lost"), "{stopped:?}");
    assert!(pair.destination.status().await.is_none(), "it is gone");
    moving.abort();
}

fn start(pair: &Pair, request: StartMigrationRequest) -> tokio::task::JoinHandle<()> {
    let mut client = pair.source.client.clone();
    tokio::spawn(async move {
        // How it ends is seen by the states.
        drop(vmm::migrate(&mut client, request, |_| {}).await);
    })
}

async fn stop(vmm: &mut Vmm) -> VmStatus {
    let stopped = timeout(PATIENCE, vmm.client.stop(StopRequest {})).await;
    stopped.expect("it stops").expect("stopped").into_inner()
}

pub async fn wait_for(vmm: &Vmm, what: &str, wanted: impl Fn(&VmStatus) -> bool) {
    let mut client = vmm.client.clone();
    let mut last = None;
    let found = async {
        loop {
            let status = client.get_status(GetStatusRequest {}).await;
            match status.map(tonic::Response::into_inner) {
                Ok(status) if wanted(&status) => return,
                other => last = Some(other),
            }
            tokio::time::sleep(POLL).await;
        }
    };
    let found = timeout(PATIENCE, found).await;
    assert!(found.is_ok(), "waited for {what}, in vain: {last:?}");
}

/// A VMM that lives holds no more than it did before the migration, unless a thread of it hangs for good, and ends when
/// it is told to.
pub async fn check_nothing_is_left(pair: &mut Pair, hangs: Option<Side>, before: usize) {
    for side in [Side::Source, Side::Destination] {
        let vmm = pair.side(side);
        if vmm.has_ended() {
            continue;
        }
        if hangs != Some(side) {
            let left = || {
                let ports = process::listening_ports(vmm.pid());
                let descriptors = process::descriptors(vmm.pid());
                (!ports.is_empty() || descriptors > before).then_some((ports, descriptors))
            };
            let nothing = async {
                while left().is_some() {
                    tokio::time::sleep(POLL).await;
                }
            };
            let nothing = timeout(PATIENCE, nothing).await;
            assert!(
                nothing.is_ok(),
                "the {side:?} still has ports and descriptors, of {before} before: {:?}",
                left()
            );
        }
        vmm.quit().await;
    }
}
