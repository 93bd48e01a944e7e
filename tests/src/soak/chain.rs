//! A guest that goes from VMM to VMM, each a new process.

use std::time::Duration;

use shoal_proto::vm::{
    AbortIncomingRequest, AckConsoleRequest, CancelMigrationRequest, MemoryBacking, MigrationReport,
    MigrationResult, PrepareIncomingRequest, ReadConsoleRequest, ResumeRequest, StartMigrationRequest,
    VmSpec, VmState,
};
use tokio::time::timeout;

use super::plan::{self, Link, Move, Random, Trouble};
use super::progress;
use super::summary::Summary;
use crate::certificates::Certificates;
use crate::guest;
use crate::process;
use crate::proxy::{self, Proxy};
use crate::vmm::{self, Vmm, incoming, outgoing, probe_spec};

const VM: &str = "7a1d3c52-61f0-4f57-8a55-30d1c0ffee01";
const MEMORY: u64 = 48 << 20;
/// Writes and checks all the time, 31 MiB/s of it.
const PROBE: &str = "beat=200 fill=24MiB wss=8MiB rate=8000 pattern=random";
const FILL: u64 = 24 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(10);
/// How often the guest is waited for; it is looked at after each move.
const HEARTBEAT_EVERY: u32 = 10;
/// The probe looks at all of its memory once in four of its seconds.
const BEATS_TO_SEE_ALL_MEMORY: u64 = 5;

/// Moves a guest so many times.
pub async fn run(moves: u32, random: &mut Random, summary: &mut Summary) {
    let mut chain = Chain::start().await;
    for number in 1..=moves {
        let planned = plan::next(random);
        let what = format!("move {number}, {planned:?}");
        chain.go(&planned, &what, summary).await;
        chain.look_at_guest(&what).await;
        chain.check_nothing_is_left(&what, summary).await;
        if number.is_multiple_of(HEARTBEAT_EVERY) {
            chain.wait_for_heartbeats(1, &what).await;
        }
        progress("from VMM to VMM", number, moves, summary);
    }
    chain
        .wait_for_heartbeats(BEATS_TO_SEE_ALL_MEMORY, "the end")
        .await;
    guest::assert_unharmed(&chain.console);
    let last = guest::heartbeats(&chain.console).pop().expect("a heartbeat");
    let counts = [
        ("pages the guest wrote", last.dirtied),
        ("pages it checked", last.checked),
    ];
    for (what, count) in counts {
        summary
            .counts
            .insert(what.into(), u32::try_from(count).unwrap_or(u32::MAX));
    }
    chain.vmm.quit().await;
}

struct Chain {
    vmm: Vmm,
    /// Of the VM where it runs, and the newest that was tried.
    epoch: u64,
    tried: u64,
    backing: MemoryBacking,
    /// All of it, as far as it has been read and acknowledged.
    console: String,
    certificates: Certificates,
}

impl Chain {
    async fn start() -> Self {
        let mut vmm = Vmm::start().await;
        let backing = MemoryBacking::Anonymous;
        vmm.boot(spec(1, backing)).await;
        let filled = |text: &str| {
            guest::heartbeats(text)
                .last()
                .is_some_and(|beat| beat.filled >= FILL)
        };
        let console = timeout(PATIENCE, vmm.follow_console(filled)).await;
        console.expect("the probe fills its memory");
        Self {
            vmm,
            epoch: 1,
            tried: 1,
            backing,
            console: String::new(),
            certificates: Certificates::of(&["a", "b"]),
        }
    }

