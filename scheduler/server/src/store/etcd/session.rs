//! A scheduler in etcd: a lease that it keeps alive, its entry among the members, and the lead, if it has it.
//!
//! The lead is the key `leader`, which goes with the lease of whoever wrote it. Who holds the lead knows it lost by its own
//! clock before etcd lets another have it; and should the clock have stood still, the fence refuses what it writes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::api::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseRevokeRequest, TxnRequest,
};
use super::client::{self, Client};
use super::writer::{Fence, Writer};
use super::{Etcd, get, operation, put, request_op};
use crate::store::{SCHEMA_VERSION, Store, StoreError, Term};

/// A leader gives up so long before its lease may have ended.
const MARGIN: Duration = Duration::from_millis(500);
/// So many signs of life within a lease.
const BEATS: u32 = 5;

/// A scheduler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Of this run of it.
    pub id: String,
    /// Where users and agents reach it.
    pub address: String,
    /// When it started.
    pub started_unix_ms: i64,
}

/// The scheduler that leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    /// Which.
    pub member: Member,
    /// In which term.
    pub term: u64,
    /// Since when.
    pub since_unix_ms: i64,
}

/// A lease that is kept alive.
#[derive(Debug)]
pub struct Session {
    store: Etcd,
    member: Member,
    lease: i64,
    lost: watch::Sender<bool>,
    beats: JoinHandle<()>,
}

/// The right to write, as long as it lasts.
#[derive(Debug)]
pub struct Lead {
    /// What to write with.
    pub store: Store,
    /// Which lead this is.
    pub term: Term,
    deposed: watch::Receiver<bool>,
}

impl Etcd {
    /// Becomes one of the members, with a lease of this length.
    pub async fn join(&self, member: Member, ttl: Duration) -> Result<Session, StoreError> {
        let begun = Instant::now();
        let request = LeaseGrantRequest {
            ttl: i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX),
            id: 0,
        };
        let mut client = self.client.lease();
        let granted = self.client.call(client.lease_grant(request)).await;
        let granted = granted.map_err(|e| self.error(e))?;
        let lease = granted.id;
        // etcd may grant a longer one than was asked for.
        let ttl = Duration::from_secs(u64::try_from(granted.ttl).unwrap_or(0));
        let lost = watch::Sender::new(false);
        let beats = tokio::spawn(keep_alive(self.client.clone(), lease, ttl, begun, lost.clone()));
        let session = Session {
            store: self.clone(),
            member,
            lease,
            lost,
            beats,
        };
        let key = self.keys.named(&format!("members/{}", session.member.id));
        let entry = serde_json::to_vec(&session.member)?;
        let request = TxnRequest {
            success: vec![put(key, entry, lease)],
            ..TxnRequest::default()
        };
        self.client.txn(request).await.map_err(|e| self.error(e))?;
        Ok(session)
    }

    /// Who leads, if one does.
    pub async fn leader(&self) -> Result<Option<Leader>, StoreError> {
        let found = self.get_key(self.keys.leader()).await?;
        Ok(found.and_then(|found| serde_json::from_slice(&found.value).ok()))
    }
}

impl Session {
    /// Takes the lead, if nobody has it. Once it was given, a second time is an error: the session is to be left.
    pub async fn campaign(&self) -> Result<Option<Lead>, StoreError> {
        let (store, keys) = (&self.store, &self.store.keys);
        match store.leader().await? {
            // An election whose answer was lost, and with it what to write with: the lease has to be given back.
            Some(leader) if leader.member.id == self.member.id => return Err(StoreError::Deposed),
            Some(_) => return Ok(None),
            None => {}
        }
        let has_schema = store.check_schema().await?;
        let commit = store.get_key(keys.commit()).await?;
        let (last, written) = match &commit {
            None => (Term(0), 0),
            Some(commit) => (store.mark(&commit.value)?.0, commit.mod_revision),
        };
        let term = last.next();
        let leader = Leader {
            member: self.member.clone(),
            term: term.0,
            since_unix_ms: crate::record::now_unix_ms(),
        };
        let mut success = vec![
            put(keys.leader(), serde_json::to_vec(&leader)?, self.lease),
            put(keys.commit(), format!("{term}.0").into_bytes(), 0),
        ];
        if !has_schema {
            let version = SCHEMA_VERSION.to_string().into_bytes();
            success.push(put(keys.schema(), version, 0));
        }
        let request = TxnRequest {
            compare: vec![
                client::created_at(keys.leader(), 0),
                client::written_at(keys.commit(), written),
            ],
            success,
            failure: vec![operation(request_op::Request::RequestRange(get(keys.leader())))],
        };
        let done = store.client.txn(request).await.map_err(|e| store.error(e))?;
        if !done.succeeded {
            return Ok(None);
        }
        let fence = Fence {
            term,
            elected: done.header.map_or(0, |header| header.revision),
        };
        let (writer, deposed) = Writer::start(store.clone(), fence, self.lost.subscribe());
        Ok(Some(Lead {
            store: Store::new(Arc::new(writer), term),
            term,
            deposed,
        }))
    }

