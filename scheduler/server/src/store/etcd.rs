//! The store of several schedulers: etcd, version 3. All schedulers read it; the one that leads writes.
//!
//! - [`Location`]: where it is; `client`: calls, on whichever of its servers answers
//! - `session`: a lease as long as a scheduler lives, and the election of the one that leads
//! - `writer`: the leader's batches, one transaction after the other, each fenced
//!
//! ```text
//! PREFIX/schema           version, in decimal
//! PREFIX/leader           who leads, as JSON; goes with the leader's lease
//! PREFIX/commit           TERM.NUMBER of the last batch
//! PREFIX/members/ID       a scheduler that lives, as JSON; goes with its lease
//! PREFIX/data/TABLE/KEY   records
//! ```

mod client;
mod session;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use tonic::Code;

use super::backend::{Backend, Change, Placed, Record, Snapshot, Table};
use super::backup::BackupError;
use super::{SCHEMA_VERSION, StoreError, Term};
use api::{DeleteRangeRequest, KeyValue, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op};
use client::{CallError, Client};

pub use session::{Lead, Member, Session};

/// The part of etcd's API that is used (`proto/etcd.proto`).
#[allow(
    missing_docs,
    missing_debug_implementations,
    clippy::all,
    clippy::pedantic,
    dead_code
)]
mod api {
    tonic::include_proto!("etcdserverpb");
}

const SCHEME: &str = "etcd://";
const DEFAULT_PREFIX: &str = "shoal";
const MAX_PREFIX: usize = 100;
/// Of a page, until a reply is too large.
const PAGE_RECORDS: i64 = 500;
/// The schema's value while a restore is under way.
const RESTORING: &[u8] = b"restoring";
/// Changes in one transaction of a restore, and their bytes.
const RESTORE_CHANGES: usize = 100;
const RESTORE_BYTES: usize = 512 << 10;

/// Where etcd is, and what part of it is the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// `HOST:PORT` of each server.
    pub servers: Vec<String>,
    /// Before every key, without a slash at the end.
    pub prefix: String,
}

impl Location {
    /// From `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let refuse = |why| StoreError::Location {
            text: crate::limits::shorten(text),
            why,
        };
        let rest = text
            .strip_prefix(SCHEME)
            .ok_or_else(|| refuse("does not begin with etcd://"))?;
        let (servers, prefix) = rest.split_once('/').unwrap_or((rest, DEFAULT_PREFIX));
        let servers: Vec<String> = servers.split(',').map(str::to_owned).collect();
        if servers.iter().any(|server| !is_server(server)) {
            return Err(refuse("names a server that is not HOST:PORT"));
        }
        let prefix = prefix.trim_matches('/');
        let prefix = if prefix.is_empty() { DEFAULT_PREFIX } else { prefix };
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        if prefix.len() > MAX_PREFIX || !prefix.chars().all(fits) {
            return Err(refuse(
                "has a prefix that is too long or not of letters, digits and - _ . /",
            ));
        }
        Ok(Self {
            servers,
            prefix: prefix.to_owned(),
        })
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.servers.join(","), self.prefix)
    }
}

fn is_server(text: &str) -> bool {
    let port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
    let host = |host: &str| {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        match bare {
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => {
                !host.is_empty()
                    && host
                        .chars()
                        .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.')
            }
        }
    };
    text.rsplit_once(':').is_some_and(|(h, p)| host(h) && port(p))
}

/// The keys below a prefix.
#[derive(Debug, Clone)]
struct Keys(Arc<str>);

impl Keys {
    fn named(&self, name: &str) -> Vec<u8> {
        format!("{}/{name}", self.0).into_bytes()
    }

    fn schema(&self) -> Vec<u8> {
        self.named("schema")
    }

    fn leader(&self) -> Vec<u8> {
        self.named("leader")
    }

    fn commit(&self) -> Vec<u8> {
        self.named("commit")
    }

    fn table(&self, table: Table) -> Vec<u8> {
        self.named(&format!("data/{}/", table.name()))
    }

    fn record(&self, table: Table, key: &[u8]) -> Vec<u8> {
        [self.table(table).as_slice(), key].concat()
    }
}

/// The first key that does not begin so.
fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        // Every prefix here ends with a slash.
        *last += 1;
    }
    end
}

