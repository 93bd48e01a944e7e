//! For unit tests of what real processes cannot be made to do on demand: an agent whose answers are scripted, served over
//! real gRPC, and a scheduler on a temporary state directory.

use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shoal_plan::KvmKind;
use shoal_proto::node::agent_server::{Agent, AgentServer};
use shoal_proto::node::{
    AbortIncomingRequest, AbortIncomingResponse, CancelMigrationRequest, CancelMigrationResponse,
    DestroyVmResponse, Heartbeat, LaunchVmRequest, PrepareIncomingRequest, PrepareIncomingResponse,
    SetMigrationRequest, StartMigrationRequest, StartMigrationResponse, VmFacts, VmRef,
    WatchMigrationRequest, WriteConsoleRequest, WriteConsoleResponse,
};
use shoal_proto::vm::{self, MigrationProgress, MigrationReport, MigrationResult, VmState, VmStatus};
use shoal_proto::{Epoch, VmId};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::config::Settings;
use crate::observe;
use crate::reconcile;
use crate::record::{BlobRef, Cordon, NodeRecord, Phase, Runs, VmRecord, now_unix_ms};
use crate::scheduler::Shared;

/// What becomes of the next migration that starts on a fake node.
#[derive(Debug, Clone, Default)]
pub enum Script {
    /// The destination runs the VM.
    #[default]
    Complete,
    /// The source gives up before Commit.
    Fail,
    /// Commit is sent, arrives or not, and is not answered.
    InDoubt { commit_arrives: bool },
    /// It goes on until it is cancelled.
    GoOn,
    /// The destination runs the VM and misses memory until [`FakeNode::end_post_copy`].
    PostCopy,
}

#[derive(Debug, Default)]
struct FakeVm {
    state: VmState,
    ran: bool,
    outgoing: String,
    report: Option<MigrationReport>,
    exit_status: Option<u32>,
    missing_bytes: u64,
    link_lost: bool,
    dead: bool,
    /// Its outgoing migration began with it paused.
    paused: bool,
    /// Policies that its outgoing migration was told, the one at the start first.
    policies: Vec<vm::MigrationPolicy>,
}

#[derive(Debug, Default)]
struct State {
    vms: HashMap<(String, u64), FakeVm>,
    fenced: HashSet<(String, u64)>,
    /// Every call gets no answer.
    silent: bool,
    /// From the next preparation on.
    silent_once_prepared: bool,
    /// The next launch is done, or not, and not answered.
    lose_launch: Option<bool>,
    script: Script,
    resumed: u32,
    refuse_launches: bool,
}

/// A node with a scripted agent.
#[derive(Debug, Clone)]
pub struct FakeNode {
    state: Arc<Mutex<State>>,
    peers: Arc<Mutex<Vec<FakeNode>>>,
    pub record: NodeRecord,
}

impl FakeNode {
    /// Registers again, with or without a certificate.
    pub fn set_migration_tls(&self, scheduler: &Shared, migration_tls: bool) {
        let record = NodeRecord {
            migration_tls,
            ..self.record.clone()
        };
        self.register_as(scheduler, record);
    }

    /// Registers again, with KVM of this kind.
    pub fn set_kvm(&self, scheduler: &Shared, kvm: KvmKind) {
        let record = NodeRecord {
            kvm: Some(kvm),
            ..self.record.clone()
        };
        self.register_as(scheduler, record);
    }

    /// Registers again, at an address where nobody listens: as its agent has died since it reported.
    pub fn lose_agent(&self, scheduler: &Shared) {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let record = NodeRecord {
            address: free.local_addr().expect("bound").to_string(),
            ..self.record.clone()
        };
        drop(free);
        self.register_as(scheduler, record);
    }

    fn register_as(&self, scheduler: &Shared, record: NodeRecord) {
        let entry = scheduler.nodes.get(&record.name).expect("registered");
        let (sender, _) = mpsc::channel(1);
        entry.begin_session(record, 2, sender).expect("an address");
        self.report(scheduler);
    }

    pub fn set_silent(&self, silent: bool) {
        self.lock().silent = silent;
    }

    /// The network to this node is cut right after it has prepared for the next migration.
    pub fn silence_once_prepared(&self) {
        self.lock().silent_once_prepared = true;
    }

    /// Every guest here powers off.
    pub fn guests_exit(&self, status: u32) {
        for vm in self.lock().vms.values_mut() {
            vm.state = VmState::Exited;
            vm.exit_status = Some(status);
        }
    }