    /// Completes when the lease has ended, or may have.
    pub async fn lost(&self) {
        let mut lost = self.lost.subscribe();
        // There is no error while the session holds the other end.
        let _ = lost.wait_for(|lost| *lost).await;
    }

    /// Leaves at once, so that nobody has to wait for the end of the lease.
    pub async fn leave(self) {
        self.beats.abort();
        let request = LeaseRevokeRequest { id: self.lease };
        let mut client = self.store.client.lease();
        if let Err(error) = self.store.client.call(client.lease_revoke(request)).await {
            tracing::info!(%error, "the lease is left to end by itself");
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.beats.abort();
        self.lost.send_replace(true);
    }
}

impl Lead {
    /// Completes when the lead is lost.
    pub async fn deposed(&self) {
        let mut deposed = self.deposed.clone();
        let _ = deposed.wait_for(|deposed| *deposed).await;
    }
}

/// Keeps a lease alive until it cannot be known that it is.
async fn keep_alive(
    client: Client,
    lease: i64,
    ttl: Duration,
    mut alive_from: Instant,
    lost: watch::Sender<bool>,
) {
    let beat = ttl / BEATS;
    let patience = ttl.saturating_sub(MARGIN);
    loop {
        let until = tokio::time::Instant::from_std(alive_from + patience);
        let stream = Beats::open(&client, lease);
        let Ok(opened) = tokio::time::timeout_at(until, stream).await else {
            break;
        };
        let mut stream = match opened {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "the lease in etcd is not kept alive");
                client.next_server();
                tokio::time::sleep(beat / 2).await;
                continue;
            }
        };
        loop {
            let until = tokio::time::Instant::from_std(alive_from + patience);
            let sent = Instant::now();
            match tokio::time::timeout_at(until.min(tokio::time::Instant::now() + beat * 2), stream.beat())
                .await
            {
                Ok(Ok(answer)) if answer.ttl > 0 => alive_from = sent,
                Ok(Ok(_)) => {
                    tracing::warn!("the lease in etcd has ended");
                    lost.send_replace(true);
                    return;
                }
                Ok(Err(_)) | Err(_) => {
                    client.next_server();
                    break;
                }
            }
            tokio::time::sleep(beat).await;
        }
        if alive_from.elapsed() >= patience {
            break;
        }
    }
    tracing::warn!("etcd does not answer, and the lease may have ended");
    lost.send_replace(true);
}

struct Beats {
    lease: i64,
    sender: mpsc::Sender<LeaseKeepAliveRequest>,
    answers: tonic::Streaming<LeaseKeepAliveResponse>,
}

impl Beats {
    async fn open(client: &Client, lease: i64) -> Result<Self, tonic::Status> {
        let (sender, requests) = mpsc::channel(1);
        // etcd answers the headers of the stream with its first message.
        sender
            .send(LeaseKeepAliveRequest { id: lease })
            .await
            .map_err(|_| tonic::Status::internal("closed"))?;
        let answers = client
            .lease()
            .lease_keep_alive(ReceiverStream::new(requests))
            .await?
            .into_inner();
        let mut beats = Self {
            lease,
            sender,
            answers,
        };
        beats.answer().await?;
        Ok(beats)
    }

    async fn beat(&mut self) -> Result<LeaseKeepAliveResponse, tonic::Status> {
        let request = LeaseKeepAliveRequest { id: self.lease };
        self.sender
            .send(request)
            .await
            .map_err(|_| tonic::Status::unavailable("closed"))?;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<LeaseKeepAliveResponse, tonic::Status> {
        self.answers
            .message()
            .await?
            .ok_or_else(|| tonic::Status::unavailable("etcd closed the stream"))
    }
}

#[cfg(test)]
impl Session {
    /// As a process that was stopped: no sign of life follows, and its own clock does not run.
    pub fn stand_still_for_test(self) -> Self {
        self.beats.abort();
        self
    }
}
