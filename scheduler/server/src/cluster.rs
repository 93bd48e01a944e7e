//! One of several schedulers: follows until it is elected, leads until it is deposed, and begins again.
//!
//! What a scheduler does while it leads, and while it follows, runs on threads of its own, and ends with them: a leader that
//! was deposed cannot go on with anything, whatever it had begun. Should a call of it be under way to an agent, the agent
//! refuses it by its term; should a write be, the store does.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use shoal_secret::Prove;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::api::Role;
use crate::follower::Follower;
use crate::images::mirror;
use crate::schedulers::Schedulers;
use crate::server::{self, Base, ServerError};
use crate::store::StoreError;
use crate::store::etcd::{Etcd, Lead, Location, Member, Session};

/// How often a scheduler that follows looks whether someone leads.
const LOOK: Duration = Duration::from_millis(500);
/// Between two tries where etcd does not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// Why a phase is over.
enum End {
    /// This scheduler is to end.
    Shutdown,
    /// To begin again.
    Again,
}

/// Runs until the shutdown.
pub async fn run(base: &Arc<Base>, url: &str) -> Result<(), ServerError> {
    let lease = base.config.lease;
    if !(Duration::from_secs(2)..=Duration::from_secs(60)).contains(&lease) {
        return Err(ServerError::Lease(lease));
    }
    if base.address.ip().is_unspecified() {
        return Err(ServerError::NotReachable(base.address));
    }
    let etcd = Etcd::new(&Location::parse(url)?)?;
    // So that a store that cannot be used is said at once, and an etcd that is away is not.
    match etcd.check_schema().await {
        Err(error @ StoreError::Database { .. }) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "store; trying again");
        }
        checked => drop(checked?),
    }
    loop {
        if *base.shutdown.borrow() {
            return Ok(());
        }
        let own = Member {
            id: Uuid::new_v4().to_string(),
            address: base.address.to_string(),
            started_unix_ms: base.started_unix_ms,
        };
        match etcd.join(own.clone(), lease).await {
            Ok(session) => {
                let end = live(base, &etcd, &own, &session).await;
                session.leave().await;
                match end {
                    Ok(End::Shutdown) => return Ok(()),
                    Ok(End::Again) => {}
                    // It may come again.
                    Err(ServerError::Store(error @ (StoreError::Database { .. } | StoreError::Deposed))) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "store; beginning again");
                    }
                    Err(error) => return Err(error),
                }
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "etcd; trying again");
            }
        }
        let mut shutdown = base.shutdown.clone();
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            _ = shutdown.wait_for(|ended| *ended) => {}
        }
    }
}

/// Follows, then leads, as long as the lease lasts.
async fn live(base: &Arc<Base>, etcd: &Etcd, own: &Member, session: &Session) -> Result<End, ServerError> {
    let schedulers = |follows| Schedulers::Cluster {
        etcd: etcd.clone(),
        own: own.clone(),
        follows,
    };
    let mut shutdown = base.shutdown.clone();
    let lead = {
        let follower = Arc::new(Follower::new(Arc::clone(base), etcd.clone(), schedulers(true)));
        tracing::info!(address = %base.address, "scheduler follows");
        let mut phase = Phase::start(follow(follower))?;
        tokio::select! {
            lead = campaign(session) => lead?,
            () = session.lost() => return Ok(End::Again),
            _ = shutdown.wait_for(|ended| *ended) => return Ok(End::Shutdown),
            ended = phase.ended() => {
                ended?;
                return Ok(End::Again);
            }
        }
    };
    tracing::info!(address = %base.address, term = %lead.term, "scheduler is elected");
    let mut phase = Phase::start(begin_to_lead(
        Arc::clone(base),
        lead.store.clone(),
        schedulers(false),
    ))?;
    tokio::select! {
        ended = phase.ended() => {
            ended?;
            Ok(End::Shutdown)
        }
        () = lead.deposed() => {
            tracing::warn!(term = %lead.term, "scheduler is deposed, and lets go of all it had begun");
            Ok(End::Again)
        }
    }
}

async fn campaign(session: &Session) -> Result<Lead, StoreError> {
    loop {
        match session.campaign().await {
            Ok(Some(lead)) => return Ok(lead),
            Ok(None) => {}
            Err(error @ StoreError::Database { .. }) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "election");
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn follow(follower: Arc<Follower>) -> Result<(), ServerError> {
    let base = Arc::clone(follower.base());
    tokio::spawn(mirror::run(
        follower.blob_directory(),
        follower.schedulers().clone(),
        Prove::new(base.config.cluster_secret.as_ref()),
        {
            let follower = Arc::clone(&follower);
            move || {
                let follower = Arc::clone(&follower);
                async move { follower.blobs().await }
            }
        },
    ));
    server::serve_metrics(&base, None)?;
    server::serve_grpc(&base, Role::Follower(follower)).await
}

async fn begin_to_lead(
    base: Arc<Base>,
    store: crate::store::Store,
    schedulers: Schedulers,
) -> Result<(), ServerError> {
    let contents = store.load().await?;
    server::lead(base, store, contents, schedulers).await
}

/// Work on threads of its own, all of which ends when this is dropped.
struct Phase {
    runtime: Option<Runtime>,
    work: JoinHandle<Result<(), ServerError>>,
}

impl Phase {
    fn start(
        work: impl Future<Output = Result<(), ServerError>> + Send + 'static,
    ) -> Result<Self, ServerError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .thread_name("shoal-phase")
            .build()
            .map_err(ServerError::Threads)?;
        let work = runtime.spawn(work);
        Ok(Self {
            runtime: Some(runtime),
            work,
        })
    }

    async fn ended(&mut self) -> Result<(), ServerError> {
        (&mut self.work).await?
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Every task is dropped where it next waits.
            runtime.shutdown_background();
        }
    }
}
