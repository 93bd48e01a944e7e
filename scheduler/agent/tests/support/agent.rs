//! An agent in this process, on a state directory that outlives it.

use std::path::{Path, PathBuf};

use shoal_agent::{AgentConfig, AgentError, ProcessIdentity, serve};
use shoal_proto::node::agent_client::AgentClient;
use shoal_proto::node::{
    Blob, LaunchVmRequest, PrepareIncomingRequest, VmRef, WorkloadSpec, WriteConsoleRequest,
};
use shoal_proto::{MigrationId, VmId};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use super::registry::Scheduler;
use super::{eventually, vmm};

/// A node's disk, with the scripted VMM on it.
pub struct Disk {
    pub root: TempDir,
    vmm: PathBuf,
}

impl Disk {
    pub fn new() -> Self {
        Self::with_self_test(r#"echo '{"kvm":"hardware","ring3_kernel":false,"reason":"not needed"}'"#)
    }

    /// Where the VMM's self-test runs these commands of a shell.
    pub fn with_self_test(commands: &str) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        let vmm = vmm::executable(root.path(), commands);
        Self { root, vmm }
    }

    pub fn config(&self, scheduler: &Scheduler) -> AgentConfig {
        AgentConfig {
            node: "node1".parse().expect("a name"),
            listen: "127.0.0.1:0".parse().expect("an address"),
            advertise: None,
            schedulers: vec![format!("http://{}", scheduler.address)],
            state_dir: self.state(),
            memory_budget: Some(1 << 30),
            cpus: Some(2),
            cgroup: None,
            vmm_binary: self.vmm.clone(),
            insecure: false,
            migration_tls: None,
            cluster_secret: None,
            memory_backing: shoal_proto::vm::MemoryBacking::Auto,
            memory_sampling: Some(std::time::Duration::from_millis(100)),
            shutdown: Box::pin(std::future::pending()),
        }
    }

    pub fn state(&self) -> PathBuf {
        self.root.path().join("state")
    }

    /// The directories of VMMs.
    pub fn vmms(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.state().join("vms")).expect("readable");
        entries.map(|entry| entry.expect("an entry").path()).collect()
    }

    /// The only VMM's process.
    pub fn process(&self) -> ProcessIdentity {
        let dirs = self.vmms();
        assert_eq!(dirs.len(), 1, "{dirs:?}");
        identity(&dirs[0])
    }
}

impl Drop for Disk {
    /// A test that fails leaves VMMs.
    fn drop(&mut self) {
        for dir in self
            .state()
            .join("vms")
            .read_dir()
            .into_iter()
            .flatten()
            .flatten()
        {
            let left = std::fs::read_to_string(dir.path().join("pid"))
                .ok()
                .and_then(|text| text.parse().ok());
            if let Some(identity) = left {
                ProcessIdentity::kill(&identity).expect("killed");
            }
        }
    }
}

pub fn identity(dir: &Path) -> ProcessIdentity {
    std::fs::read_to_string(dir.join("pid"))
        .expect("a pid file")
        .parse()
        .expect("an identity")
}

pub struct Agent {
    pub client: AgentClient<Channel>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), AgentError>>,
}

impl Agent {
    /// Starts it and waits until it is registered and has reported all its VMs.
    pub async fn start(disk: &Disk, scheduler: &Scheduler) -> Self {
        Self::start_with(disk.config(scheduler), scheduler).await
    }

    /// The same, configured so.
    pub async fn start_with(mut config: AgentConfig, scheduler: &Scheduler) -> Self {
        scheduler.told(|told| {
            told.heartbeat = None;
            told.registered.clear();
        });
        let (stop, stopped) = oneshot::channel();
        config.shutdown = Box::pin(async { stopped.await.unwrap_or_default() });
        let task = tokio::spawn(serve(config));
        eventually("a heartbeat", || {
            assert!(!task.is_finished(), "the agent ended");
            scheduler.told(|told| told.heartbeat.is_some())
        })
        .await;
        let address = scheduler.told(|told| told.registered[0].address.clone());
        let client = AgentClient::connect(format!("http://{address}"))
            .await
            .expect("connected");
        Self { client, stop, task }
    }

    /// Ends it; its VMMs go on.
    pub async fn stop(self) {
        self.stop.send(()).expect("it runs");
        self.task.await.expect("no panic").expect("no error");
    }

    pub async fn tell(&self, vm: &VmRef, script: &str) {
        let data = script.as_bytes().to_vec();
        let request = WriteConsoleRequest {
            vm: Some(vm.clone()),
            data,
        };
        self.client.clone().write_console(request).await.expect("told");
    }
}

pub fn new_vm(epoch: u64) -> VmRef {
    VmRef {
        vm_id: VmId::new().to_string(),
        epoch,
    }
}

/// A launch of the VM, whose console starts with the command line.
pub fn launch(vm: &VmRef, kernel: &Blob, cmdline: &str) -> LaunchVmRequest {
    LaunchVmRequest {
        spec: Some(spec(vm, Some(kernel.clone()), cmdline)),
    }
}

pub fn prepare(vm: &VmRef, migration: MigrationId) -> PrepareIncomingRequest {
    let spec = Some(spec(vm, None, ""));
    PrepareIncomingRequest {
        spec,
        migration_id: migration.to_string(),
        token: "secret".into(),
        ..PrepareIncomingRequest::default()
    }
}

fn spec(vm: &VmRef, kernel: Option<Blob>, cmdline: &str) -> WorkloadSpec {
    WorkloadSpec {
        vm_id: vm.vm_id.clone(),
        name: "web".into(),
        epoch: vm.epoch,
        cpus: 1,
        memory_bytes: 64 << 20,
        kernel,
        initrd: None,
        cmdline: cmdline.into(),
        ..WorkloadSpec::default()
    }
}
