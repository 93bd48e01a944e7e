//! StreamEvents. A follower has those that the leader has stored, a moment later.

use std::time::Duration;

use shoal_proto::cluster::{Event, StreamEventsRequest};

use super::{AnswerStream, Role};
use crate::scheduler::Shared;

/// How often a follower looks for more.
const INTERVAL: Duration = Duration::from_secs(1);

pub fn call(role: &Role, request: &StreamEventsRequest) -> AnswerStream<Event> {
    let role = role.clone();
    let (follow, mut sequence) = (request.follow, request.after_sequence);
    super::stream(move |sender| async move {
        loop {
            let scheduler: Shared = match role.read().await {
                Ok(scheduler) => scheduler,
                Err(status) => {
                    let _ = sender.send(Err(status)).await;
                    return;
                }
            };
            let mut news = scheduler.events.follow();
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
            let more = async {
                match &role {
                    Role::Leader(_) => news.changed().await.is_ok(),
                    Role::Follower(_) => {
                        tokio::time::sleep(INTERVAL).await;
                        true
                    }
                }
            };
            tokio::select! {
                more = more => if !more { return },
                () = sender.closed() => return,
            }
        }
    })
}