    /// As a host does that was started again.
    pub fn lose_everything(&self) {
        self.lock().vms.clear();
    }

    pub fn set_script(&self, script: Script) {
        self.lock().script = script;
    }

    pub fn lose_next_launch(&self, done: bool) {
        self.lock().lose_launch = Some(done);
    }

    /// The source here says, and the destination sees, that nothing is missing any more.
    pub fn end_post_copy(&self) {
        for peer in self.peers() {
            for vm in peer.lock().vms.values_mut() {
                vm.missing_bytes = 0;
            }
        }
        for vm in self.lock().vms.values_mut() {
            if vm.state == VmState::PostCopy {
                vm.state = VmState::Migrated;
                vm.report = Some(report(&vm.outgoing, MigrationResult::Completed));
            }
        }
    }

    /// Every VM here that misses memory has lost the source.
    pub fn lose_links(&self) {
        for vm in self.lock().vms.values_mut() {
            vm.link_lost = vm.missing_bytes > 0;
        }
    }

    /// Every VMM process here dies.
    pub fn kill_vmms(&self) {
        for vm in self.lock().vms.values_mut() {
            vm.dead = true;
        }
    }

    /// What the outgoing migration here was told, the policy at its start first.
    pub fn told(&self) -> Vec<vm::MigrationPolicy> {
        let state = self.lock();
        state.vms.values().flat_map(|vm| vm.policies.clone()).collect()
    }

    /// What each outgoing migration here was told last.
    pub fn last_told(&self) -> Vec<vm::MigrationPolicy> {
        let state = self.lock();
        let last = state.vms.values().filter_map(|vm| vm.policies.last());
        last.copied().collect()
    }

    fn peers(&self) -> Vec<FakeNode> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How often a VM was resumed here.
    pub fn resumed(&self) -> u32 {
        self.lock().resumed
    }

    /// VMs whose vCPUs run here.
    pub fn running(&self) -> usize {
        self.lock()
            .vms
            .values()
            .filter(|vm| vm.state == VmState::Running && !vm.dead)
            .count()
    }

    /// Epochs at which a VM has a VMM here.
    pub fn epochs_of(&self, vm: VmId) -> Vec<u64> {
        let state = self.lock();
        let own = state.vms.keys().filter(|(id, _)| *id == vm.to_string());
        own.map(|(_, epoch)| *epoch).collect()
    }

    /// A VMM that should have been destroyed.
    pub fn leave_behind(&self, vm: VmId, epoch: u64) {
        self.lock().vms.insert((vm.to_string(), epoch), FakeVm::default());
    }

    /// Every launch from now on fails.
    pub fn refuse_launches(&self) {
        self.lock().refuse_launches = true;
    }

    /// The opposite.
    pub fn accept_launches(&self) {
        self.lock().refuse_launches = false;
    }

    /// VMMs here, in any state.
    pub fn vmms(&self) -> usize {
        self.lock().vms.len()
    }

    /// Reports as a real agent does each second.
    pub fn report(&self, scheduler: &Shared) {
        let vms: Vec<VmFacts> = self.lock().vms.iter().map(|(key, vm)| facts(key, vm)).collect();
        let heartbeat = Heartbeat {
            memory_available_bytes: self.record.memory_bytes,
            vms,
            ..Default::default()
        };
        let entry = scheduler.nodes.get(&self.record.name).expect("registered");
        observe::report(scheduler, &self.record.name, &entry, &heartbeat.into());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answering(&self) -> Result<MutexGuard<'_, State>, Status> {
        let state = self.lock();
        if state.silent {
            Err(Status::unavailable("the network is cut"))
        } else {
            Ok(state)
        }
    }
}

fn facts((id, epoch): &(String, u64), vm: &FakeVm) -> VmFacts {
    let status = VmStatus {
        vm_id: id.clone(),
        epoch: *epoch,
        state: vm.state.into(),
        cpus: 1,
        outgoing_migration_id: vm.outgoing.clone(),
        exit_status: vm.exit_status,
        missing_bytes: vm.missing_bytes,
        link_lost: vm.link_lost,
        ..Default::default()
    };
    VmFacts {
        status: Some(status),
        vmm_alive: !vm.dead,
        ran_here: vm.ran,
        ..Default::default()
    }
}

fn report(migration: &str, result: MigrationResult) -> MigrationReport {
    MigrationReport {
        migration_id: migration.to_owned(),
        result: result.into(),
        reason: "scripted".to_owned(),
        passes: 3,
        samples: vec![vm::MigrationSample::default()],
        ..Default::default()
    }
}

