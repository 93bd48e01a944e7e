//! What only hosts of their own can have: links that are slow, become slow or are cut, and a full disk. Needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use shoal_proto::vm::{Compression, MigrationPolicy, OnStall, VmStatus};
use shoal_tests::machine::Machine;
use shoal_tests::netns::Network;
use shoal_tests::pair::{Pair, Setup, Side};
use shoal_tests::process;
use shoal_tests::vmm::outgoing;

use super::row::{check_nothing_is_left, ended, wait_for};
use super::rows::End;
use super::{AT_ONCE, Outcome, assert_none, run_all};

const MEMORY: u64 = 48 << 20;
const CALM: &str = "fill=16MiB wss=4MiB rate=400 pattern=random";
/// Writes more than [`CAP`] takes.
const FAST: &str = "fill=16MiB wss=16MiB rate=30000 pattern=random";
const FILL: u64 = 16 << 20;
const MAX_DOWNTIME: Duration = Duration::from_secs(1);
/// Bytes per second: the guest has the time to write most of its memory again, and that goes in the pause.
const CAP: u64 = 24 << 20;
const LAN: &str = "1gbit";
const SLOW: &str = "100mbit";
const CRAWL: &str = "1mbit";

/// What happens to the link of the destination's host when the fault has struck.
#[derive(Debug, Clone, Copy)]
enum Meddle {
    Nothing,
    Slow,
    Cut,
    /// And back once the source has noticed.
    CutForAWhile,
    FillDisk,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    name: &'static str,
    /// On which side, and at which point it is held meanwhile.
    held: Option<(Side, &'static str)>,
    probe: &'static str,
    rate: &'static str,
    policy: fn(&mut MigrationPolicy),
    meddle: Meddle,
    end: End,
    /// In the report's reason.
    why: &'static str,
}

const ROWS: [Row; 8] = [
    Row {
        name: "a slow link",
        held: None,
        probe: CALM,
        rate: SLOW,
        policy: |_| {},
        meddle: Meddle::Nothing,
        end: End::Moves,
        why: "",
    },
    Row {
        name: "a link too slow for the guest",
        held: None,
        probe: FAST,
        rate: SLOW,
        policy: |policy| {
            policy.max_downtime_ms = Some(10);
            policy.timeout_ms = Some(4_000);
        },
        meddle: Meddle::Nothing,
        end: End::Stays,
        why: "--timeout",
    },
    Row {
        name: "a link too slow for the guest, throttled",
        held: None,
        probe: FAST,
        rate: SLOW,
        policy: |policy| {
            policy.max_downtime_ms = Some(200);
            policy.on_stall = OnStall::Throttle.into();
        },
        meddle: Meddle::Nothing,
        end: End::Moves,
        why: "",
    },
    Row {
        name: "a link that becomes slow in the pause",
        held: Some((Side::Source, "source.pause")),
        probe: FAST,
        rate: LAN,
        policy: |policy| {
            policy.bandwidth_bytes_per_second = Some(CAP);
            policy.compression = Compression::Off.into();
        },
        meddle: Meddle::Slow,
        end: End::Stays,
        why: "the pause took longer",
    },
    Row {
        name: "a host cut off in pre-copy",
        held: Some((Side::Source, "source.pre_copy")),
        probe: CALM,
        rate: LAN,
        policy: |_| {},
        meddle: Meddle::Cut,
        end: End::Stays,
        why: "",
    },
    Row {
        name: "a host cut off when it has taken over",
        held: Some((Side::Destination, "destination.running")),
        probe: CALM,
        rate: LAN,
        policy: |_| {},
        meddle: Meddle::Cut,
        end: End::RunsThere,
        why: "Commit was sent and not answered",
    },
    Row {
        name: "a host cut off for a while in post-copy",
        held: Some((Side::Destination, "destination.post_copy")),
        probe: "fill=32MiB wss=32MiB rate=4000 pattern=random",
        rate: LAN,
        policy: |policy| {
            policy.timeout_ms = Some(1);
            policy.max_downtime_ms = Some(5);
            policy.on_stall = OnStall::PostCopy.into();
            policy.bandwidth_bytes_per_second = Some(8 << 20);
        },
        meddle: Meddle::CutForAWhile,
        end: End::Moves,
        why: "",
    },
    Row {
        name: "a full disk at the destination",
        held: Some((Side::Source, "source.pause")),
        probe: CALM,
        rate: LAN,
        policy: |_| {},
        meddle: Meddle::FillDisk,
        end: End::Resumed,
        why: "No space left on device",
    },
];

#[test]
fn slow_and_cut_links_and_full_disks_leave_exactly_one_vm_running() {
    let Some(_machine) = Machine::with_kvm_and_root("slow links and full disks") else {
        return;
    };
    let hosts: Vec<String> = (0..ROWS.len())
        .flat_map(|row| [format!("a{row}"), format!("b{row}")])
        .collect();
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let network = Arc::new(Network::new(&hosts, LAN));
    let outcomes = ROWS.into_iter().enumerate().map(|(index, row)| {
        let network = Arc::clone(&network);
        let outcome: Outcome = Box::pin(async move { run(&network, index, row).await });
        (row.name.to_owned(), outcome)
    });
    assert_none(&run_all(outcomes, AT_ONCE));
}

async fn run(network: &Network, index: usize, row: Row) {
    let (source, destination) = (format!("a{index}"), format!("b{index}"));
    network.set_rate(&destination, row.rate);
    let under = |side, host: &str| {
        let mut words = network.on(host);
        if let Some((_, point)) = row.held.filter(|(held, _)| *held == side) {
            words.extend(["env".into(), format!("SHOAL_FAULT={point}=delay:1500")]);
        }
        words
    };
    let disk = matches!(row.meddle, Meddle::FillDisk).then(SmallDisk::mount);
    let mut pair = Pair::start(Setup {
        source_under: under(Side::Source, &source),
        destination_under: under(Side::Destination, &destination),
        destination_below: disk.as_ref().map(|disk| disk.path().to_owned()),
        memory: MEMORY,
        probe: row.probe.into(),
        fill: FILL,
        ..Setup::default()
    })
    .await;
    let before = process::descriptors(pair.source.pid());
    let listen = format!("{}:0", network.address(&destination));
    let address = pair.prepare_with(|request| request.listen_address = listen).await;
    let mut request = outgoing(address, 2, MAX_DOWNTIME);
    (row.policy)(request.policy.get_or_insert_default());
    let meddle = async {
        let Some((side, _)) = row.held else { return };
        pair.struck(side).await;
        match row.meddle {
            Meddle::Nothing => {}
            Meddle::Slow => network.set_rate(&destination, CRAWL),
            Meddle::Cut => network.cut(&destination),
            Meddle::CutForAWhile => {
                network.cut(&destination);
                let lost = |status: &VmStatus| status.status_message.contains("cannot be reached");
                wait_for(&pair.source, "the source to notice", lost).await;
                network.restore(&destination);
            }
            Meddle::FillDisk => disk.as_ref().expect("mounted").fill(),
        }
    };
    let report = tokio::join!(pair.migrate(request), meddle).0;
    let runner = pair.settle(report.as_ref()).await;
    assert_eq!(ended(report.as_ref(), runner), row.end, "{report:?}");
    let reason = report.as_ref().map_or("", |report| &report.reason);
    assert!(reason.contains(row.why), "{report:?}");
    let recoveries = report.as_ref().map_or(0, |report| report.recoveries);
    assert_eq!(
        matches!(row.meddle, Meddle::CutForAWhile),
        recoveries > 0,
        "{report:?}"
    );
    pair.check(runner).await;
    check_nothing_is_left(&mut pair, None, before).await;
}

/// A file system of its own that is soon full; gone with this.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let disk = Self(tempfile::tempdir().expect("a temporary directory"));
        let options = ["-t", "tmpfs", "-o", "size=1m,nr_inodes=64", "tmpfs"];
        let mounted = Command::new("mount").args(options).arg(disk.path()).status();
        assert!(mounted.is_ok_and(|status| status.success()), "a tmpfs is mounted");
        disk
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Leaves room for no byte and for no file.
    fn fill(&self) {
        let file = |number: u32| -> PathBuf { self.path().join(format!("fill{number}")) };
        fs::write(file(0), vec![0; 2 << 20]).expect_err("more than there is");
        let refused = (1..1_000).any(|number| fs::File::create(file(number)).is_err());
        assert!(refused, "no room for files is left");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Nothing can be done about one that does not go.
        drop(Command::new("umount").arg("--lazy").arg(self.path()).status());
    }
}
