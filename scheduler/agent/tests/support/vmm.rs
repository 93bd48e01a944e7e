//! A VMM that obeys vm.proto and runs nothing. It is told what its "guest" does through its console's input:
//! `say TEXT`, `exit STATUS`, `commit` (the incoming migration), `crash`, `deaf` (to Quit).
//!
//! It lives in the test executable: see [`executable`].

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};

use shoal_proto::vm::vmm_server::{Vmm, VmmServer};
use shoal_proto::vm::*;
use tokio::sync::watch;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, async_trait};

const MARK: &str = "SHOAL_SCRIPTED_VMM";

/// Writes a program that runs the `scripted_vmm` test of this executable as a VMM, and these commands as its self-test.
pub fn executable(dir: &Path, self_test: &str) -> PathBuf {
    let tests = std::env::current_exe().expect("this executable");
    let path = dir.join("scripted-vmm");
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = --self-test ]; then\n{self_test}\nexit\nfi\n\
         {MARK}=1 exec '{}' --exact scripted_vmm --nocapture\n",
        tests.display()
    );
    fs::write(&path, script).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
    path
}

/// The body of the `scripted_vmm` test: does nothing unless it was started as a VMM.
pub fn run_if_started_as_vmm() {
    if std::env::var_os(MARK).is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let stdin = std::io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .expect("standard input");
        let listener = UnixListener::from(stdin);
        listener.set_nonblocking(true).expect("set");
        let listener = tokio::net::UnixListener::from_std(listener).expect("a listening socket");
        let server = tonic::transport::Server::builder().add_service(VmmServer::new(Scripted::default()));
        server
            .serve_with_incoming(UnixListenerStream::new(listener))
            .await
            .expect("served");
    });
}

#[derive(Default)]
struct Scripted {
    vm: watch::Sender<Guest>,
    deaf: AtomicBool,
}

#[derive(Default, Clone)]
struct Guest {
    status: VmStatus,
    console: Vec<u8>,
    acked: usize,
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Scripted {
    fn status(&self) -> VmStatus {
        self.vm.borrow().status.clone()
    }

    fn take_spec(&self, spec: Option<VmSpec>, state: VmState, migration: String) -> Result<(), Status> {
        let spec = spec.ok_or_else(|| Status::invalid_argument("spec: missing"))?;
        if spec.cmdline == "crash" {
            std::process::abort();
        }
        if spec.cmdline == "bad" {
            return Err(Status::invalid_argument("cmdline: it says bad"));
        }
        self.vm.send_modify(|vm| {
            vm.console = spec.cmdline.into_bytes();
            vm.status = VmStatus {
                vm_id: spec.vm_id,
                name: spec.name,
                epoch: spec.epoch,
                memory_bytes: spec.memory_bytes,
                cpus: spec.cpus,
                pid: std::process::id(),
                incoming_migration_id: migration,
                ..VmStatus::default()
            };
            vm.status.set_state(state);
        });
        Ok(())
    }

    fn run(&self) {
        fs::write("ran", "").expect("marked");
        self.vm.send_modify(|vm| vm.status.set_state(VmState::Running));
    }
}

#[async_trait]
impl Vmm for Scripted {
    async fn boot(&self, request: Request<BootRequest>) -> Result<Response<VmStatus>, Status> {
        let spec = request.into_inner().spec;
        for path in spec.iter().map(|spec| &spec.kernel_path) {
            fs::metadata(path).map_err(|_| Status::invalid_argument("kernel_path: no such file"))?;
        }
        self.take_spec(spec, VmState::Empty, String::new())?;
        self.run();
        Ok(Response::new(self.status()))
    }

    async fn prepare_incoming(
        &self,
        request: Request<PrepareIncomingRequest>,
    ) -> Result<Response<PrepareIncomingResponse>, Status> {
        let request = request.into_inner();
        self.take_spec(request.spec, VmState::Incoming, request.migration_id)?;
        Ok(Response::new(PrepareIncomingResponse {
            address: "127.0.0.1:9".into(),
        }))
    }

    async fn abort_incoming(
        &self,
        _: Request<AbortIncomingRequest>,
    ) -> Result<Response<AbortIncomingResponse>, Status> {
        Ok(Response::new(AbortIncomingResponse {
            committed: self.status().state() == VmState::Running,
        }))
    }

    async fn start_migration(
        &self,
        request: Request<StartMigrationRequest>,
    ) -> Result<Response<StartMigrationResponse>, Status> {
        let id = request.into_inner().migration_id;
        self.vm.send_modify(|vm| vm.status.outgoing_migration_id = id);
        Ok(Response::new(StartMigrationResponse {}))
    }

    type WatchMigrationStream = Streamed<MigrationProgress>;
    async fn watch_migration(
        &self,
        request: Request<WatchMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        let migration_id = request.into_inner().migration_id;
        if migration_id != self.status().outgoing_migration_id {
            return Err(Status::not_found("migration_id: there was no such migration"));
        }
        let progress = MigrationProgress {
            migration_id,
            pass: 1,
            ..MigrationProgress::default()
        };
        let first = tokio_stream::once(Ok(progress));
        Ok(Response::new(Box::pin(first.chain(tokio_stream::pending()))))
    }

