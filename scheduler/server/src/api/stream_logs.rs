//! StreamLogs: what is stored, then, with `follow`, what comes, until the VM has ended and all of it is sent.

use std::sync::Arc;

use shoal_proto::cluster::{LogChunk, StreamLogsRequest};
use tonic::Status;

use super::{AnswerStream, errors};
use crate::record::Phase;
use crate::scheduler::Shared;

const CHUNK_BYTES: usize = 64 << 10;

pub async fn call(scheduler: &Shared, request: &StreamLogsRequest) -> Result<AnswerStream<LogChunk>, Status> {
    let entry = super::find_watched(scheduler, &request.vm, request.follow)?;
    let vm = entry.record().id;
    let scheduler = Arc::clone(scheduler);
    let mut end = scheduler
        .logs
        .follow(vm)
        .await
        .map_err(|error| errors::io("console log", &error))?;
    let mut record = entry.subscribe();
    let (follow, mut offset) = (request.follow, request.from_offset);
    Ok(super::stream(move |sender| async move {
        let _entry = entry;
        loop {
            // Looked at before reading: the console is complete before a VM is recorded as ended.
            let ended = matches!(record.borrow_and_update().phase, Phase::Ended(_));
            end.mark_unchanged();
            loop {
                match scheduler.logs.read(vm, offset, CHUNK_BYTES).await {
                    Ok(Some(piece)) => {
                        let chunk = LogChunk {
                            offset: piece.offset,
                            data: piece.data,
                        };
                        offset = piece.next_offset;
                        if sender.send(Ok(chunk)).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        let _ = sender.send(Err(errors::io("console log", &error))).await;
                        return;
                    }
                }
            }
            if !follow || ended {
                return;
            }
            tokio::select! {
                changed = end.changed() => if changed.is_err() { return },
                changed = record.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
        }
    }))
}