    /// One move, and what has to be settled after it.
    async fn go(&mut self, planned: &Move, what: &str, summary: &mut Summary) {
        self.tried += 1;
        let id = uuid::Uuid::new_v4().to_string();
        let now = match planned.trouble {
            Trouble::Fault(fault) => Some(fault),
            _ => None,
        };
        let faults: Vec<&str> = now.into_iter().chain(planned.later).collect();
        let mut under = vec![];
        if !faults.is_empty() {
            under.extend(["env".into(), format!("SHOAL_FAULT={}", faults.join(","))]);
        }
        let mut destination = Vmm::start_under(&under).await;
        let request = self.arriving(planned, &id, &destination);
        let prepared = destination.prepare(request).await;
        let mut address = prepared.unwrap_or_else(|error| panic!("{what}: {error}"));
        let proxy = match planned.trouble {
            Trouble::Cut(after) => {
                let target = address.parse().expect("an address");
                Some(Proxy::start(target, proxy::Trouble::CutAfter(after)))
            }
            _ => None,
        };
        if let Some(proxy) = &proxy {
            address = proxy.address().to_string();
        }
        let struck_before = self.vmm.faults_struck();
        let report = self
            .migrate(self.leaving(planned, &id, address), planned, what)
            .await;
        count(planned, &report, summary);
        let struck = self.vmm.faults_struck() > struck_before;
        let expected = planned.trouble != Trouble::Nothing || struck;
        let unexpected = !expected && report.result() != MigrationResult::Completed;
        assert!(!unexpected, "{what}: {report:?}");
        if self.is_there(&report, &mut destination, &id, what).await {
            destination.wait_for_state(VmState::Running).await;
            let mut source = std::mem::replace(&mut self.vmm, destination);
            source.quit().await;
            self.epoch = self.tried;
            if !report.handed_over {
                self.backing = planned.backing;
            }
        } else {
            self.vmm.wait_for_state(VmState::Running).await;
            assert!(!destination.has_run(), "{what}: it has run there: {report:?}");
            if !destination.has_ended() {
                destination.quit().await;
            }
        }
    }

    fn arriving(&self, planned: &Move, id: &str, destination: &Vmm) -> PrepareIncomingRequest {
        let mut request = PrepareIncomingRequest {
            migration_id: id.into(),
            ..incoming(spec(self.tried, planned.backing))
        };
        match planned.link {
            Link::Plain => {}
            Link::Tls => request.tls = Some(self.certificates.tls("b", "a")),
            Link::SameHost => {
                let socket = destination.directory().join("migration.sock");
                request.listen_address = format!("unix:{}", socket.display());
            }
        }
        request
    }

    fn leaving(&self, planned: &Move, id: &str, address: String) -> StartMigrationRequest {
        StartMigrationRequest {
            migration_id: id.into(),
            policy: Some(planned.policy),
            tls: (planned.link == Link::Tls).then(|| self.certificates.tls("a", "b")),
            ..outgoing(address, self.tried, Duration::ZERO)
        }
    }