fn key(vm: Option<VmRef>) -> (String, u64) {
    let vm = vm.expect("a VM");
    (vm.vm_id, vm.epoch)
}

fn missing() -> Status {
    Status::not_found("no such VM")
}

#[tonic::async_trait]
impl Agent for FakeNode {
    type WatchMigrationStream = Pin<Box<dyn Stream<Item = Result<MigrationProgress, Status>> + Send>>;

    async fn launch_vm(&self, request: Request<LaunchVmRequest>) -> Result<Response<VmStatus>, Status> {
        let mut state = self.answering()?;
        let spec = request.into_inner().spec.expect("a spec");
        let key = (spec.vm_id, spec.epoch);
        let lost = state.lose_launch.take();
        if state.refuse_launches {
            return Err(Status::internal("no launches today"));
        }
        if state.fenced.contains(&key) {
            return Err(Status::aborted("stale epoch"));
        }
        if lost != Some(false) {
            let vm = FakeVm {
                state: VmState::Running,
                ran: true,
                ..Default::default()
            };
            state.vms.insert(key, vm);
        }
        match lost {
            Some(_) => Err(Status::unavailable("the answer is lost")),
            None => Ok(Response::new(VmStatus::default())),
        }
    }

    async fn prepare_incoming(
        &self,
        request: Request<PrepareIncomingRequest>,
    ) -> Result<Response<PrepareIncomingResponse>, Status> {
        let mut state = self.answering()?;
        let spec = request.into_inner().spec.expect("a spec");
        let vm = FakeVm {
            state: VmState::Incoming,
            ..Default::default()
        };
        state.vms.insert((spec.vm_id, spec.epoch), vm);
        state.silent |= std::mem::take(&mut state.silent_once_prepared);
        Ok(Response::new(PrepareIncomingResponse {
            address: "127.0.0.1:1".to_owned(),
        }))
    }

    async fn abort_incoming(
        &self,
        request: Request<AbortIncomingRequest>,
    ) -> Result<Response<AbortIncomingResponse>, Status> {
        let mut state = self.answering()?;
        let key = key(request.into_inner().vm);
        let committed = state.vms.get(&key).is_some_and(|vm| vm.ran);
        if !committed {
            state.vms.remove(&key);
            state.fenced.insert(key);
        }
        Ok(Response::new(AbortIncomingResponse { committed }))
    }

    async fn start_migration(
        &self,
        request: Request<StartMigrationRequest>,
    ) -> Result<Response<StartMigrationResponse>, Status> {
        let request = request.into_inner();
        let migration = request.migration.expect("a migration");
        let here = key(request.vm);
        let there = (here.0.clone(), migration.destination_epoch);
        let script = self.answering()?.script.clone();
        // It ends as it began.
        let before = match self.answering()?.vms.get(&here).map(|vm| vm.state) {
            Some(VmState::Paused) => VmState::Paused,
            _ => VmState::Running,
        };
        let peers = self.peers();
        let commit = |missing_bytes| {
            for peer in &peers {
                if let Some(vm) = peer.lock().vms.get_mut(&there) {
                    vm.state = before;
                    vm.ran = true;
                    vm.missing_bytes = missing_bytes;
                }
            }
        };
        let (state, result) = match script {
            Script::Complete => {
                commit(0);
                (VmState::Migrated, Some(MigrationResult::Completed))
            }
            Script::Fail => (before, Some(MigrationResult::Failed)),
            Script::InDoubt { commit_arrives } => {
                if commit_arrives {
                    commit(0);
                }
                (VmState::InDoubt, Some(MigrationResult::InDoubt))
            }
            Script::GoOn => (VmState::Migrating, None),
            Script::PostCopy => {
                commit(1 << 20);
                (VmState::PostCopy, None)
            }
        };
        let mut own = self.lock();
        let vm = own.vms.get_mut(&here).ok_or_else(missing)?;
        (vm.state, vm.paused) = (state, before == VmState::Paused);
        vm.outgoing = migration.migration_id.clone();
        vm.report = result.map(|result| report(&migration.migration_id, result));
        vm.policies = vec![migration.policy.unwrap_or_default()];
        Ok(Response::new(StartMigrationResponse {}))
    }

