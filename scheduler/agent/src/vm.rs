//! One VMM as the agent knows it: its directory, its process, its socket and its last status.

use std::error::Error;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use shoal_proto::node::VmFacts;
use shoal_proto::vm::vmm_client::VmmClient;
use shoal_proto::vm::{GetStatusRequest, VmState, VmStatus};
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::facts::{self, Usage, UsageMeter};
use crate::key::VmKey;
use crate::process::WatchedProcess;
use crate::runtime_dir::{RuntimeDir, VmRecord};
use crate::sampling::LatestSample;

/// How long a VMM may take to answer a question that needs no work.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// After a broken connection, how long the VMM's end is waited for: it is the better explanation.
const END_NOTICE_LIMIT: Duration = Duration::from_millis(500);

/// One VMM.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) key: VmKey,
    pub(crate) dir: RuntimeDir,
    pub(crate) process: WatchedProcess,
    client: VmmClient<Channel>,
    status: watch::Sender<VmStatus>,
    /// Console bytes before this offset are in the scheduler's log.
    pub(crate) console_acked: watch::Sender<u64>,
    usage: Mutex<UsageMeter>,
    /// How it writes its memory.
    pub(crate) memory_sample: LatestSample,
    retiring: AtomicBool,
}

impl Vm {
    /// Nothing is connected until the first call.
    pub(crate) fn new(
        key: VmKey,
        dir: RuntimeDir,
        process: WatchedProcess,
        record: &VmRecord,
    ) -> io::Result<Self> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", dir.socket_address()));
        let channel = endpoint.map_err(io::Error::other)?.connect_lazy();
        let status = VmStatus {
            vm_id: key.id.to_string(),
            name: record.name.to_string(),
            epoch: key.epoch.0,
            state: VmState::Unspecified.into(),
            memory_bytes: record.memory_bytes,
            cpus: record.cpus,
            pid: process.identity().pid,
            incoming_migration_id: record
                .incoming_migration
                .map(|id| id.to_string())
                .unwrap_or_default(),
            ..VmStatus::default()
        };
        Ok(Self {
            key,
            dir,
            process,
            client: VmmClient::new(channel),
            status: watch::Sender::new(status),
            console_acked: watch::Sender::new(0),
            usage: Mutex::default(),
            memory_sample: LatestSample::default(),
            retiring: AtomicBool::new(false),
        })
    }

    /// A client of the VMM's own service. Cheap; give its calls to [`Self::call`].
    pub(crate) fn client(&self) -> VmmClient<Channel> {
        self.client.clone()
    }

    /// Makes one call with a deadline, and explains a broken connection by the end of the VMM where that is the cause.
    pub(crate) async fn call<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let answer = tokio::select! {
            biased;
            answer = tokio::time::timeout(limit, call) => answer,
            how = self.process.exited() => return Err(self.ended_status(&how)),
        };
        match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.explain(status).await),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "the VMM did not answer within {} s",
                limit.as_secs_f64()
            ))),
        }
    }

    /// The VMM's own words stay as they are; a transport failure is told as what it means.
    pub(crate) async fn explain(&self, status: Status) -> Status {
        if status.source().is_none() {
            return Status::new(status.code(), status.message());
        }
        match tokio::time::timeout(END_NOTICE_LIMIT, self.process.exited()).await {
            Ok(how) => self.ended_status(&how),
            Err(_) => Status::unavailable(format!("the VMM's socket failed: {}", status.message())),
        }
    }

    fn ended_status(&self, how: &str) -> Status {
        let log = self
            .dir
            .last_log_line()
            .map(|line| format!("; its last words: {line}"))
            .unwrap_or_default();
        Status::unavailable(format!("the VMM process ended ({how}){log}"))
    }

    /// Asks the VMM; on failure the last known status stays.
    pub(crate) async fn refresh_status(&self) -> Result<VmStatus, Status> {
        let mut client = self.client();
        let status = self
            .call(ANSWER_LIMIT, client.get_status(GetStatusRequest {}))
            .await?;
        self.set_status(status.clone());
        Ok(status)
    }

    /// The last known status.
    pub(crate) fn status(&self) -> VmStatus {
        self.status.borrow().clone()
    }

    /// The last known state.
    pub(crate) fn state(&self) -> VmState {
        self.status.borrow().state()
    }

    /// Remembers what the VMM said of itself. Identity stays what the directory says.
    pub(crate) fn set_status(&self, mut status: VmStatus) {
        status.vm_id = self.key.id.to_string();
        status.epoch = self.key.epoch.0;
        status.pid = self.process.identity().pid;
        self.status.send_modify(|known| {
            if status.name.is_empty() {
                status.name = std::mem::take(&mut known.name);
            }
            *known = status;
        });
    }

    /// Says why the VMM is gone, unless the status already tells that the VM had ended.
    pub(crate) fn set_gone(&self, how: &str) {
        let log = self
            .dir
            .last_log_line()
            .map(|line| format!("; last line of its log: {line}"))
            .unwrap_or_default();
        self.status.send_modify(|known| {
            if !matches!(
                known.state(),
                VmState::Exited | VmState::Failed | VmState::Migrated
            ) {
                known.status_message = format!("the VMM process is gone: {how}{log}");
            }
        });
    }

    pub(crate) fn watch_status(&self) -> watch::Receiver<VmStatus> {
        self.status.subscribe()
    }

    /// Everything the scheduler wants to know, as of now.
    pub(crate) fn facts(&self) -> VmFacts {
        let alive = !self.process.is_gone();
        if !alive {
            return VmFacts {
                status: Some(self.status()),
                ran_here: self.dir.has_run(),
                ..VmFacts::default()
            };
        }
        let usage = self.meter().latest();
        let sample = self.memory_sample.get(Instant::now());
        VmFacts {
            status: Some(self.status()),
            vmm_alive: true,
            resident_bytes: facts::resident_bytes(self.process.identity().pid),
            cpu_use: usage.cpu_use,
            ran_here: self.dir.has_run(),
            cpu_steal: usage.cpu_steal,
            dirty_rate_bytes_per_second: sample.map(|sample| sample.dirty_rate_bytes_per_second),
            working_set_bytes: sample.map(|sample| sample.working_set_bytes),
            read_bytes_per_second: usage.read_rate,
            write_bytes_per_second: usage.write_rate,
            handle: 0,
            cpu_demand: usage.cpu_demand.map(|demand| demand.mean),
            cpu_demand_error: usage.cpu_demand.map(|demand| demand.error),
        }
    }

    /// Samples what the process uses.
    pub(crate) fn sample_usage(&self, now: Instant) -> Usage {
        if self.process.is_gone() {
            return Usage::default();
        }
        self.meter().sample(self.process.identity().pid, now)
    }

    fn meter(&self) -> std::sync::MutexGuard<'_, UsageMeter> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The scheduler has the console up to this offset.
    pub(crate) fn acknowledge_console(&self, offset: u64) {
        self.console_acked.send_if_modified(|acked| {
            let newer = offset > *acked;
            *acked = offset.max(*acked);
            newer
        });
    }

    /// Being destroyed: its end is nothing to report.
    pub(crate) fn is_retiring(&self) -> bool {
        self.retiring.load(Ordering::Relaxed)
    }

    pub(crate) fn set_retiring(&self, retiring: bool) {
        self.retiring.store(retiring, Ordering::Relaxed);
    }
}