fn operation(request: request_op::Request) -> RequestOp {
    RequestOp {
        request: Some(request),
    }
}

fn put(key: Vec<u8>, value: Vec<u8>, lease: i64) -> RequestOp {
    operation(request_op::Request::RequestPut(PutRequest { key, value, lease }))
}

fn delete(key: Vec<u8>, range_end: Vec<u8>) -> RequestOp {
    operation(request_op::Request::RequestDeleteRange(DeleteRangeRequest {
        key,
        range_end,
    }))
}

fn get(key: Vec<u8>) -> RangeRequest {
    RangeRequest {
        key,
        ..RangeRequest::default()
    }
}

/// A store in etcd, for reading. Whoever leads has a [`Lead`] to write with.
#[derive(Debug, Clone)]
pub struct Etcd {
    client: Client,
    keys: Keys,
    name: Arc<str>,
}

impl Etcd {
    /// Connects when it is used.
    pub fn new(location: &Location) -> Result<Self, StoreError> {
        let name: Arc<str> = location.to_string().into();
        let client = Client::new(&location.servers).map_err(|source| StoreError::database(&name, source))?;
        Ok(Self {
            client,
            keys: Keys(location.prefix.as_str().into()),
            name,
        })
    }

    /// Refuses what this program cannot read. True if there is something; false if the store is empty.
    pub async fn check_schema(&self) -> Result<bool, StoreError> {
        let Some(stored) = self.get_key(self.keys.schema()).await? else {
            let prefix = self.keys.named("data/");
            let range = RangeRequest {
                range_end: after_prefix(&prefix),
                limit: 1,
                keys_only: true,
                ..get(prefix)
            };
            let found = self.client.range(range).await.map_err(|e| self.error(e))?;
            return if found.kvs.is_empty() {
                Ok(false)
            } else {
                Err(StoreError::corrupt(&self.name, "the schema version"))
            };
        };
        if stored.value == RESTORING {
            return Err(StoreError::HalfRestored(self.name.to_string()));
        }
        let text = String::from_utf8_lossy(&stored.value);
        match text.parse::<u64>() {
            Ok(SCHEMA_VERSION) => Ok(true),
            Ok(found) if found > SCHEMA_VERSION => Err(StoreError::NewerSchema {
                store: self.name.to_string(),
                found,
            }),
            _ => Err(StoreError::corrupt(&self.name, "the schema version")),
        }
    }

    /// The newest revision of all of etcd: as long as it stays the same, nothing has changed.
    pub async fn revision(&self) -> Result<i64, StoreError> {
        let found = self.client.range(get(self.keys.schema())).await;
        let found = found.map_err(|e| self.error(e))?;
        Ok(found.header.map_or(0, |header| header.revision))
    }

    /// The last term in which something was written.
    pub async fn term(&self) -> Result<Term, StoreError> {
        let commit = self.get_key(self.keys.commit()).await?;
        Ok(commit
            .map_or(Ok((Term(0), 0)), |commit| self.mark(&commit.value))?
            .0)
    }

    /// Every scheduler that lives.
    pub async fn members(&self) -> Result<Vec<Member>, StoreError> {
        let prefix = self.keys.named("members/");
        let range = RangeRequest {
            range_end: after_prefix(&prefix),
            ..get(prefix)
        };
        let found = self.client.range(range).await.map_err(|e| self.error(e))?;
        let members = found.kvs.iter();
        Ok(members
            .filter_map(|kv| serde_json::from_slice(&kv.value).ok())
            .collect())
    }

    /// Replaces all that is stored; the caller has seen that nobody leads. Until it is done the store is refused.
    pub async fn replace(
        &self,
        next: &mut (dyn FnMut() -> Result<Option<Placed>, BackupError> + Send),
        term: Term,
    ) -> Result<(), BackupError> {
        let data = self.keys.named("data/");
        let clear = vec![
            delete(data.clone(), after_prefix(&data)),
            put(self.keys.schema(), RESTORING.to_vec(), 0),
        ];
        self.unfenced(clear).await?;
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some((table, key, value)) = next()? {
            bytes += key.len() + value.len();
            batch.push(put(self.keys.record(table, &key), value, 0));
            if batch.len() >= RESTORE_CHANGES || bytes >= RESTORE_BYTES {
                bytes = 0;
                self.unfenced(std::mem::take(&mut batch)).await?;
            }
        }
        batch.push(put(self.keys.commit(), format!("{term}.0").into_bytes(), 0));
        batch.push(put(
            self.keys.schema(),
            SCHEMA_VERSION.to_string().into_bytes(),
            0,
        ));
        Ok(self.unfenced(batch).await?)
    }

