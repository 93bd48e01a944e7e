//! Calls to etcd: on the server that answered last, and on the next after one did not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use super::api::kv_client::KvClient;
use super::api::lease_client::LeaseClient;
use super::api::{Compare, RangeRequest, RangeResponse, TxnRequest, TxnResponse, compare};

const CONNECT_TIME: Duration = Duration::from_secs(1);
/// For one call. An election of etcd's own takes a second.
const CALL_TIME: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(200);
/// Tries of what can be asked again, beyond one on each server.
const MORE_TRIES: usize = 3;
/// Pages are made smaller until they are no larger than this.
const MAX_REPLY: usize = 32 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It was not done.
    #[error("etcd: {}", .0.message())]
    Refused(Box<Status>),
    /// No answer, or one that does not tell whether it was done.
    #[error("etcd gives no clear answer: {0}")]
    Unclear(String),
}

impl CallError {
    fn of(status: Status) -> Self {
        match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented => Self::Refused(Box::new(status)),
            _ => Self::Unclear(crate::limits::shorten(status.message())),
        }
    }
}

/// All servers of one etcd.
#[derive(Debug, Clone)]
pub struct Client {
    channels: Arc<[Channel]>,
    current: Arc<AtomicUsize>,
}

impl Client {
    /// For servers by `HOST:PORT`.
    pub fn new(servers: &[String]) -> Result<Self, tonic::transport::Error> {
        let channel = |server: &String| {
            let endpoint = Endpoint::from_shared(format!("http://{server}"))?
                .connect_timeout(CONNECT_TIME)
                .tcp_nodelay(true)
                // etcd takes it amiss if it is asked more often than each 5 s.
                .http2_keep_alive_interval(Duration::from_secs(6))
                .keep_alive_timeout(Duration::from_secs(2));
            Ok(endpoint.connect_lazy())
        };
        Ok(Self {
            channels: servers.iter().map(channel).collect::<Result<_, _>>()?,
            current: Arc::default(),
        })
    }

    /// Reads, and asks again where there is no answer.
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse, CallError> {
        let mut tries = self.channels.len() + MORE_TRIES;
        loop {
            let mut kv = KvClient::new(self.channel()).max_decoding_message_size(MAX_REPLY);
            match self.call(kv.range(request.clone())).await {
                Err(CallError::Unclear(_)) if tries > 1 => {
                    tries -= 1;
                    tokio::time::sleep(PAUSE).await;
                }
                other => return other,
            }
        }
    }

    /// A transaction, tried once.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, CallError> {
        let mut kv = KvClient::new(self.channel()).max_decoding_message_size(MAX_REPLY);
        self.call(kv.txn(request)).await
    }

    /// For calls about leases.
    pub fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel())
    }

    /// Waits for an answer, and takes the next server for the next call if there is none.
    pub async fn call<T>(
        &self,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CallError> {
        let result = match tokio::time::timeout(CALL_TIME, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(CallError::of(status)),
            Err(_) => Err(CallError::Unclear(format!("nothing within {CALL_TIME:?}"))),
        };
        if matches!(result, Err(CallError::Unclear(_))) {
            self.next_server();
        }
        result
    }

    /// From now on asks another server.
    pub fn next_server(&self) {
        self.current.fetch_add(1, Ordering::Relaxed);
    }

    fn channel(&self) -> Channel {
        self.channels[self.current.load(Ordering::Relaxed) % self.channels.len()].clone()
    }
}

/// The key was created at this revision; 0: it is not there.
pub fn created_at(key: Vec<u8>, revision: i64) -> Compare {
    Compare {
        result: compare::CompareResult::Equal.into(),
        target: compare::CompareTarget::Create.into(),
        key,
        target_union: Some(compare::TargetUnion::CreateRevision(revision)),
    }
}

/// The key was written last at this revision; 0: it is not there.
pub fn written_at(key: Vec<u8>, revision: i64) -> Compare {
    Compare {
        result: compare::CompareResult::Equal.into(),
        target: compare::CompareTarget::Mod.into(),
        key,
        target_union: Some(compare::TargetUnion::ModRevision(revision)),
    }
}
