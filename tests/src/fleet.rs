//! Many simulated agents against one real scheduler: what it costs the scheduler that they report, and how soon it acts.
//!
//! The agents are tasks of this process. Each has a stream of its own, on one of a few connections, and reports once a second
//! with the encoder that real agents use; VMs use more and less from second to second. What the scheduler asks of agents is
//! answered at one address, at once: a VM that is migrated is there.

mod agent;
mod load;
mod scheduler;
mod stream;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use shoal_proto::node::agent_server::AgentServer;
use shoal_proto::{NodeName, VmId};
use shoal_server::seed::{SeedNode, SeedVm};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::transport::Endpoint;
use tonic::transport::server::TcpIncoming;

pub use scheduler::Scheduler;

use load::Node;

/// Streams on one connection.
const STREAMS: usize = 100;

/// How large.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Agents, one a node.
    pub agents: usize,
    /// VMs on each.
    pub vms: usize,
}

/// What was reported so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reported {
    /// Whole reports.
    pub wholes: u64,
    /// Deltas.
    pub deltas: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// What they would have been, had all been whole.
    pub bytes_if_whole: u64,
}

#[derive(Debug, Default)]
struct Counters {
    wholes: AtomicU64,
    deltas: AtomicU64,
    bytes: AtomicU64,
    bytes_if_whole: AtomicU64,
    sessions: AtomicU64,
}

/// A node that has just said that it runs out of memory.
#[derive(Debug, Clone, Copy)]
struct Overload {
    /// When it said so; none while it has not.
    told: Option<Instant>,
}

#[derive(Debug)]
struct Shared {
    nodes: Vec<Mutex<Node>>,
    names: HashMap<String, usize>,
    /// Where each VM's VMM is, by id and epoch.
    places: Mutex<HashMap<(String, u64), usize>>,
    overloads: Mutex<HashMap<usize, Overload>>,
    latencies: Mutex<Vec<Duration>>,
    moves: AtomicU64,
    counters: Counters,
    whole_only: AtomicBool,
}

/// The agents.
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

impl Fleet {
    /// Agents with VMs that run; a scheduler that knows of them, in a state directory of its own; and all of them connected.
    ///
    /// # Errors
    /// If one does not start.
    pub async fn start(size: Size) -> Result<(Self, Scheduler)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let nodes: Vec<Node> = (0..size.agents)
            .map(|number| Node::new(number, size.vms))
            .collect();
        let scheduler = Scheduler::prepare(seed_nodes(&nodes, address)?, seed_vms(&nodes)?).await?;
        let scheduler = scheduler.start().await?;
        let shared = Arc::new(Shared::new(nodes));
        let mut tasks = JoinSet::new();
        let service = AgentServer::new(agent::Agents(Arc::clone(&shared)));
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tasks.spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            server.serve_with_incoming(incoming).await.expect("served");
        });
        for first in (0..size.agents).step_by(STREAMS) {
            let channel = Endpoint::from_shared(scheduler.endpoint())?
                .tcp_nodelay(true)
                .connect()
                .await
                .context("the scheduler does not answer")?;
            for number in first..(first + STREAMS).min(size.agents) {
                let task = stream::report(Arc::clone(&shared), number, channel.clone(), address);
                tasks.spawn(task);
            }
        }
        Ok((Self { shared, tasks }, scheduler))
    }

    /// All agents.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.shared.nodes.len()
    }

    /// Agents that are registered now.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        self.shared.counters.sessions.load(Ordering::Relaxed)
    }

    /// All so far.
    #[must_use]
    pub fn reported(&self) -> Reported {
        let counters = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Reported {
            wholes: get(&counters.wholes),
            deltas: get(&counters.deltas),
            bytes: get(&counters.bytes),
            bytes_if_whole: get(&counters.bytes_if_whole),
        }
    }

    /// From now on every report is whole, or deltas are sent again.
    pub fn set_whole_only(&self, whole_only: bool) {
        self.shared.whole_only.store(whole_only, Ordering::Relaxed);
    }

    /// One report of each agent is lost.
    pub fn lose_a_report_each(&self) {
        for node in 0..self.shared.nodes.len() {
            self.shared.node(node).lose_next = true;
        }
    }

    /// A node's VMs begin to use nearly all of its memory. How soon after its report the first of them was told to leave is
    /// in [`Fleet::latencies`].
    pub fn overload(&self, node: usize) {
        self.shared.lock_overloads().insert(node, Overload { told: None });
        self.shared.node(node).overloaded = true;
    }

    /// Overloads that nothing was done about so far.
    #[must_use]
    pub fn overloaded(&self) -> usize {
        self.shared.lock_overloads().len()
    }

    /// From a report of an overload to the first call that does something about it.
    #[must_use]
    pub fn latencies(&self) -> Vec<Duration> {
        self.shared.lock_latencies().clone()
    }

    /// Migrations so far.
    #[must_use]
    pub fn moves(&self) -> u64 {
        self.shared.moves.load(Ordering::Relaxed)
    }

    /// VMs that run, and how many different ones: every VM once, if all is well.
    #[must_use]
    pub fn running(&self) -> (usize, usize) {
        let mut ids = Vec::new();
        for node in 0..self.shared.nodes.len() {
            ids.extend(self.shared.node(node).running());
        }
        let all = ids.len();
        ids.sort_unstable();
        ids.dedup();
        (all, ids.len())
    }

    /// Ends all agents.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

