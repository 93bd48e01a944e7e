//! The schedulers that a node was told of, and which of them it talks to: the one that leads, as soon as it is found.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shoal_proto::LEADER_HEADER;
use shoal_proto::node::registry_client::RegistryClient;
use shoal_secret::Prove;
use tonic::Status;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

/// A client of a scheduler's Registry service. Connects when it is used, and again after a failure.
pub(crate) type Registry = RegistryClient<InterceptedService<Channel, Prove>>;

/// A connection that does not answer for this long is dead.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// All of them, at least one.
#[derive(Debug)]
pub(crate) struct Schedulers {
    told: Vec<Registry>,
    prove: Prove,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    /// Which of those told of.
    index: usize,
    /// Who leads, as one of them has said; it may be none of those told of.
    leader: Option<(String, Registry)>,
}

impl Schedulers {
    /// By their endpoints, `http://HOST:PORT`; nothing is opened yet. The error names the one that is none.
    pub(crate) fn new(endpoints: &[String], prove: &Prove) -> Result<Self, String> {
        let told: Result<Vec<_>, String> = endpoints
            .iter()
            .map(|endpoint| registry(endpoint, prove).map_err(|_| endpoint.clone()))
            .collect();
        let told = told?;
        if told.is_empty() {
            return Err(String::new());
        }
        Ok(Self {
            told,
            prove: prove.clone(),
            current: Mutex::new(Current {
                index: 0,
                leader: None,
            }),
        })
    }

    /// The one to talk to.
    pub(crate) fn current(&self) -> Registry {
        let current = self.lock();
        match &current.leader {
            Some((_, leader)) => leader.clone(),
            None => self.told[current.index].clone(),
        }
    }

    /// All that are known, the one to talk to first.
    pub(crate) fn all(&self) -> Vec<Registry> {
        let index = self.lock().index;
        let mut all = vec![self.current()];
        let (before, after) = self.told.split_at(index);
        all.extend(after.iter().chain(before).cloned());
        all
    }

    /// It refused, or did not answer. True if it has said who leads, so that there is somebody to ask at once.
    pub(crate) fn failed(&self, status: Option<&Status>) -> bool {
        let named = status
            .and_then(|status| status.metadata().get(LEADER_HEADER))
            .and_then(|address| address.to_str().ok())
            .and_then(|address| {
                Some((
                    address.to_owned(),
                    registry(&format!("http://{address}"), &self.prove).ok()?,
                ))
            });
        let mut current = self.lock();
        let is_news = match (&named, &current.leader) {
            (Some((named, _)), Some((known, _))) => named != known,
            (named, _) => named.is_some(),
        };
        if is_news {
            current.leader = named;
        } else {
            current.leader = None;
            current.index = (current.index + 1) % self.told.len();
        }
        is_news
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn registry(endpoint: &str, prove: &Prove) -> Result<Registry, tonic::transport::Error> {
    let channel = Endpoint::from_shared(endpoint.to_owned())?
        .connect_timeout(CONNECT_LIMIT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .connect_lazy();
    Ok(RegistryClient::with_interceptor(channel, prove.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told_of(index: usize, schedulers: &Schedulers) -> bool {
        let current = schedulers.lock();
        current.leader.is_none() && current.index == index
    }

    #[tokio::test]
    async fn each_is_asked_in_turn_until_one_names_the_leader() {
        let endpoints = ["http://127.0.0.1:1", "http://127.0.0.1:2"].map(str::to_owned);
        let schedulers = Schedulers::new(&endpoints, &Prove::default()).expect("endpoints");
        assert!(told_of(0, &schedulers));
        assert!(!schedulers.failed(None));
        assert!(told_of(1, &schedulers));

        let mut refusal = Status::failed_precondition("no");
        let leader = "127.0.0.1:3".parse().expect("a value");
        refusal.metadata_mut().insert(LEADER_HEADER, leader);
        assert!(schedulers.failed(Some(&refusal)), "asked at once");
        assert_eq!(schedulers.lock().leader.as_ref().expect("known").0, "127.0.0.1:3");
        assert_eq!(schedulers.all().len(), 3);
        assert!(
            !schedulers.failed(Some(&refusal)),
            "it names itself: that leads nowhere"
        );
        assert!(told_of(0, &schedulers));
    }

    #[tokio::test]
    async fn endpoints_are_checked() {
        let endpoints = ["http://127.0.0.1:1".to_owned(), "not an endpoint".to_owned()];
        let bad = Schedulers::new(&endpoints, &Prove::default());
        assert_eq!(bad.expect_err("refused"), "not an endpoint");
        assert!(Schedulers::new(&[], &Prove::default()).is_err());
    }
}
