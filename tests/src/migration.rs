//! A migration that is watched while it runs.

use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use shoal_proto::cluster::cluster_client::ClusterClient;
use shoal_proto::cluster::{MigrateVmRequest, Migration};
use shoal_proto::vm::{MigrationPhase, MigrationProgress, MigrationReport};
use tonic::Status;

use crate::wait;

/// A migration that was asked for through the API, and what was heard of it so far.
#[derive(Debug)]
pub struct WatchedMigration {
    latest: Arc<Mutex<MigrationProgress>>,
    watcher: JoinHandle<Result<Option<Migration>, Status>>,
}

impl WatchedMigration {
    /// Asks for it.
    #[must_use]
    pub fn start(endpoint: &str, request: MigrateVmRequest) -> Self {
        let latest = Arc::new(Mutex::new(MigrationProgress::default()));
        let (endpoint, heard) = (endpoint.to_owned(), Arc::clone(&latest));
        let watcher = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(watch(endpoint, request, &heard))
        });
        Self { latest, watcher }
    }

    /// What was heard last.
    #[must_use]
    pub fn progress(&self) -> MigrationProgress {
        self.latest.lock().expect("no panic elsewhere").clone()
    }

    /// Waits until it is in pre-copy and has sent so many bytes.
    pub fn wait_until_sent(&self, bytes: u64, limit: Duration) {
        wait::until("pages to be sent in pre-copy", limit, || {
            let progress = self.progress();
            let ended = self.has_ended();
            assert!(
                !ended,
                "the migration ended before it was in the middle of pre-copy: {progress:?}"
            );
            (progress.phase() == MigrationPhase::PreCopy && progress.bytes_sent >= bytes).then_some(())
        });
    }

    /// Whether its stream has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.watcher.is_finished()
    }

    /// How it ended, as its stream told.
    ///
    /// # Errors
    /// The status, if the stream broke or the migration was refused.
    pub fn outcome(self) -> Result<Migration, Status> {
        let outcome = self.watcher.join().expect("the watcher");
        outcome.map(|migration| migration.expect("an outcome at the end of the stream"))
    }

    /// The report of a migration that must have ended with one.
    #[must_use]
    pub fn report(self) -> MigrationReport {
        self.outcome()
            .expect("an outcome")
            .report
            .expect("a report in the outcome")
    }
}

async fn watch(
    endpoint: String,
    request: MigrateVmRequest,
    latest: &Mutex<MigrationProgress>,
) -> Result<Option<Migration>, Status> {
    let connected = ClusterClient::connect(endpoint).await;
    let mut client = connected.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut stream = client.migrate_vm(request).await?.into_inner();
    let mut outcome = None;
    while let Some(message) = stream.message().await? {
        if let Some(progress) = message.progress {
            *latest.lock().expect("no panic elsewhere") = progress;
        }
        outcome = message.outcome.or(outcome);
    }
    Ok(outcome)
}