impl Shared {
    fn new(nodes: Vec<Node>) -> Self {
        let names = nodes
            .iter()
            .enumerate()
            .map(|(number, node)| (node.name.clone(), number))
            .collect();
        let place = |(number, node): (usize, &Node)| -> Vec<_> {
            node.running().map(|id| ((id, 1), number)).collect()
        };
        let places = nodes.iter().enumerate().flat_map(place).collect();
        Self {
            nodes: nodes.into_iter().map(Mutex::new).collect(),
            names,
            places: Mutex::new(places),
            overloads: Mutex::default(),
            latencies: Mutex::default(),
            moves: AtomicU64::new(0),
            counters: Counters::default(),
            whole_only: AtomicBool::new(false),
        }
    }

    fn node(&self, number: usize) -> MutexGuard<'_, Node> {
        self.nodes[number].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_places(&self) -> MutexGuard<'_, HashMap<(String, u64), usize>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_overloads(&self) -> MutexGuard<'_, HashMap<usize, Overload>> {
        self.overloads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_latencies(&self) -> MutexGuard<'_, Vec<Duration>> {
        self.latencies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node's report is on its way.
    fn told(&self, node: usize) {
        if let Some(overload) = self.lock_overloads().get_mut(&node)
            && overload.told.is_none()
        {
            overload.told = Some(Instant::now());
        }
    }

    /// The scheduler does something about a VM of this node.
    fn acted_on(&self, node: usize) {
        self.moves.fetch_add(1, Ordering::Relaxed);
        let mut overloads = self.lock_overloads();
        // A move that was planned before the report says nothing of it.
        if let Some(told) = overloads.get(&node).and_then(|overload| overload.told) {
            overloads.remove(&node);
            self.lock_latencies().push(told.elapsed());
            self.node(node).overloaded = false;
        }
    }
}

fn seed_nodes(nodes: &[Node], address: SocketAddr) -> Result<Vec<SeedNode>> {
    let seed = |node: &Node| -> Result<SeedNode> {
        Ok(SeedNode {
            name: node.name.parse::<NodeName>()?,
            address: address.to_string(),
            cpus: load::CPUS,
            memory_bytes: load::MEMORY,
        })
    };
    nodes.iter().map(seed).collect()
}

fn seed_vms(nodes: &[Node]) -> Result<Vec<SeedVm>> {
    let mut vms = Vec::new();
    for node in nodes {
        for id in node.running() {
            vms.push(SeedVm {
                id: id.parse::<VmId>()?,
                node: node.name.parse::<NodeName>()?,
                cpus: 1,
                memory_bytes: node.vm_memory,
            });
        }
    }
    Ok(vms)
}