    async fn cancel_migration(
        &self,
        _: Request<CancelMigrationRequest>,
    ) -> Result<Response<CancelMigrationResponse>, Status> {
        Err(Status::failed_precondition("there is none"))
    }

    async fn set_migration(
        &self,
        _: Request<SetMigrationRequest>,
    ) -> Result<Response<SetMigrationResponse>, Status> {
        Err(Status::not_found("there is none"))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<VmStatus>, Status> {
        let mut status = self.status();
        if status.state() == VmState::Unspecified {
            status.set_state(VmState::Empty);
        }
        status.pid = std::process::id();
        status.console_offset = self.vm.borrow().console.len() as u64;
        Ok(Response::new(status))
    }

    type WatchStatusStream = Streamed<VmStatus>;
    async fn watch_status(
        &self,
        _: Request<GetStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        let changes = WatchStream::new(self.vm.subscribe()).map(|vm| Ok(vm.status));
        Ok(Response::new(Box::pin(changes)))
    }

    async fn pause(&self, _: Request<PauseRequest>) -> Result<Response<VmStatus>, Status> {
        self.vm.send_modify(|vm| vm.status.set_state(VmState::Paused));
        Ok(Response::new(self.status()))
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Result<Response<VmStatus>, Status> {
        self.vm.send_modify(|vm| {
            if vm.status.state() == VmState::Paused {
                vm.status.set_state(VmState::Running);
            }
        });
        Ok(Response::new(self.status()))
    }

    type SampleMemoryStream = Streamed<MemorySample>;
    async fn sample_memory(
        &self,
        request: Request<SampleMemoryRequest>,
    ) -> Result<Response<Self::SampleMemoryStream>, Status> {
        let sample = MemorySample {
            dirty_rate_bytes_per_second: 7 << 20,
            working_set_bytes: 9 << 20,
            interval_ms: request.into_inner().interval_ms,
            ..MemorySample::default()
        };
        let first = tokio_stream::once(Ok(sample));
        Ok(Response::new(Box::pin(first.chain(tokio_stream::pending()))))
    }

    type ReadConsoleStream = Streamed<ConsoleChunk>;
    async fn read_console(
        &self,
        request: Request<ReadConsoleRequest>,
    ) -> Result<Response<Self::ReadConsoleStream>, Status> {
        let request = request.into_inner();
        let mut sent = usize::try_from(request.from_offset).expect("an offset");
        if !request.follow {
            let vm = self.vm.borrow().clone();
            let from = sent.clamp(vm.acked, vm.console.len());
            let chunk = ConsoleChunk {
                offset: from as u64,
                data: vm.console[from..].to_vec(),
            };
            return Ok(Response::new(Box::pin(tokio_stream::once(Ok(chunk)))));
        }
        let chunks = WatchStream::new(self.vm.subscribe()).map(move |vm| {
            sent = sent.clamp(vm.acked, vm.console.len());
            let chunk = ConsoleChunk {
                offset: sent as u64,
                data: vm.console[sent..].to_vec(),
            };
            sent = vm.console.len();
            Ok(chunk)
        });
        Ok(Response::new(Box::pin(chunks)))
    }

    async fn ack_console(
        &self,
        request: Request<AckConsoleRequest>,
    ) -> Result<Response<AckConsoleResponse>, Status> {
        let offset = usize::try_from(request.into_inner().offset).expect("an offset");
        self.vm.send_if_modified(|vm| {
            vm.acked = offset;
            false
        });
        Ok(Response::new(AckConsoleResponse {}))
    }

    async fn write_console(
        &self,
        request: Request<WriteConsoleRequest>,
    ) -> Result<Response<WriteConsoleResponse>, Status> {
        let text = String::from_utf8(request.into_inner().data).expect("text");
        match text.split_once(' ').unwrap_or((&text, "")) {
            ("say", words) => self
                .vm
                .send_modify(|vm| vm.console.extend_from_slice(words.as_bytes())),
            ("exit", status) => self.vm.send_modify(|vm| {
                vm.status.set_state(VmState::Exited);
                vm.status.exit_status = Some(status.parse().expect("a number"));
            }),
            ("commit", _) => self.run(),
            ("deaf", _) => self.deaf.store(true, Ordering::Relaxed),
            ("crash", _) => std::process::abort(),
            _ => return Err(Status::invalid_argument("not in the script")),
        }
        Ok(Response::new(WriteConsoleResponse {}))
    }

    async fn stop(&self, _: Request<StopRequest>) -> Result<Response<VmStatus>, Status> {
        self.vm.send_modify(|vm| vm.status.set_state(VmState::Exited));
        Ok(Response::new(self.status()))
    }

    async fn quit(&self, _: Request<QuitRequest>) -> Result<Response<QuitResponse>, Status> {
        if self.deaf.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        std::process::exit(0);
    }
}
