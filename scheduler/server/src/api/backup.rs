//! Backup: all records of the store, as they are at one moment.

use shoal_proto::cluster::BackupChunk;
use tokio::sync::mpsc;
use tonic::Status;

use super::{AnswerStream, chain};
use crate::scheduler::Shared;
use crate::store::backup::{BackupError, Sink};

struct StreamSink(mpsc::Sender<Result<BackupChunk, Status>>);

#[tonic::async_trait]
impl Sink for StreamSink {
    async fn take(&mut self, data: Vec<u8>) -> Result<(), BackupError> {
        let sent = self.0.send(Ok(BackupChunk { data })).await;
        sent.map_err(|_| BackupError::Gone)
    }
}

pub fn call(scheduler: Shared) -> AnswerStream<BackupChunk> {
    super::stream(move |sender| async move {
        let mut sink = StreamSink(sender.clone());
        match scheduler.store.back_up(&mut sink).await {
            Ok(summary) => tracing::info!(records = summary.records, bytes = summary.bytes, "backup"),
            Err(BackupError::Gone) => {}
            Err(error) => {
                // A stream that ends without its end mark is refused by whoever reads it; this says why.
                let _ = sender.send(Err(Status::internal(chain(&error)))).await;
            }
        }
    })
}
