//! What the leader writes: one transaction after the other, each of as many batches as wait and fit.
//!
//! Every transaction asks that the leader's key is still the one of its own election, and that the key `commit` is as the
//! last transaction of this leader left it; and writes `commit` anew. So nobody else can have written in between, a leader
//! that was deposed writes nothing, and a transaction whose answer was lost can be sent again: it happens once.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::api::{RequestOp, TxnRequest, TxnResponse, response_op};
use super::client::{self, CallError};
use super::{Etcd, delete, get, operation, put, request_op};
use crate::store::backend::{Backend, Change, Snapshot, Table};
use crate::store::{MOST_BYTES, MOST_CHANGES, StoreError, Term};

/// Batches that may wait.
const DEPTH: usize = 1024;
const PAUSE: Duration = Duration::from_millis(200);

/// What each transaction of a leader asks for.
#[derive(Debug, Clone, Copy)]
pub struct Fence {
    /// Its term.
    pub term: Term,
    /// The revision of its election, at which the keys `leader` and `commit` were written.
    pub elected: i64,
}

/// A store in etcd, for the one that leads.
#[derive(Debug)]
pub struct Writer {
    store: Etcd,
    batches: mpsc::Sender<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    operations: Operations,
    answer: oneshot::Sender<Result<(), StoreError>>,
}

impl Writer {
    /// Writes behind this fence until it is deposed; the receiver tells when.
    pub fn start(
        store: Etcd,
        fence: Fence,
        session_lost: watch::Receiver<bool>,
    ) -> (Self, watch::Receiver<bool>) {
        let (batches, waiting) = mpsc::channel(DEPTH);
        let (deposed, receiver) = watch::channel(false);
        let task = Task {
            store: store.clone(),
            fence,
            last: fence.elected,
            number: 0,
            session_lost,
        };
        tokio::spawn(task.run(waiting, deposed));
        (Self { store, batches }, receiver)
    }
}

#[tonic::async_trait]
impl Backend for Writer {
    fn name(&self) -> &str {
        self.store.name()
    }

    async fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError> {
        self.store.snapshot().await
    }

    async fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.get(table, key).await
    }

    async fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        let mut operations = Operations::default();
        for change in changes {
            operations.add(change)?;
        }
        let (answer, done) = oneshot::channel();
        let waiting = Waiting { operations, answer };
        let sent = self.batches.send(waiting).await;
        sent.map_err(|_| StoreError::Deposed)?;
        done.await.map_err(|_| StoreError::Deposed)?
    }
}

/// Changes as one transaction can have them: each key once.
#[derive(Debug, Default)]
struct Operations {
    /// `None`: deleted.
    keys: BTreeMap<(Table, Vec<u8>), Option<Vec<u8>>>,
    ranges: Vec<(Table, Vec<u8>, Vec<u8>)>,
}

impl Operations {
    fn add(&mut self, change: Change) -> Result<(), StoreError> {
        match change {
            Change::Put(table, key, value) => self.set(table, key, Some(value)),
            Change::Delete(table, key) => self.set(table, key, None),
            Change::DeleteThrough(table, from, through) => {
                self.keys
                    .retain(|(of, key), _| *of != table || *key < from || *key > through);
                self.ranges.push((table, from, through));
                Ok(())
            }
        }
    }

    fn set(&mut self, table: Table, key: Vec<u8>, value: Option<Vec<u8>>) -> Result<(), StoreError> {
        if self.ranges.iter().any(|range| covers(range, table, &key)) {
            let what = format!("a change in table '{}' after its range was deleted", table.name());
            return Err(StoreError::TooLarge { what });
        }
        match self.keys.entry((table, key)) {
            Entry::Vacant(entry) => {
                entry.insert(value);
            }
            Entry::Occupied(mut entry) => {
                entry.insert(value);
            }
        }
        Ok(())
    }

    fn count(&self) -> usize {
        self.keys.len() + self.ranges.len()
    }

    fn bytes(&self) -> usize {
        let key = |((_, key), value): (&(Table, Vec<u8>), &Option<Vec<u8>>)| {
            key.len() + value.as_ref().map_or(0, Vec::len)
        };
        self.keys.iter().map(key).sum()
    }

    /// Another batch after this one fits into the same transaction, and does not touch what this one does.
    fn has_room_for(&self, next: &Self) -> bool {
        let apart = next.ranges.is_empty()
            && self.ranges.is_empty()
            && !next.keys.keys().any(|key| self.keys.contains_key(key));
        apart && self.count() + next.count() <= MOST_CHANGES && self.bytes() + next.bytes() <= MOST_BYTES
    }

    fn join(&mut self, next: Self) {
        self.keys.extend(next.keys);
    }

