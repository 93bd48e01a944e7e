//! The console's way from a VMM to the scheduler: one bounded piece at a time, and nothing is forgotten by the VMM
//! before the scheduler has it.

use std::convert::Infallible;
use std::time::Duration;

use shoal_proto::node::{AgentReport, ConsoleData, agent_report};
use shoal_proto::vm::{AckConsoleRequest, ConsoleChunk, ReadConsoleRequest, VmState};
use tokio::sync::watch;
use tonic::Status;

use crate::uplink::Session;
use crate::vm::{ANSWER_LIMIT, Vm};

/// Most bytes of one VM's console on their way at any time.
const PIECE: usize = 64 * 1024;
/// Pause before reading again after the VMM's stream has broken.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How long an acknowledgement may take until the piece is sent again; doubled each time.
const FIRST_ACK_LIMIT: Duration = Duration::from_secs(1);
const LONGEST_ACK_LIMIT: Duration = Duration::from_secs(16);

/// Moves console bytes as long as the VMM lives.
pub(crate) async fn pump(vm: &Vm, mut sessions: watch::Receiver<Session>) -> Infallible {
    loop {
        wait_until_it_has_a_console(vm).await;
        if let Err(status) = follow(vm, &mut sessions).await {
            tracing::debug!(vm = %vm.key.id, %status, "console stream ended");
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// Before it is booted, or loaded by a migration, a VMM has no console.
async fn wait_until_it_has_a_console(vm: &Vm) {
    if vm
        .watch_status()
        .wait_for(|status| has_console(status.state()))
        .await
        .is_err()
    {
        std::future::pending::<()>().await;
    }
}

fn has_console(state: VmState) -> bool {
    !matches!(state, VmState::Unspecified | VmState::Empty | VmState::Incoming)
}

async fn follow(vm: &Vm, sessions: &mut watch::Receiver<Session>) -> Result<(), Status> {
    let request = ReadConsoleRequest {
        from_offset: *vm.console_acked.borrow(),
        follow: true,
    };
    let mut chunks = vm.client().read_console(request).await?.into_inner();
    while let Some(chunk) = chunks.message().await? {
        for piece in pieces(chunk) {
            deliver(vm, piece, sessions).await;
        }
        let offset = *vm.console_acked.borrow();
        let mut client = vm.client();
        vm.call(ANSWER_LIMIT, client.ack_console(AckConsoleRequest { offset }))
            .await?;
    }
    Ok(())
}

/// Cuts a chunk into pieces that are small enough to have one in flight for each VM.
fn pieces(chunk: ConsoleChunk) -> impl Iterator<Item = ConsoleChunk> {
    let ConsoleChunk { offset, data } = chunk;
    let starts = (0..data.len()).step_by(PIECE);
    starts.map(move |start| ConsoleChunk {
        offset: offset.saturating_add(start as u64),
        data: data[start..data.len().min(start + PIECE)].to_vec(),
    })
}

/// Sends the piece until the scheduler has it: again in every new session, and when no acknowledgement comes, since
/// the scheduler may have dropped it, or was not able to store the piece.
async fn deliver(vm: &Vm, piece: ConsoleChunk, sessions: &mut watch::Receiver<Session>) {
    let end = piece.offset.saturating_add(piece.data.len() as u64);
    let mut acked = vm.console_acked.subscribe();
    let mut patience = FIRST_ACK_LIMIT;
    while *acked.borrow() < end {
        let session = sessions.borrow_and_update().clone();
        tokio::select! {
            () = send_and_wait(vm, &piece, session, patience) => patience = (patience * 2).min(LONGEST_ACK_LIMIT),
            _arrived = async { acked.wait_for(|&acked| acked >= end).await.is_ok() } => {}
            changed = sessions.changed() => if changed.is_err() {
                std::future::pending::<()>().await; // the agent is shutting down
            }
        }
    }
}

/// Returns when the piece was sent and the acknowledgement is overdue; without a session never.
async fn send_and_wait(vm: &Vm, piece: &ConsoleChunk, session: Session, patience: Duration) {
    let data = ConsoleData {
        vm: Some(vm.key.to_ref()),
        offset: piece.offset,
        data: piece.data.clone(),
    };
    let report = AgentReport {
        report: Some(agent_report::Report::Console(data)),
    };
    match session {
        Some(reports) if reports.send(report).await.is_ok() => tokio::time::sleep(patience).await,
        _ => std::future::pending().await, // a new session is announced
    }
}

/// Waits until the scheduler has all that the VMM still holds of the console now, or the limit has passed.
pub(crate) async fn drain(vm: &Vm, limit: Duration) {
    let all_arrived = async {
        let end = end_of_unacknowledged(vm).await?;
        let arrived = vm
            .console_acked
            .subscribe()
            .wait_for(|&acked| acked >= end)
            .await
            .map(drop);
        arrived.map_err(|_| Status::cancelled("the agent is shutting down"))
    };
    match tokio::time::timeout(limit, all_arrived).await {
        Ok(Ok(())) => {}
        Ok(Err(status)) => tracing::warn!(vm = %vm.key.id, %status, "the console could not be drained"),
        Err(_) => tracing::warn!(
            vm = %vm.key.id,
            acked = *vm.console_acked.borrow(),
            "the scheduler did not take the rest of the console in time"
        ),
    }
}

/// The offset after the last byte that the VMM holds. What it does not hold was acknowledged, perhaps to an earlier
/// agent, so the guest's own offset would not do.
async fn end_of_unacknowledged(vm: &Vm) -> Result<u64, Status> {
    if !has_console(vm.refresh_status().await?.state()) {
        return Ok(0);
    }
    let request = ReadConsoleRequest {
        from_offset: *vm.console_acked.borrow(),
        follow: false,
    };
    let mut chunks = vm.client().read_console(request).await?.into_inner();
    let mut end = 0;
    while let Some(chunk) = chunks.message().await? {
        if !chunk.data.is_empty() {
            end = chunk.offset.saturating_add(chunk.data.len() as u64);
        }
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_bounded_and_keep_their_offsets() {
        let data: Vec<u8> = (0..=255).cycle().take(PIECE * 2 + 5).collect();
        let cut: Vec<_> = pieces(ConsoleChunk {
            offset: 100,
            data: data.clone(),
        })
        .collect();
        let shape: Vec<_> = cut.iter().map(|piece| (piece.offset, piece.data.len())).collect();
        let step = PIECE as u64;
        assert_eq!(shape, [(100, PIECE), (100 + step, PIECE), (100 + 2 * step, 5)]);
        assert_eq!(
            cut.into_iter().flat_map(|piece| piece.data).collect::<Vec<_>>(),
            data
        );
        assert_eq!(
            pieces(ConsoleChunk {
                offset: 1,
                data: Vec::new()
            })
            .count(),
            0
        );
    }
}
