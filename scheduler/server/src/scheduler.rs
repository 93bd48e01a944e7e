//! All that the parts of a scheduler share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_proto::{NodeName, node};

use crate::agent::{Agent, AgentError};
use crate::cpus::Cpus;
use crate::drain::SharedPlan;
use crate::events::Events;
use crate::failures::Failures;
use crate::history::History;
use crate::images::ImageStore;
use crate::logs::LogStore;
use crate::metrics::Metrics;
use crate::migrations::MigrationTable;
use crate::moves::Moves;
use crate::nodes::NodeTable;
use crate::planner_policy::PlannerPolicy;
use crate::policy::Defaults;
use crate::pool::Pool;
use crate::predictions::Predictions;
use crate::queue::Queue;
use crate::reconcile::ReconcileQueue;
use crate::record::VmRecord;
use crate::schedulers::Schedulers;
use crate::store::{Store, StoreError, Write};
use crate::vms::VmTable;

/// The state of one scheduler. What is stored is changed in the store first, then here.
#[derive(Debug)]
pub struct Scheduler {
    /// Durable state.
    pub store: Store,
    /// VMs.
    pub vms: VmTable,
    /// Nodes.
    pub nodes: NodeTable,
    /// What has failed at nodes lately.
    pub failures: Failures,
    /// Migrations under way.
    pub migrations: MigrationTable,
    /// Migrations that have ended.
    pub history: History,
    /// How migrations go unless someone says otherwise.
    pub defaults: Defaults,
    /// What is counted of them.
    pub metrics: Metrics,
    /// Kinds of CPUs.
    pub cpus: Cpus,
    /// Images.
    pub images: ImageStore,
    /// Console logs.
    pub logs: LogStore,
    /// Events.
    pub events: Events,
    /// VMs that wait for room.
    pub queue: Queue,
    /// VMs whose record and node do not agree.
    pub reconcile: ReconcileQueue,
    /// What plans are made with.
    pub policy: PlannerPolicy,
    /// When this scheduler began to listen.
    pub started: Instant,
    /// Looks at images before they are kept.
    pub vmm_binary: Option<PathBuf>,
    /// Held from a snapshot until what was decided on it is stored, so that no room is given away twice. Taken after
    /// a VM's own lock, or with only `try_lock` on VMs.
    pub planning: tokio::sync::Mutex<()>,
    /// Where plans are made that are carried out.
    pub planner: Pool,
    /// Where what users ask is thought about: as large a question as a plan, but nothing waits for it.
    pub questions: Pool,
    /// Imports of images that may begin.
    pub imports: tokio::sync::Semaphore,
    /// Moves that someone asked for.
    pub moves: Moves,
    /// This one and the others.
    pub schedulers: Schedulers,
    /// VMs that are kept when they have ended.
    pub keep_ended: usize,
    /// What became of what the planner expected.
    pub predictions: Predictions,
    /// What those who watch drains look at.
    pub drain_plan: SharedPlan,
}

/// After a start, or a failover, agents that live have reported within this.
const FIRST_REPORTS: Duration = Duration::from_secs(15);

/// The scheduler as its tasks hold it.
pub type Shared = Arc<Scheduler>;

impl Scheduler {
    /// Stores a changed VM, together with other writes, and then shows it. The caller holds the VM's guard.
    pub async fn save_vm(&self, record: VmRecord, others: Vec<Write>) -> Result<Arc<VmRecord>, StoreError> {
        let record = Arc::new(record);
        let mut writes = others;
        writes.push(Write::PutVm(Arc::clone(&record)));
        self.store.apply(writes).await?;
        self.vms.publish(&record);
        Ok(record)
    }

    /// This scheduler has only begun, and some nodes have not reported yet: what cannot be done now may be in a moment.
    pub fn awaits_reports(&self) -> bool {
        let silent = || self.nodes.list().iter().any(|node| !node.has_reported());
        self.started.elapsed() < FIRST_REPORTS && silent()
    }

    /// Shares the network among the migrations under way again.
    pub fn share_bandwidth(&self) {
        self.migrations.share_bandwidth(&self.defaults.set());
    }

    /// A VM as an agent is told to start it.
    pub fn spec_to_launch(&self, record: &VmRecord) -> node::WorkloadSpec {
        let baseline = record.cpu.as_ref().filter(|_| record.cpu_baseline);
        let table = baseline.and_then(|digest| self.cpus.table(digest));
        node::WorkloadSpec {
            cpu_baseline: table.map_or_else(Vec::new, |table| table.to_bytes()),
            console_offset: record.runs.console_offset,
            ..record.to_spec(record.epoch)
        }
    }

    /// The agent of a node.
    pub fn agent(&self, node: &NodeName) -> Result<Agent, AgentError> {
        let entry = self.nodes.get(node);
        entry
            .map(|entry| entry.agent())
            .ok_or_else(|| AgentError::NoAnswer {
                node: node.clone(),
                what: "it has never registered".to_owned(),
                vmm_is_silent: false,
                unsent: true,
            })
    }
}
