//! Whoever can reach a destination's port may connect to it and say nothing: that must neither stop a migration nor a guest
//! that runs in post-copy.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};

use shoal_proto::vm::{MigrationPhase, MigrationResult, OnStall, VmState};
use shoal_tests::certificates::Certificates;
use shoal_tests::vmm;
use tokio::time::{Duration, timeout};

use crate::postcopy::{LIMIT, Pair, on_runtime};

/// A TLS record begins, and never ends.
const HALF_A_HANDSHAKE: &[u8] = &[22, 3, 1];
/// So does a migration's stream.
const HALF_A_PREAMBLE: &[u8] = b"SHOAL";

/// Connections that stay open and say no more than `words`.
fn strangers(to: SocketAddr, count: usize, words: &[u8]) -> Vec<TcpStream> {
    let connect = |_| {
        let mut stream = TcpStream::connect(to).expect("the destination listens");
        stream.write_all(words).expect("sent");
        stream
    };
    (0..count).map(connect).collect()
}

/// How often a VMM says in its log that it has turned somebody away.
fn complaints(log: &str) -> usize {
    log.matches("turned").count()
}

#[test]
fn connections_that_say_nothing_do_not_stop_a_migration() {
    on_runtime("strangers before the source", async {
        let certificates = Certificates::of(&["a", "b"]);
        for tls in [false, true] {
            let identity = |own, peer| tls.then(|| certificates.tls(own, peer));
            let mut pair = Pair::with_identity(identity("b", "a")).await;
            let listens = pair.listens;
            let silent = strangers(listens, 12, b"");
            let half_way = strangers(listens, 60, HALF_A_HANDSHAKE);
            let plain = strangers(listens, 60, HALF_A_PREAMBLE);
            let mut request = vmm::outgoing(listens.to_string(), 2, Duration::from_millis(200));
            request.tls = identity("a", "b");
            let report = timeout(LIMIT, pair.source.migrate_with(request, |_| {}));
            let report = report.await.expect("in time").expect("a report");
            assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
            pair.assert_unharmed_there().await;
            let log = pair.destination.log();
            assert!(complaints(&log) < 20, "a line for each:\n{log}");
            drop((silent, half_way, plain));
        }
    });
}

#[test]
fn connections_made_during_pre_copy_do_not_stop_the_switch_to_post_copy() {
    on_runtime("strangers in pre-copy", async {
        let mut pair = Pair::start().await;
        let listens = pair.listens;
        let mut request = vmm::outgoing(listens.to_string(), 2, Duration::from_millis(5));
        let policy = request.policy.as_mut().expect("a policy");
        policy.on_stall = OnStall::PostCopy.into();
        policy.timeout_ms = Some(1);
        policy.bandwidth_bytes_per_second = Some(24 << 20);
        let mut uninvited = vec![];
        let migration = pair.source.migrate_with(request, |progress| {
            if progress.phase() == MigrationPhase::PreCopy && uninvited.is_empty() {
                uninvited = strangers(listens, 12, b"");
            }
        });
        let report = timeout(2 * LIMIT, migration)
            .await
            .expect("in time")
            .expect("a report");
        assert_eq!(uninvited.len(), 12, "none came in time: {report:?}");
        assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
        assert!(report.post_copy, "{report:?}");
        pair.assert_unharmed_there().await;
    });
}

#[test]
fn a_guest_in_post_copy_goes_on_after_a_cut_whoever_else_connects() {
    on_runtime("strangers after a cut in post-copy", async {
        let mut pair = Pair::start().await;
        let mut moving = pair.migrate(2);
        moving.wait_for_post_copy().await;
        pair.proxy.cut();
        pair.destination
            .wait_for_status("the destination to notice", |status| status.link_lost)
            .await;
        let uninvited = strangers(pair.listens, 40, b"");
        pair.proxy.heal();
        pair.destination
            .wait_for_status("the two to be connected again", |status| !status.link_lost)
            .await;
        moving.hold_to(0).await;
        let report = moving.report().await;
        assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
        assert_eq!(pair.destination.state().await, VmState::Running);
        pair.assert_unharmed_there().await;
        drop(uninvited);
    });
}
