//! gRPC in front of [`crate::control`]: checks what comes in, turns it into commands and answers into replies.

use std::pin::Pin;
use std::time::Duration;

use shoal_proto::vm::vmm_server::Vmm;
use shoal_proto::vm::{
    AbortIncomingRequest, AbortIncomingResponse, AckConsoleRequest, AckConsoleResponse, BootRequest,
    CancelMigrationRequest, CancelMigrationResponse, ConsoleChunk, GetStatusRequest, MemorySample,
    MigrationProgress, MigrationTls, PauseRequest, PrepareIncomingRequest, PrepareIncomingResponse,
    QuitRequest, QuitResponse, ReadConsoleRequest, ResumeRequest, SampleMemoryRequest, SetMigrationRequest,
    SetMigrationResponse, StartMigrationRequest, StartMigrationResponse, StopRequest, VmStatus,
    WatchMigrationRequest, WriteConsoleRequest, WriteConsoleResponse,
};
use shoal_proto::{Epoch, IdError, MigrationId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _, wrappers::WatchStream};
use tonic::{Request, Response, Status};

use crate::control::{Command, ControlError, ControlHandle, IncomingRequest};
use crate::migration::negotiate::Prepared;
use crate::migration::policy::Policy;
use crate::migration::source::Outgoing;
use crate::migration::transport::{Address, Identity};
use crate::sample::{self, Pace, SampleError};
use crate::spec::VmSpec;

const CONSOLE_CHUNK: usize = 64 * 1024;
/// A reader that has caught up lets this much time pass before it looks again, so that a line is one message.
const CONSOLE_BATCH: Duration = Duration::from_millis(2);
const DEFAULT_COMMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// A source that has been told an address connects at once; one that has not come by then is not coming.
const DEFAULT_ACCEPT_TIMEOUT: Duration = Duration::from_secs(60);
const LONGEST_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);
const MAX_TOKEN: usize = 256;

/// The service. Quit is passed on to whoever runs the server.
#[derive(Debug)]
pub struct Api {
    control: ControlHandle,
    quit: watch::Sender<bool>,
}

impl Api {
    /// In front of `control`; `quit` becomes true on Quit.
    #[must_use]
    pub fn new(control: ControlHandle, quit: watch::Sender<bool>) -> Self {
        Self { control, quit }
    }
}

impl From<ControlError> for Status {
    fn from(error: ControlError) -> Self {
        let message = error.to_string();
        match error {
            ControlError::Spec(_) | ControlError::Policy(_) => Status::invalid_argument(message),
            ControlError::Build(build) if build.is_callers_fault() => Status::invalid_argument(message),
            ControlError::WrongState { .. } | ControlError::TooLate => Status::failed_precondition(message),
            ControlError::UnknownMigration(_) => Status::not_found(message),
            ControlError::Epoch { .. } => Status::aborted(message),
            ControlError::Sample(SampleError::NotOffered) => Status::unimplemented(message),
            ControlError::Sample(SampleError::UnderWay) => Status::failed_precondition(message),
            ControlError::Ending => Status::unavailable(message),
            ControlError::Build(_)
            | ControlError::Kvm(_)
            | ControlError::Listen { .. }
            | ControlError::Thread(_)
            | ControlError::Sample(_)
            | ControlError::Mark(_) => Status::internal(message),
        }
    }
}

fn invalid(error: impl Into<String>) -> Status {
    Status::invalid_argument(error)
}

fn bad_id(error: &IdError) -> Status {
    invalid(error.to_string())
}

fn address(field: &str, text: &str) -> Result<Address, Status> {
    text.parse().map_err(|error| invalid(format!("{field}: {error}")))
}

fn identity(tls: Option<&MigrationTls>) -> Result<Option<Identity>, Status> {
    tls.map(Identity::load)
        .transpose()
        .map_err(|error| invalid(format!("tls.{error}")))
}

fn token(text: String) -> Result<String, Status> {
    if (1..=MAX_TOKEN).contains(&text.len()) {
        Ok(text)
    } else {
        Err(invalid("token: 1 to 256 bytes"))
    }
}