    async fn migrate(
        &mut self,
        request: StartMigrationRequest,
        planned: &Move,
        what: &str,
    ) -> MigrationReport {
        let mut canceller = self.vmm.client.clone();
        let id = request.migration_id.clone();
        let cancel = async {
            let Trouble::Cancel(after) = planned.trouble else {
                return;
            };
            tokio::time::sleep(Duration::from_millis(after)).await;
            let request = CancelMigrationRequest { migration_id: id };
            // It may be over, or too late.
            drop(canceller.cancel_migration(request).await);
        };
        let migrate = vmm::migrate(&mut self.vmm.client, request, |_| {});
        let report = timeout(PATIENCE, async { tokio::join!(migrate, cancel).0 }).await;
        let report = report.unwrap_or_else(|_| panic!("{what}: it does not end"));
        report.unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// Whether the VM runs at the destination now. What was in doubt is settled as a scheduler does it.
    async fn is_there(
        &mut self,
        report: &MigrationReport,
        destination: &mut Vmm,
        id: &str,
        what: &str,
    ) -> bool {
        match report.result() {
            MigrationResult::Completed => return true,
            MigrationResult::InDoubt => {}
            _ => return false,
        }
        let request = AbortIncomingRequest {
            migration_id: id.into(),
        };
        let committed = match destination.client.abort_incoming(request).await {
            Ok(answer) => answer.into_inner().committed,
            Err(_) => destination.has_run(),
        };
        if committed {
            // In post-copy the source finds out by itself; until then memory is at two places.
            destination
                .wait_for_status("all of its memory", |status| status.missing_bytes == 0)
                .await;
        }
        if !committed {
            let resumed = self.vmm.client.resume(ResumeRequest { epoch: self.epoch }).await;
            resumed.unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        committed
    }

    /// Reads what the guest has printed, acknowledges it as the control plane does, and checks it.
    async fn look_at_guest(&mut self, what: &str) {
        let request = ReadConsoleRequest {
            from_offset: self.console.len() as u64,
            follow: false,
        };
        let answer = self.vmm.client.read_console(request).await;
        let mut stream = answer.expect("the console").into_inner();
        while let Some(chunk) = stream.message().await.expect("a chunk") {
            let at = self.console.len() as u64;
            assert_eq!(chunk.offset, at, "{what}: the console has a hole");
            self.console
                .push_str(std::str::from_utf8(&chunk.data).expect("ASCII"));
        }
        let offset = self.console.len() as u64;
        let acknowledged = self.vmm.client.ack_console(AckConsoleRequest { offset }).await;
        acknowledged.expect("acknowledged");
        guest::check_unharmed(&self.console).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
    }

    async fn wait_for_heartbeats(&mut self, more: u64, what: &str) {
        let newest = |console: &str| guest::heartbeats(console).last().map_or(0, |beat| beat.n);
        let wanted = newest(&self.console) + more;
        let seen = async {
            while newest(&self.console) < wanted {
                tokio::time::sleep(POLL).await;
                self.look_at_guest(what).await;
            }
        };
        let seen = timeout(PATIENCE, seen).await;
        assert!(seen.is_ok(), "{what}: the guest does not go on");
    }

    /// One VMM, with the VM's memory and no more, that listens to nobody.
    async fn check_nothing_is_left(&mut self, what: &str, summary: &mut Summary) {
        let pid = self.vmm.pid();
        assert_eq!(
            process::children("shoal-vmm"),
            [pid],
            "{what}: other processes are left"
        );
        // What a migration leaves to be freed after the guest runs again is freed soon.
        let settled = async {
            while process::memory(pid).guest != MEMORY || !process::listening_ports(pid).is_empty() {
                tokio::time::sleep(POLL).await;
            }
        };
        let settled = timeout(PATIENCE, settled).await;
        assert!(
            settled.is_ok(),
            "{what}: {:?}, ports {:?}",
            process::memory(pid),
            process::listening_ports(pid)
        );
        summary.hold("VMM", pid);
    }
}

fn spec(epoch: u64, backing: MemoryBacking) -> VmSpec {
    VmSpec {
        memory_backing: backing.into(),
        ..probe_spec(VM, epoch, MEMORY, PROBE)
    }
}

/// What was asked for and what came of it.
fn count(planned: &Move, report: &MigrationReport, summary: &mut Summary) {
    summary.count(format!("link {:?}", planned.link));
    summary.count(match planned.trouble {
        Trouble::Nothing => "trouble none".to_owned(),
        Trouble::Cancel(_) => "trouble cancel".to_owned(),
        Trouble::Cut(_) => "trouble connections cut".to_owned(),
        Trouble::Fault(fault) => format!("trouble {fault}"),
    });
    count_report(&planned.policy, report, summary);
}

/// The part that does not depend on who asked.
pub(super) fn count_report(
    policy: &shoal_proto::vm::MigrationPolicy,
    report: &MigrationReport,
    summary: &mut Summary,
) {
    let name = |name: &str| name.rsplit('_').next().unwrap_or(name).to_lowercase();
    summary.count(format!("connections {}", policy.connections()));
    summary.count(format!("compress {}", name(policy.compression().as_str_name())));
    summary.count(format!("verify {}", name(policy.verify().as_str_name())));
    summary.count(format!("on stall {}", name(policy.on_stall().as_str_name())));
    let cap = policy.bandwidth_bytes_per_second() >> 20;
    summary.count(format!("bandwidth {cap} MiB/s"));
    summary.count(match report.result() {
        MigrationResult::Completed => "result completed",
        MigrationResult::Failed => "result failed",
        MigrationResult::Cancelled => "result cancelled",
        MigrationResult::InDoubt => "result in doubt",
        MigrationResult::Unspecified => "result unknown",
    });
    if report.result() == MigrationResult::Completed {
        summary.downtimes.push(report.downtime_us);
        for (had, what) in [
            (report.handed_over, "had memory handed over"),
            (report.post_copy, "had post-copy"),
            (report.throttled_us > 0, "had throttling"),
            (report.tls, "had TLS"),
            (report.compressed_pages > 0, "had compressed pages"),
            (report.delta_pages > 0, "had delta pages"),
            (report.resent_pages > 0, "had pages sent again"),
            (
                report.verified() != shoal_proto::vm::Verify::Unspecified,
                "had memory compared",
            ),
        ] {
            if had {
                summary.count(what);
            }
        }
    }
}
