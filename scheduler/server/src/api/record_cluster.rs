//! RecordCluster: what the planner is shown, once a second.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use shoal_plan::text;
use shoal_proto::cluster::ClusterRecord;
use tokio::time::MissedTickBehavior;

use super::AnswerStream;
use crate::observe;
use crate::scheduler::Shared;

const INTERVAL: Duration = Duration::from_secs(1);
/// Of one message.
const MOST_BYTES: usize = 1 << 20;

pub fn call(scheduler: &Shared) -> AnswerStream<ClusterRecord> {
    let scheduler = Arc::clone(scheduler);
    super::stream(move |sender| async move {
        let mut seconds = tokio::time::interval(INTERVAL);
        seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = seconds.tick() => {}
                () = sender.closed() => return,
            }
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let shared = Arc::clone(&scheduler);
            let print = move || text::print(&observe::snapshot(&shared), &shared.policy.get());
            let records = match scheduler.questions.run(print).await {
                Ok(text) => parts(&text, i64::try_from(now.as_millis()).unwrap_or(i64::MAX)),
                Err(error) => {
                    let _ = sender.send(Err(super::ended(error))).await;
                    return;
                }
            };
            for record in records {
                if sender.send(Ok(record)).await.is_err() {
                    return;
                }
            }
        }
    })
}

/// A text in messages of bounded size, each of whole lines unless one line alone is too long.
fn parts(mut text: &str, unix_ms: i64) -> Vec<ClusterRecord> {
    let mut records = Vec::new();
    loop {
        let (part, rest) = text.split_at(cut(text));
        let complete = rest.is_empty();
        records.push(ClusterRecord {
            unix_ms,
            text: part.to_owned(),
            complete,
        });
        if complete {
            return records;
        }
        text = rest;
    }
}

fn cut(text: &str) -> usize {
    if text.len() <= MOST_BYTES {
        return text.len();
    }
    let most = text.floor_char_boundary(MOST_BYTES);
    text[..most].rfind('\n').map_or(most, |end| end + 1)
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt as _;

    use super::*;
    use crate::execute::launch;
    use crate::testing::Cluster;

    #[tokio::test]
    async fn each_second_is_a_cluster_that_can_be_read_back() {
        let cluster = Cluster::start(2, 1 << 30).await;
        let draft = cluster.draft("a", 64 << 20);
        launch::submit(&cluster.scheduler, draft, None)
            .await
            .expect("placed");
        let mut records = call(&cluster.scheduler);
        let mut before = 0;
        for _ in 0..2 {
            let record = records.next().await.expect("it goes on").expect("a record");
            assert!(record.complete && record.unix_ms > before);
            before = record.unix_ms;
            let read = text::parse(&record.text).expect("what was printed");
            assert_eq!((read.snapshot.nodes.len(), read.snapshot.vms.len()), (2, 1));
            assert_eq!(&*read.snapshot.vms[0].name, "a");
        }
    }

    #[test]
    fn a_long_text_comes_in_parts_of_whole_lines() {
        let text = format!("{}\n", "é".repeat(100)).repeat(20_000);
        let records = parts(&text, 7);
        assert!(records.len() > 3);
        let joined: String = records.iter().map(|record| record.text.as_str()).collect();
        assert_eq!(joined, text);
        assert!(
            records
                .iter()
                .all(|record| record.text.len() <= MOST_BYTES && record.text.ends_with('\n'))
        );
        assert!(records.iter().rev().skip(1).all(|record| !record.complete));
        assert!(parts("", 7)[0].complete);
        let one_line = format!("x{}", "é".repeat(MOST_BYTES));
        assert_eq!(parts(&one_line, 7).len(), 3);
    }
}