/// 0 means the default; anything beyond a week is a mistake.
fn duration(field: &str, ms: u64, default: Duration) -> Result<Duration, Status> {
    let asked = if ms == 0 {
        default
    } else {
        Duration::from_millis(ms)
    };
    if asked <= LONGEST_LIMIT {
        Ok(asked)
    } else {
        Err(invalid(format!("{field}: {ms} ms is more than a week")))
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Vmm for Api {
    async fn boot(&self, request: Request<BootRequest>) -> Answer<VmStatus> {
        let spec = VmSpec::try_from(request.into_inner().spec).map_err(ControlError::from)?;
        Ok(Response::new(
            self.control
                .ask(|reply| Command::Boot(Box::new(spec), reply))
                .await?,
        ))
    }

    async fn prepare_incoming(
        &self,
        request: Request<PrepareIncomingRequest>,
    ) -> Answer<PrepareIncomingResponse> {
        let request = request.into_inner();
        let incoming = IncomingRequest {
            prepared: Prepared {
                spec: VmSpec::try_from(request.spec).map_err(ControlError::from)?,
                migration_id: request.migration_id.parse().map_err(|error| bad_id(&error))?,
                token: token(request.token)?,
            },
            listen: address("listen_address", &request.listen_address)?,
            commit_timeout: duration(
                "commit_timeout_ms",
                request.commit_timeout_ms,
                DEFAULT_COMMIT_TIMEOUT,
            )?,
            accept_timeout: duration(
                "accept_timeout_ms",
                request.accept_timeout_ms,
                DEFAULT_ACCEPT_TIMEOUT,
            )?,
            identity: identity(request.tls.as_ref())?,
        };
        let address = self
            .control
            .ask(|reply| Command::PrepareIncoming(Box::new(incoming), reply))
            .await?;
        Ok(Response::new(PrepareIncomingResponse {
            address: address.to_string(),
        }))
    }

    async fn abort_incoming(&self, request: Request<AbortIncomingRequest>) -> Answer<AbortIncomingResponse> {
        let id: MigrationId = request
            .into_inner()
            .migration_id
            .parse()
            .map_err(|error| bad_id(&error))?;
        let committed = self
            .control
            .ask(|reply| Command::AbortIncoming(id, reply))
            .await?;
        Ok(Response::new(AbortIncomingResponse { committed }))
    }

    async fn start_migration(
        &self,
        request: Request<StartMigrationRequest>,
    ) -> Answer<StartMigrationResponse> {
        let request = request.into_inner();
        let policy = Policy::default()
            .with(&request.policy.unwrap_or_default())
            .map_err(ControlError::from)?;
        let outgoing = Outgoing {
            migration_id: request.migration_id.parse().map_err(|error| bad_id(&error))?,
            token: token(request.token)?,
            destination: address("destination_address", &request.destination_address)?,
            destination_epoch: Epoch(request.destination_epoch),
            policy,
            identity: identity(request.tls.as_ref())?,
            // Its owner knows.
            paused: false,
        };
        self.control
            .ask(|reply| Command::StartMigration(Box::new(outgoing), reply))
            .await?;
        Ok(Response::new(StartMigrationResponse {}))
    }

    type WatchMigrationStream = Streamed<MigrationProgress>;

    async fn watch_migration(
        &self,
        request: Request<WatchMigrationRequest>,
    ) -> Answer<Self::WatchMigrationStream> {
        let id: MigrationId = request
            .into_inner()
            .migration_id
            .parse()
            .map_err(|error| bad_id(&error))?;
        let id = id.to_string();
        let mut progress = self.control.progress();
        let known = progress
            .borrow()
            .as_ref()
            .is_some_and(|progress| progress.migration_id == id);
        if !known {
            return Err(Status::not_found(format!("migration_id: {id} is not known here")));
        }
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let latest = progress.borrow_and_update().clone();
                let Some(latest) = latest.filter(|latest| latest.migration_id == id) else {
                    return;
                };
                let last = latest.report.is_some();
                if sender.send(Ok(latest)).await.is_err() || last || progress.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn set_migration(&self, request: Request<SetMigrationRequest>) -> Answer<SetMigrationResponse> {
        let request = request.into_inner();
        let id: MigrationId = request.migration_id.parse().map_err(|error| bad_id(&error))?;
        let change = Box::new(request.policy.unwrap_or_default());
        let policy = self
            .control
            .ask(|reply| Command::SetMigration(id, change, reply))
            .await?;
        Ok(Response::new(SetMigrationResponse { policy: Some(policy) }))
    }

    async fn cancel_migration(
        &self,
        request: Request<CancelMigrationRequest>,
    ) -> Answer<CancelMigrationResponse> {
        let id: MigrationId = request
            .into_inner()
            .migration_id
            .parse()
            .map_err(|error| bad_id(&error))?;
        self.control
            .ask(|reply| Command::CancelMigration(id, reply))
            .await?;
        Ok(Response::new(CancelMigrationResponse {}))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Answer<VmStatus> {
        let status = self.control.status().borrow().clone();
        Ok(Response::new(self.control.with_counters(status)))
    }

    type WatchStatusStream = Streamed<VmStatus>;

    async fn watch_status(&self, _: Request<GetStatusRequest>) -> Answer<Self::WatchStatusStream> {
        let control = self.control.clone();
        let stream =
            WatchStream::new(self.control.status()).map(move |status| Ok(control.with_counters(status)));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn pause(&self, request: Request<PauseRequest>) -> Answer<VmStatus> {
        let epoch = Epoch(request.into_inner().epoch);
        Ok(Response::new(
            self.control.ask(|reply| Command::Pause(epoch, reply)).await?,
        ))
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Answer<VmStatus> {
        let epoch = Epoch(request.into_inner().epoch);
        Ok(Response::new(
            self.control.ask(|reply| Command::Resume(epoch, reply)).await?,
        ))
    }

    type SampleMemoryStream = Streamed<MemorySample>;

    async fn sample_memory(&self, request: Request<SampleMemoryRequest>) -> Answer<Self::SampleMemoryStream> {
        let pace = Pace::try_from(request.into_inner()).map_err(|error| invalid(error.to_string()))?;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(sample::stream(self.control.clone(), pace, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type ReadConsoleStream = Streamed<ConsoleChunk>;

    async fn read_console(&self, request: Request<ReadConsoleRequest>) -> Answer<Self::ReadConsoleStream> {
        let request = request.into_inner();
        let control = self.control.clone();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut offset = request.from_offset;
            loop {
                let chunk = control.console().read(offset, CONSOLE_CHUNK);
                if chunk.data.is_empty() {
                    if !request.follow {
                        return;
                    }
                    tokio::select! {
                        () = control.console().wait_past(offset) => tokio::time::sleep(CONSOLE_BATCH).await,
                        () = sender.closed() => return,
                    }
                    continue;
                }
                offset = chunk.offset + chunk.data.len() as u64;
                if sender
                    .send(Ok(ConsoleChunk {
                        offset: chunk.offset,
                        data: chunk.data,
                    }))
                    .await
                    .is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn ack_console(&self, request: Request<AckConsoleRequest>) -> Answer<AckConsoleResponse> {
        self.control.console().acknowledge(request.into_inner().offset);
        Ok(Response::new(AckConsoleResponse {}))
    }

    async fn write_console(&self, request: Request<WriteConsoleRequest>) -> Answer<WriteConsoleResponse> {
        let data = request.into_inner().data;
        let total = data.len();
        let taken = self
            .control
            .ask(|reply| Command::ConsoleInput(data, reply))
            .await?;
        if taken < total {
            let message =
                format!("data: the guest took {taken} of {total} bytes; send the rest once it has read them");
            return Err(Status::resource_exhausted(message));
        }
        Ok(Response::new(WriteConsoleResponse {}))
    }

    async fn stop(&self, _: Request<StopRequest>) -> Answer<VmStatus> {
        let status = self.control.ask(Command::Stop).await?;
        Ok(Response::new(self.control.with_counters(status)))
    }

    async fn quit(&self, _: Request<QuitRequest>) -> Answer<QuitResponse> {
        self.quit.send_replace(true);
        Ok(Response::new(QuitResponse {}))
    }
}

/// Waits until Quit is asked for.
pub async fn quit_requested(mut quit: watch::Receiver<bool>) {
    // The sender lives in the service; gone, the server is ending anyway.
    let _ = quit.wait_for(|&asked| asked).await;
}

/// Boots a VM given on the command line, as if it had been asked for.
///
/// # Errors
/// As [`Command::Boot`].
pub async fn boot(control: &ControlHandle, spec: VmSpec) -> Result<VmStatus, ControlError> {
    control
        .ask(|reply: oneshot::Sender<_>| Command::Boot(Box::new(spec), reply))
        .await
}
