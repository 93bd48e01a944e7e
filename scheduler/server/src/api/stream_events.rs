//! StreamEvents.

use std::sync::Arc;

use shoal_proto::cluster::{Event, StreamEventsRequest};

use super::AnswerStream;
use crate::scheduler::Shared;

pub fn call(scheduler: &Shared, request: &StreamEventsRequest) -> AnswerStream<Event> {
    let scheduler = Arc::clone(scheduler);
    let (follow, mut sequence) = (request.follow, request.after_sequence);
    super::stream(move |sender| async move {
        let mut news = scheduler.events.follow();
        loop {
            news.mark_unchanged();
            loop {
                let batch = scheduler.events.after(sequence);
                let Some(last) = batch.last() else { break };
                sequence = last.sequence;
                for event in batch {
                    if sender.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
            }
            if !follow {
                return;
            }
            tokio::select! {
                changed = news.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
        }
    })
}