    async fn watch_migration(
        &self,
        request: Request<WatchMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        let key = key(request.into_inner().vm);
        if !self.answering()?.vms.contains_key(&key) {
            return Err(missing());
        }
        let (sender, receiver) = mpsc::channel(1);
        let node = self.clone();
        tokio::spawn(async move {
            loop {
                let progress = match node.answering() {
                    Err(status) => Err(status),
                    Ok(state) => match state.vms.get(&key).filter(|vm| !vm.dead) {
                        None => Err(Status::unavailable("the VMM is gone")),
                        Some(vm) => Ok(MigrationProgress {
                            report: vm.report.clone(),
                            ..Default::default()
                        }),
                    },
                };
                let last = !matches!(&progress, Ok(progress) if progress.report.is_none());
                if sender.send(progress).await.is_err() || last {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_migration(
        &self,
        request: Request<CancelMigrationRequest>,
    ) -> Result<Response<CancelMigrationResponse>, Status> {
        let mut state = self.answering()?;
        let vm = state
            .vms
            .get_mut(&key(request.into_inner().vm))
            .ok_or_else(missing)?;
        if vm.state == VmState::Migrating {
            vm.state = if vm.paused {
                VmState::Paused
            } else {
                VmState::Running
            };
            vm.report = Some(report(&vm.outgoing, MigrationResult::Cancelled));
        }
        Ok(Response::new(CancelMigrationResponse {}))
    }

    async fn set_migration(
        &self,
        request: Request<SetMigrationRequest>,
    ) -> Result<Response<vm::SetMigrationResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.answering()?;
        let vm = state.vms.get_mut(&key(request.vm)).ok_or_else(missing)?;
        let policy = request.change.and_then(|change| change.policy);
        vm.policies.push(policy.unwrap_or_default());
        Ok(Response::new(vm::SetMigrationResponse { policy }))
    }

    async fn describe_vm(&self, request: Request<VmRef>) -> Result<Response<VmFacts>, Status> {
        let state = self.answering()?;
        let key = key(Some(request.into_inner()));
        state
            .vms
            .get(&key)
            .map(|vm| Response::new(facts(&key, vm)))
            .ok_or_else(missing)
    }

    async fn pause_vm(&self, request: Request<VmRef>) -> Result<Response<VmStatus>, Status> {
        let mut state = self.answering()?;
        let vm = state
            .vms
            .get_mut(&key(Some(request.into_inner())))
            .ok_or_else(missing)?;
        if !matches!(vm.state, VmState::Running | VmState::Paused) {
            return Err(Status::failed_precondition("only a running VM is paused"));
        }
        vm.state = VmState::Paused;
        Ok(Response::new(VmStatus::default()))
    }

    async fn resume_vm(&self, request: Request<VmRef>) -> Result<Response<VmStatus>, Status> {
        let mut state = self.answering()?;
        let vm = state
            .vms
            .get_mut(&key(Some(request.into_inner())))
            .ok_or_else(missing)?;
        // In doubt it goes back to what it was.
        vm.state = if vm.state == VmState::InDoubt && vm.paused {
            VmState::Paused
        } else {
            VmState::Running
        };
        state.resumed += 1;
        Ok(Response::new(VmStatus::default()))
    }

    async fn stop_vm(&self, request: Request<VmRef>) -> Result<Response<VmStatus>, Status> {
        let mut state = self.answering()?;
        let vm = state
            .vms
            .get_mut(&key(Some(request.into_inner())))
            .ok_or_else(missing)?;
        vm.state = VmState::Exited;
        Ok(Response::new(VmStatus {
            state: vm.state.into(),
            exit_status: vm.exit_status,
            ..Default::default()
        }))
    }

    async fn destroy_vm(&self, request: Request<VmRef>) -> Result<Response<DestroyVmResponse>, Status> {
        let mut state = self.answering()?;
        let key = key(Some(request.into_inner()));
        state.vms.remove(&key);
        state.fenced.insert(key);
        Ok(Response::new(DestroyVmResponse {}))
    }

    async fn write_console(
        &self,
        _: Request<WriteConsoleRequest>,
    ) -> Result<Response<WriteConsoleResponse>, Status> {
        Ok(Response::new(WriteConsoleResponse {}))
    }
}

/// A scheduler and its fake nodes.
#[derive(Debug)]
pub struct Cluster {
    pub scheduler: Shared,
    pub nodes: Vec<FakeNode>,
    directory: tempfile::TempDir,
}

impl Cluster {
    /// `node1`, `node2`, … with 4 CPUs and this much memory each.
    pub async fn start(nodes: usize, memory_bytes: u64) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let scheduler = open(directory.path()).await;
        let peers = Arc::new(Mutex::new(Vec::new()));
        for number in 1..=nodes {
            let node = serve(format!("node{number}"), memory_bytes, Arc::clone(&peers)).await;
            peers.lock().unwrap_or_else(PoisonError::into_inner).push(node);
        }
        let nodes = peers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let cluster = Self {
            scheduler,
            nodes,
            directory,
        };
        cluster.register();
        cluster
    }

    /// Ends this scheduler's part of the test and opens its state directory again, as after a crash.
    pub async fn restart(&mut self) {
        self.reopen().await;
        self.register();
    }

    /// The same, and all nodes but one have registered since.
    pub async fn restart_without(&mut self, index: usize) {
        self.reopen().await;
        for (at, node) in self.nodes.iter().enumerate() {
            if at != index {
                self.register_one(node);
            }
        }
    }

    async fn reopen(&mut self) {
        // The store is locked while it is open: the new one gets a copy, as it was at this moment.
        let copy = tempfile::tempdir().expect("temporary directory");
        std::fs::copy(
            self.directory.path().join("shoal.redb"),
            copy.path().join("shoal.redb"),
        )
        .expect("copied");
        self.scheduler = open(copy.path()).await;
        self.directory = copy;
    }

    /// Every node reports.
    pub fn report(&self) {
        for node in &self.nodes {
            node.report(&self.scheduler);
        }
    }

    /// A VM that is about to be submitted.
    pub fn draft(&self, name: &str, memory_bytes: u64) -> VmRecord {
        VmRecord {
            id: VmId::new(),
            name: name.parse().expect("a name"),
            image: "probe".to_owned(),
            image_digest: String::new(),
            args: Vec::new(),
            kernel: Some(BlobRef {
                sha256: "0".repeat(64),
                size_bytes: 1,
            }),
            initrd: None,
            cmdline: String::new(),
            software_kvm: None,
            cpus: 1,
            memory_bytes,
            created_unix_ms: now_unix_ms(),
            node: self.nodes[0].record.name.clone(),
            epoch: Epoch(1),
            last_epoch: Epoch(1),
            fenced_through: Epoch(0),
            phase: Phase::Starting,
            message: String::new(),
            cpu: None,
            cpu_baseline: false,
            kvm: None,
            wishes: Default::default(),
            home: None,
            placement: String::new(),
            suspended: None,
            giving_way: None,
            runs: Runs::default(),
        }
    }

    fn register(&self) {
        for node in &self.nodes {
            self.register_one(node);
        }
    }

    fn register_one(&self, node: &FakeNode) {
        let entry = self
            .scheduler
            .nodes
            .get_or_insert(node.record.clone())
            .expect("an address");
        let (sender, _) = mpsc::channel(1);
        entry
            .begin_session(node.record.clone(), 1, sender)
            .expect("an address");
        node.report(&self.scheduler);
    }
}

/// Polls until a condition holds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait)
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"));
}

async fn open(directory: &std::path::Path) -> Shared {
    let config = Settings {
        state_dir: directory.to_owned(),
        store: None,
        lease: Duration::from_secs(5),
        vmm_binary: None,
        policy: shoal_plan::Policy {
            automation: shoal_plan::Automation::Manual,
            ..shoal_plan::Policy::default()
        },
        keep_ended: 3,
        cluster_secret: None,
    };
    let (scheduler, subjects, unfinished) = crate::server::open(&config).await.expect("opened");
    unfinished.take_up(&scheduler).await;
    tokio::spawn(reconcile::run(Arc::clone(&scheduler), subjects));
    scheduler
}

async fn serve(name: String, memory_bytes: u64, peers: Arc<Mutex<Vec<FakeNode>>>) -> FakeNode {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address").to_string();
    let name = name.parse().expect("a name");
    let record = NodeRecord {
        name,
        address,
        cpus: 4,
        memory_bytes,
        migration_tls: false,
        cordon: Cordon::Open,
        cpu: None,
        cpu_model: String::new(),
        kvm: None,
        kvm_trouble: String::new(),
        wishes: Default::default(),
        lost: None,
        removed: false,
    };
    let node = FakeNode {
        state: Arc::default(),
        peers,
        record,
    };
    let server = Server::builder()
        .add_service(AgentServer::new(node.clone()))
        .serve_with_incoming(TcpIncoming::from(listener));
    tokio::spawn(server);
    node
}
