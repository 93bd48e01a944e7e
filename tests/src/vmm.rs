//! VMMs driven directly through `vm.proto`, as an agent drives them.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use shoal_proto::vm::vmm_client::VmmClient;
use shoal_proto::vm::{
    BootRequest, GetStatusRequest, MigrationPolicy, MigrationProgress, MigrationReport,
    PrepareIncomingRequest, QuitRequest, ReadConsoleRequest, StartMigrationRequest, VmSpec, VmState,
    VmStatus, WatchMigrationRequest,
};
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::guest::Console;
use crate::paths;

/// The one migration that a pair of VMMs makes here.
pub const MIGRATION: &str = "6d1d3f60-9d0e-4a6e-8f3b-3f6d7f3f0a01";
const TOKEN: &str = "a secret of this migration";
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// A VMM process with a directory of its own; killed in the end.
#[derive(Debug)]
pub struct Vmm {
    directory: tempfile::TempDir,
    child: Child,
    /// Its API.
    pub client: VmmClient<Channel>,
}

impl Vmm {
    /// Starts one.
    pub async fn start() -> Self {
        Self::start_under(&[]).await
    }

    /// Starts one with `words` before the command, such as `ip netns exec NAME`; they must end in an exec.
    pub async fn start_under(words: &[String]) -> Self {
        Self::start_in(tempfile::tempdir().expect("a temporary directory"), words).await
    }

    /// Starts one in a directory of its own that is given.
    pub async fn start_in(directory: tempfile::TempDir, words: &[String]) -> Self {
        let socket = directory.path().join("vmm.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let log = File::create(directory.path().join("vmm.log")).expect("a log");
        let program = paths::program("shoal-vmm").into_os_string();
        let mut words = words.iter().map(Into::into).chain([program]);
        let child = Command::new(words.next().expect("at least the program"))
            .args(words)
            .args(["--allow-faults", "--api-fd", "0"])
            .current_dir(directory.path())
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(log.try_clone().expect("the log again"))
            .stderr(log)
            .spawn()
            .expect("shoal-vmm starts");
        let client = connect(&socket).await.expect("a VMM that answers");
        Self {
            directory,
            child,
            client,
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A directory of its own, gone with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// True once vCPUs have run in it.
    #[must_use]
    pub fn has_run(&self) -> bool {
        self.directory.path().join("ran").exists()
    }

    /// Its state now.
    pub async fn state(&mut self) -> VmState {
        self.client
            .get_status(GetStatusRequest {})
            .await
            .expect("a status")
            .into_inner()
            .state()
    }

    /// Its status now; `None` once the process has gone.
    pub async fn status(&mut self) -> Option<VmStatus> {
        let answer = self.client.get_status(GetStatusRequest {});
        let answer = tokio::time::timeout(PATIENCE, answer).await;
        answer
            .expect("a VMM that answers")
            .ok()
            .map(tonic::Response::into_inner)
    }

    /// Waits until it is in this state.
    pub async fn wait_for_state(&mut self, state: VmState) {
        let what = format!("waited for {}", state.as_str_name());
        self.wait_for_status(&what, |status| status.state() == state)
            .await;
    }

    /// Waits for a status; panics, saying what was waited for, after a while.
    pub async fn wait_for_status(&mut self, what: &str, wanted: impl Fn(&VmStatus) -> bool) {
        let answer = self.client.watch_status(GetStatusRequest {}).await;
        let mut stream = answer.expect("the status").into_inner();
        let found = async {
            let mut last = None;
            while let Ok(Some(status)) = stream.message().await {
                if wanted(&status) {
                    return Ok(());
                }
                last = Some(status);
            }
            Err(last)
        };
        let found = tokio::time::timeout(PATIENCE, found).await;
        assert!(matches!(found, Ok(Ok(()))), "{what}, in vain: {found:?}");
    }

    /// Boots a VM in it.
    pub async fn boot(&mut self, spec: VmSpec) {
        let request = BootRequest { spec: Some(spec) };
        self.client.boot(request).await.expect("booted");
    }

    /// The console since the VM's first boot.
    pub async fn console(&mut self) -> String {
        self.console_until(false, |_| false).await
    }

    /// Follows the console until all of it so far is `enough`.
    pub async fn follow_console(&mut self, enough: impl FnMut(&str) -> bool) -> String {
        self.console_until(true, enough).await
    }

    /// What it has of the console; nothing of a process that does not answer.
    pub async fn console_part(&mut self) -> Console {
        console_part(&mut self.client).await
    }

    async fn console_until(&mut self, follow: bool, mut enough: impl FnMut(&str) -> bool) -> String {
        let request = ReadConsoleRequest {
            from_offset: 0,
            follow,
        };
        let answer = self.client.read_console(request).await;
        let mut stream = answer.expect("the console").into_inner();
        let mut text = String::new();
        while let Some(chunk) = stream.message().await.expect("a chunk") {
            text.push_str(&String::from_utf8_lossy(&chunk.data));
            if enough(&text) {
                break;
            }
        }
        text
    }

    /// Makes it the destination of [`MIGRATION`]. Answers where it listens.
    pub async fn prepare_incoming(&mut self, spec: VmSpec) -> SocketAddr {
        let address = self.prepare(incoming(spec)).await.expect("prepared");
        address.parse().expect("an address")
    }

    /// Makes it a destination. Answers where it listens.
    ///
    /// # Errors
    /// The VMM's.
    pub async fn prepare(&mut self, request: PrepareIncomingRequest) -> Result<String, Status> {
        Ok(self.client.prepare_incoming(request).await?.into_inner().address)
    }

    /// Migrates its VM to where `epoch` was prepared, and watches.
    pub async fn migrate(
        &mut self,
        to: SocketAddr,
        epoch: u64,
        max_downtime: Duration,
        seen: impl FnMut(&MigrationProgress),
    ) -> MigrationReport {
        let request = outgoing(to.to_string(), epoch, max_downtime);
        self.migrate_with(request, seen).await.expect("a report")
    }

    /// Migrates its VM as asked, and watches.
    ///
    /// # Errors
    /// The VMM's; a migration that fails has a report.
    pub async fn migrate_with(
        &mut self,
        request: StartMigrationRequest,
        seen: impl FnMut(&MigrationProgress),
    ) -> Result<MigrationReport, Status> {
        migrate(&mut self.client, request, seen).await
    }

    /// Ends the process, as a crash would.
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }

    /// Has the process end by itself, as an agent does; panics if it does not.
    pub async fn quit(&mut self) {
        // The answer may be cut off by the end.
        drop(self.client.quit(QuitRequest {}).await);
        let end = async {
            while !self.has_ended() {
                tokio::time::sleep(POLL).await;
            }
        };
        let ended = tokio::time::timeout(PATIENCE, end).await;
        assert!(ended.is_ok(), "VMM {} does not end when told to", self.pid());
    }

    /// Whether the process has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    /// How many faults that it was armed with have struck.
    #[must_use]
    pub fn faults_struck(&self) -> usize {
        self.log().matches("FAULT: ").count()
    }

    /// The log, for a test that fails.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("vmm.log")).unwrap_or_default()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of VMM {}:\n{}", self.child.id(), self.log());
        }
        drop(self.child.kill()); // it may have ended
        drop(self.child.wait());
    }
}