    /// Writes as long as nobody leads.
    async fn unfenced(&self, success: Vec<RequestOp>) -> Result<(), StoreError> {
        let request = TxnRequest {
            compare: vec![client::created_at(self.keys.leader(), 0)],
            success,
            failure: Vec::new(),
        };
        let done = self.client.txn(request).await.map_err(|e| self.error(e))?;
        if done.succeeded {
            Ok(())
        } else {
            Err(StoreError::database(
                &self.name,
                "a scheduler leads and uses this store; stop all of them first",
            ))
        }
    }

    /// TERM.NUMBER.
    fn mark(&self, value: &[u8]) -> Result<(Term, u64), StoreError> {
        let text = String::from_utf8_lossy(value);
        let parsed = text
            .split_once('.')
            .and_then(|(term, number)| Some((Term(term.parse().ok()?), number.parse().ok()?)));
        parsed.ok_or_else(|| StoreError::corrupt(&self.name, "the mark of the last batch ('commit')"))
    }

    async fn get_key(&self, key: Vec<u8>) -> Result<Option<KeyValue>, StoreError> {
        let found = self.client.range(get(key)).await.map_err(|e| self.error(e))?;
        Ok(found.kvs.into_iter().next())
    }

    fn error(&self, error: CallError) -> StoreError {
        StoreError::database(&self.name, error)
    }
}

#[tonic::async_trait]
impl Backend for Etcd {
    fn name(&self) -> &str {
        &self.name
    }

    async fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError> {
        Ok(Box::new(EtcdSnapshot {
            revision: self.revision().await?,
            store: self.clone(),
            limit: AtomicI64::new(PAGE_RECORDS),
        }))
    }

    async fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let found = self.get_key(self.keys.record(table, key)).await?;
        Ok(found.map(|found| found.value))
    }

    async fn commit(&self, _changes: Vec<Change>) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly)
    }
}

struct EtcdSnapshot {
    store: Etcd,
    revision: i64,
    /// Records of a page; halved when a reply is too large.
    limit: AtomicI64,
}

#[tonic::async_trait]
impl Snapshot for EtcdSnapshot {
    async fn page(
        &self,
        table: Table,
        after: Option<&[u8]>,
        keys_only: bool,
    ) -> Result<Vec<Record>, StoreError> {
        let prefix = self.store.keys.table(table);
        let from = match after {
            None => prefix.clone(),
            // The next key that there can be.
            Some(key) => [prefix.as_slice(), key, &[0]].concat(),
        };
        loop {
            let limit = self.limit.load(Ordering::Relaxed);
            let range = RangeRequest {
                range_end: after_prefix(&prefix),
                revision: self.revision,
                limit,
                keys_only,
                ..get(from.clone())
            };
            match self.store.client.range(range).await {
                Ok(found) => {
                    let record = |kv: KeyValue| (kv.key[prefix.len()..].to_vec(), kv.value);
                    return Ok(found.kvs.into_iter().map(record).collect());
                }
                // Either the reply is larger than this client takes, or the revision was compacted away.
                Err(CallError::Refused(status))
                    if status.code() == Code::OutOfRange
                        && !status.message().contains("compacted")
                        && limit > 1 =>
                {
                    self.limit.store(limit / 2, Ordering::Relaxed);
                }
                Err(error) => return Err(self.store.error(error)),
            }
        }
    }
}

#[cfg(test)]
impl Etcd {
    /// Writes a key below the prefix, whoever leads.
    pub async fn set_for_test(&self, name: &str, value: &[u8]) {
        let request = TxnRequest {
            success: vec![put(self.keys.named(name), value.to_vec(), 0)],
            ..TxnRequest::default()
        };
        self.client.txn(request).await.expect("written");
    }
}

/// How many operations changes become.
#[cfg(test)]
pub fn operations_for_test(changes: Vec<Change>) -> Result<usize, StoreError> {
    writer::count(changes)
}
