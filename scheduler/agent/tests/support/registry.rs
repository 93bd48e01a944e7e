//! The scheduler's side of an agent's report stream, and its image store.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use shoal_proto::node::agent_report::Report;
use shoal_proto::node::registry_server::{Registry, RegistryServer};
use shoal_proto::node::{
    AgentReport, Blob, BlobChunk, ConsoleAck, FetchBlobRequest, Heartbeat, Register, Registered,
    SchedulerMessage, VmFacts, WholeReportWanted, scheduler_message::Message,
};
use shoal_report::{Decoder, Report as Known};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::eventually;

/// What agents have told, and what blobs there are. Outlives a stop of the scheduler.
#[derive(Default)]
pub struct Told {
    pub registered: Vec<Register>,
    pub heartbeat: Option<Heartbeat>,
    /// Whole reports, and deltas.
    pub wholes: usize,
    pub deltas: usize,
    /// The next delta is dropped, as if it had been lost.
    pub lose_delta: bool,
    pub changes: Vec<VmFacts>,
    /// By VM: bytes by offset, each as often as it came.
    pub console: HashMap<String, Vec<(u64, Vec<u8>)>>,
    pub acknowledge: bool,
    pub blobs: HashMap<String, Vec<u8>>,
    pub fetches: usize,
}

impl Told {
    /// The console as one text, if what came has no hole.
    pub fn console_text(&self, vm: &str) -> String {
        let mut text = Vec::new();
        for (offset, data) in self.console.get(vm).into_iter().flatten() {
            let offset = usize::try_from(*offset).expect("an offset");
            assert!(offset <= text.len(), "a hole before {offset}");
            text.truncate(offset);
            text.extend_from_slice(data);
        }
        String::from_utf8(text).expect("text")
    }

    /// The latest facts of a VM.
    pub fn facts(&self, vm: &str) -> Option<VmFacts> {
        let of_vm = |facts: &&VmFacts| facts.status.as_ref().is_some_and(|status| status.vm_id == vm);
        self.changes.iter().rev().find(of_vm).cloned()
    }

    /// VMs in the latest heartbeat.
    pub fn beating(&self) -> Option<Vec<VmFacts>> {
        self.heartbeat.as_ref().map(|heartbeat| heartbeat.vms.clone())
    }
}

/// A scheduler on a runtime of its own, so that its end closes every connection.
pub struct Scheduler {
    pub address: SocketAddr,
    pub told: Arc<Mutex<Told>>,
    runtime: Option<Runtime>,
}

impl Scheduler {
    pub fn start() -> Self {
        let told = Told {
            acknowledge: true,
            ..Told::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        Self::start_at(listener, Arc::new(Mutex::new(told)))
    }

    fn start_at(listener: TcpListener, told: Arc<Mutex<Told>>) -> Self {
        let address = listener.local_addr().expect("an address");
        listener.set_nonblocking(true).expect("set");
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let server =
            tonic::transport::Server::builder().add_service(RegistryServer::new(Service(Arc::clone(&told))));
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            server
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .expect("served");
        });
        Self {
            address,
            told,
            runtime: Some(runtime),
        }
    }

    /// Stops, does what is asked meanwhile, and starts again where it was.
    pub async fn restart(mut self, meanwhile: impl AsyncFnOnce()) -> Self {
        self.stop();
        meanwhile().await;
        let mut listener = None;
        eventually("its port is free", || {
            listener = TcpListener::bind(self.address).ok();
            listener.is_some()
        })
        .await;
        Self::start_at(listener.expect("bound"), Arc::clone(&self.told))
    }

    fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    pub fn told<T>(&self, look: impl FnOnce(&mut Told) -> T) -> T {
        look(&mut self.told.lock().expect("not poisoned"))
    }

    pub fn add_blob(&self, content: &[u8]) -> Blob {
        let sha256: String = Sha256::digest(content)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.told(|told| told.blobs.insert(sha256.clone(), content.to_vec()));
        Blob {
            sha256,
            size_bytes: content.len() as u64,
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Service(Arc<Mutex<Told>>);

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait]
impl Registry for Service {
    type ReportStream = Streamed<SchedulerMessage>;
    async fn report(
        &self,
        request: Request<Streaming<AgentReport>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let (messages, queue) = mpsc::channel(16);
        let mut reports = request.into_inner();
        let told = Arc::clone(&self.0);
        tokio::spawn(async move {
            let mut decoder = Decoder::default();
            while let Ok(Some(report)) = reports.message().await {
                if let Some(message) = take(&told, &mut decoder, report) {
                    let message = SchedulerMessage {
                        message: Some(message),
                    };
                    if messages.send(Ok(message)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    type FetchBlobStream = Streamed<BlobChunk>;
    async fn fetch_blob(
        &self,
        request: Request<FetchBlobRequest>,
    ) -> Result<Response<Self::FetchBlobStream>, Status> {
        let mut told = self.0.lock().expect("not poisoned");
        told.fetches += 1;
        let content = told.blobs.get(&request.into_inner().sha256);
        let content = content.ok_or_else(|| Status::not_found("no such blob"))?;
        let chunks: Vec<_> = content
            .chunks(5)
            .map(|data| Ok(BlobChunk { data: data.to_vec() }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks))))
    }
}

fn whole(known: &Known) -> Heartbeat {
    Heartbeat {
        vms: known.vms.values().map(|vm| VmFacts::clone(vm)).collect(),
        ..known.node.clone()
    }
}

fn take(told: &Mutex<Told>, decoder: &mut Decoder, report: AgentReport) -> Option<Message> {
    let mut told = told.lock().expect("not poisoned");
    match report.report.expect("a report") {
        Report::Register(register) => {
            told.registered.push(register);
            Some(Message::Registered(Registered {
                deltas: true,
                term: 1,
            }))
        }
        Report::Heartbeat(heartbeat) => {
            told.wholes += 1;
            told.heartbeat = Some(whole(decoder.whole(heartbeat)));
            None
        }
        Report::Delta(delta) => {
            told.deltas += 1;
            if std::mem::take(&mut told.lose_delta) {
                return None;
            }
            match decoder.delta(delta) {
                Ok(known) => {
                    told.heartbeat = Some(whole(known));
                    None
                }
                Err(_) => Some(Message::WholeReportWanted(WholeReportWanted {})),
            }
        }
        Report::VmChanged(facts) => {
            told.changes.push(facts);
            None
        }
        Report::Console(console) => {
            let vm_id = console.vm.expect("a VM").vm_id;
            let offset = console.offset + console.data.len() as u64;
            told.console
                .entry(vm_id.clone())
                .or_default()
                .push((console.offset, console.data));
            told.acknowledge
                .then_some(Message::ConsoleAck(ConsoleAck { vm_id, offset }))
        }
    }
}