/// What a VMM has of its console; nothing of one that does not answer.
pub async fn console_part(client: &mut VmmClient<Channel>) -> Console {
    let request = ReadConsoleRequest {
        from_offset: 0,
        follow: false,
    };
    let mut part = Console::default();
    let answer = tokio::time::timeout(PATIENCE, client.read_console(request)).await;
    let Ok(Ok(answer)) = answer else {
        return part;
    };
    let mut stream = answer.into_inner();
    while let Ok(Ok(Some(chunk))) = tokio::time::timeout(PATIENCE, stream.message()).await {
        if part.bytes.is_empty() {
            part.from = chunk.offset;
        }
        part.bytes.extend_from_slice(&chunk.data);
    }
    part
}

/// Migrates the VM of a VMM as asked, and watches.
///
/// # Errors
/// The VMM's; a migration that fails has a report.
pub async fn migrate(
    client: &mut VmmClient<Channel>,
    request: StartMigrationRequest,
    mut seen: impl FnMut(&MigrationProgress),
) -> Result<MigrationReport, Status> {
    let migration_id = request.migration_id.clone();
    client.start_migration(request).await?;
    let request = WatchMigrationRequest { migration_id };
    let mut stream = client.watch_migration(request).await?.into_inner();
    while let Some(progress) = stream.message().await? {
        seen(&progress);
        if let Some(report) = progress.report {
            return Ok(report);
        }
    }
    Err(Status::unknown("the stream of progress ended without a report"))
}

/// Connects to a VMM's socket.
///
/// # Errors
/// If nothing answers there.
pub async fn connect(socket: &Path) -> Result<VmmClient<Channel>, tonic::transport::Error> {
    let socket = socket.to_owned();
    let channel = Endpoint::from_static("http://vmm.invalid")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await?;
    Ok(VmmClient::new(channel))
}

/// What makes a VMM the destination of [`MIGRATION`], on loopback and in plain text.
#[must_use]
pub fn incoming(spec: VmSpec) -> PrepareIncomingRequest {
    PrepareIncomingRequest {
        spec: Some(spec),
        migration_id: MIGRATION.into(),
        token: TOKEN.into(),
        listen_address: "127.0.0.1:0".into(),
        commit_timeout_ms: 30_000,
        accept_timeout_ms: 0,
        tls: None,
    }
}

/// What starts [`MIGRATION`] to where `epoch` was prepared, with all else as a VMM has it by default.
#[must_use]
pub fn outgoing(to: String, epoch: u64, max_downtime: Duration) -> StartMigrationRequest {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).expect("a sane duration");
    StartMigrationRequest {
        migration_id: MIGRATION.into(),
        token: TOKEN.into(),
        destination_address: to,
        destination_epoch: epoch,
        policy: Some(MigrationPolicy {
            max_downtime_ms: Some(millis(max_downtime)),
            timeout_ms: Some(millis(MIGRATION_TIMEOUT)),
            ..MigrationPolicy::default()
        }),
        tls: None,
    }
}

/// The spec of a probe VM.
#[must_use]
pub fn probe_spec(vm_id: &str, epoch: u64, memory_bytes: u64, cmdline: &str) -> VmSpec {
    let kernel: PathBuf = probe_kernel();
    VmSpec {
        vm_id: vm_id.into(),
        name: "probe".into(),
        epoch,
        cpus: 1,
        memory_bytes,
        kernel_path: kernel.to_string_lossy().into_owned(),
        cmdline: cmdline.into(),
        ..VmSpec::default()
    }
}

/// The probe's kernel file.
#[must_use]
pub fn probe_kernel() -> PathBuf {
    let directory = paths::image("probe");
    let manifest = std::fs::read_to_string(directory.join("image.toml")).expect("a manifest");
    let line = manifest
        .lines()
        .find_map(|line| line.strip_prefix("kernel"))
        .expect("a kernel in it");
    directory.join(line.trim_matches([' ', '=', '"']))
}