    fn requests(&self, store: &Etcd) -> Vec<RequestOp> {
        let range = |(table, from, through): &(Table, Vec<u8>, Vec<u8>)| {
            let end = [store.keys.record(*table, through).as_slice(), &[0]].concat();
            delete(store.keys.record(*table, from), end)
        };
        let key = |((table, key), value): (&(Table, Vec<u8>), &Option<Vec<u8>>)| {
            let key = store.keys.record(*table, key);
            match value {
                Some(value) => put(key, value.clone(), 0),
                None => delete(key, Vec::new()),
            }
        };
        let ranges = self.ranges.iter().map(range);
        ranges.chain(self.keys.iter().map(key)).collect()
    }
}

fn covers((of, from, through): &(Table, Vec<u8>, Vec<u8>), table: Table, key: &[u8]) -> bool {
    *of == table && key >= from.as_slice() && key <= through.as_slice()
}

struct Task {
    store: Etcd,
    fence: Fence,
    /// The revision at which `commit` was written last.
    last: i64,
    /// Of the last transaction.
    number: u64,
    session_lost: watch::Receiver<bool>,
}

impl Task {
    async fn run(mut self, mut waiting: mpsc::Receiver<Waiting>, deposed: watch::Sender<bool>) {
        let mut session_lost = self.session_lost.clone();
        let mut held = None;
        loop {
            let first = match held.take() {
                Some(first) => first,
                None => tokio::select! {
                    first = waiting.recv() => match first {
                        Some(first) => first,
                        None => return,
                    },
                    _ = session_lost.wait_for(|lost| *lost) => break,
                },
            };
            let Waiting {
                mut operations,
                answer,
            } = first;
            let mut answers = vec![answer];
            while let Ok(next) = waiting.try_recv() {
                if !operations.has_room_for(&next.operations) {
                    held = Some(next);
                    break;
                }
                operations.join(next.operations);
                answers.push(next.answer);
            }
            match self.transact(&operations).await {
                Ok(()) => answers.into_iter().for_each(|answer| drop(answer.send(Ok(())))),
                Err(StoreError::Deposed) => {
                    tracing::warn!(term = %self.fence.term, "a write was refused: another scheduler leads, or may");
                    break;
                }
                Err(error) => {
                    // Who caused it is not known: each hears of it.
                    let text = error.to_string();
                    for answer in answers {
                        let source = chain(&error);
                        drop(answer.send(Err(StoreError::database(self.store.name(), source))));
                    }
                    tracing::error!(error = text, "etcd refused a batch");
                }
            }
        }
        // Whoever waits for an answer hears by its end that this scheduler is deposed.
        deposed.send_replace(true);
    }

    async fn transact(&mut self, operations: &Operations) -> Result<(), StoreError> {
        self.number += 1;
        let keys = &self.store.keys;
        let mark = format!("{}.{}", self.fence.term, self.number).into_bytes();
        let mut success = vec![put(keys.commit(), mark.clone(), 0)];
        success.extend(operations.requests(&self.store));
        let request = TxnRequest {
            compare: vec![
                client::created_at(keys.leader(), self.fence.elected),
                client::written_at(keys.commit(), self.last),
            ],
            success,
            failure: vec![operation(request_op::Request::RequestRange(get(keys.commit())))],
        };
        let mut session_lost = self.session_lost.clone();
        loop {
            let answer = tokio::select! {
                answer = self.store.client.txn(request.clone()) => answer,
                _ = session_lost.wait_for(|lost| *lost) => return Err(StoreError::Deposed),
            };
            match answer {
                Ok(done) if done.succeeded => {
                    self.last = done.header.map_or(0, |header| header.revision);
                    return Ok(());
                }
                // What an earlier try has done, whose answer was lost, is done.
                Ok(refused) => match commit_of(refused) {
                    Some((value, revision)) if value == mark => {
                        self.last = revision;
                        return Ok(());
                    }
                    _ => return Err(StoreError::Deposed),
                },
                Err(CallError::Unclear(what)) => {
                    tracing::warn!(what, "etcd: a batch is sent again");
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error @ CallError::Refused(_)) => return Err(self.store.error(error)),
            }
        }
    }
}

fn commit_of(refused: TxnResponse) -> Option<(Vec<u8>, i64)> {
    let first = refused.responses.into_iter().next()?.response?;
    let response_op::Response::ResponseRange(range) = first else {
        return None;
    };
    let found = range.kvs.into_iter().next()?;
    Some((found.value, found.mod_revision))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

#[cfg(test)]
pub fn count(changes: Vec<Change>) -> Result<usize, StoreError> {
    let mut operations = Operations::default();
    for change in changes {
        operations.add(change)?;
    }
    Ok(operations.count())
}
