//! Starting a VM: choose a node, store the record, tell the node. An answer that is lost is asked for again before
//! anything else is done; a VM is never started on another node.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_plan as plan;
use shoal_proto::{NodeName, VmId, VmName, vm};

use super::stop::outcome;
use super::{Backoff, finish};
use crate::agent::{Agent, AgentError};
use crate::events::{Kind, NewEvent};
use crate::observe;
use crate::queue;
use crate::record::{Outcome, Phase, Runs, VmRecord, now_unix_ms};
use crate::scheduler::Scheduler;
use crate::store::{StoreError, Write};
use crate::vms::{NameTaken, VmEntry, VmGuard};

/// How long a submission waits for a node that stopped answering in the middle.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a VM was not started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The name is in use.
    #[error(transparent)]
    Name(#[from] NameTaken),
    /// No place for it.
    #[error(transparent)]
    Place(#[from] plan::PlaceError),
    /// Too many wait already.
    #[error("the queue is full: `shoal queue` shows who waits, `shoal rm` takes one out")]
    QueueFull,
    /// The node refused or failed to start it; nothing is left of it.
    #[error("node {node} could not start VM {vm}: {reason}")]
    Failed {
        /// The VM's name.
        vm: VmName,
        /// The node.
        node: NodeName,
        /// What the node says.
        reason: String,
        /// Its code, to be passed on.
        code: tonic::Code,
    },
    /// Others were to be stopped for it, and it was not started all the same.
    #[error("VM {vm} waited for room and was not started: {reason}")]
    NotStarted {
        /// The VM's name.
        vm: VmName,
        /// Why not.
        reason: String,
    },
    /// It is not known what became of it.
    #[error(
        "{error} while VM {vm} was started; the start is completed, or undone, when the node answers: `shoal inspect {vm}`"
    )]
    Unclear {
        /// The VM's name.
        vm: VmName,
        /// What the node said last.
        error: AgentError,
    },
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a draft asks of the planner.
pub fn request(scheduler: &Scheduler, draft: &VmRecord, pinned: Option<&NodeName>) -> plan::LaunchRequest {
    plan::LaunchRequest {
        cpus: draft.cpus,
        memory: plan::Bytes(draft.memory_bytes),
        node: pinned.map(|node| plan::NodeName::new(node.as_str())),
        prefer: draft
            .runs
            .preferred
            .as_ref()
            .map(|node| plan::NodeName::new(node.as_str())),
        queued: draft.wishes.queued,
        cpu_class: scheduler.cpus.baseline().map(|baseline| baseline.class(None)),
        kernels: Some(Arc::new(draft.kernels())),
        labels: draft.wishes.labels.clone(),
        rules: draft.wishes.rules.clone(),
        priority: draft.wishes.priority,
    }
}

/// Chooses a node and stores the VM as starting there. `draft.node` is not looked at.
pub async fn submit(
    scheduler: &Scheduler,
    draft: VmRecord,
    pinned: Option<&NodeName>,
) -> Result<(Arc<VmEntry>, VmGuard), LaunchError> {
    let _planning = scheduler.planning.lock().await;
    scheduler.vms.check_name(&draft.name)?;
    scheduler.queue.check_name(&draft.name)?;
    let request = request(scheduler, &draft, pinned);
    let place = plan::place_launch(&observe::snapshot(scheduler), &scheduler.policy.get(), &request)?;
    let entry = VmEntry::waiting(&draft);
    let guard = entry.lock().await;
    submit_at(scheduler, draft, pinned, place, Vec::new(), &entry).await?;
    Ok((entry, guard))
}

/// Stores the VM as starting on the node chosen, together with other writes. The caller holds the entry's guard, and the
/// planning lock since the snapshot was taken; the name is free.
pub async fn submit_at(
    scheduler: &Scheduler,
    draft: VmRecord,
    pinned: Option<&NodeName>,
    place: plan::Placement,
    others: Vec<Write>,
    entry: &Arc<VmEntry>,
) -> Result<(), LaunchError> {
    let unknown = |_| plan::PlaceError::UnknownNode(place.node.clone());
    let node: NodeName = place.node.as_str().parse().map_err(unknown)?;
    let baseline = scheduler.cpus.baseline();
    let on = scheduler.nodes.get(&node).map(|entry| entry.record());
    let (cpu_of_node, kvm) = on.map_or((None, None), |on| (on.cpu, on.kvm));
    let runs = Runs {
        started_unix_ms: now_unix_ms(),
        pinned: pinned.cloned(),
        console_offset: console_offset(scheduler, &draft).await,
        ..draft.runs
    };
    let record = Arc::new(VmRecord {
        runs,
        cpu_baseline: baseline.is_some(),
        cpu: baseline.or(cpu_of_node),
        kvm,
        home: Some(node.clone()),
        node,
        placement: place.reason.clone(),
        message: place.reason,
        ..draft
    });
    let mut writes = others;
    writes.push(Write::PutVm(Arc::clone(&record)));
    scheduler.store.apply(writes).await?;
    scheduler.vms.insert(entry, &record);
    Ok(())
}

/// Where the console goes on. Another scheduler may have what was written before: then it is more than what is here.
async fn console_offset(scheduler: &Scheduler, draft: &VmRecord) -> u64 {
    let known = draft.runs.console_offset;
    if draft.runs.preempted == 0 {
        return known;
    }
    match scheduler.logs.settle(draft.id).await {
        Ok(end) => known.max(end),
        Err(error) => {
            tracing::error!(vm = %draft.id, %error, "console log cannot be read");
            known
        }
    }
}

/// Nodes that are tried for one start.
const TRIES: usize = 3;

/// Chooses a node and starts a VM there. Should the node fail, the next best is tried, unless one was asked for.
pub async fn submit_and_start(
    scheduler: &Scheduler,
    draft: VmRecord,
    pinned: Option<&NodeName>,
) -> Result<Arc<VmEntry>, LaunchError> {
    let mut failed = None;
    let mut tries_left = TRIES;
    loop {
        tries_left -= 1;
        // Its epochs are used up where it was tried.
        let draft = VmRecord {
            id: VmId::new(),
            ..draft.clone()
        };
        let (entry, guard) = match submit(scheduler, draft, pinned).await {
            Ok(submitted) => submitted,
            // What the first one said tells more than that there is no other.
            Err(error) => return Err(failed.unwrap_or(error)),
        };
        match start(scheduler, &entry, &guard).await {
            Ok(()) => return Ok(entry),
            Err(error @ LaunchError::Failed { code, .. }) if pinned.is_none() && blames_node(code) => {
                if tries_left == 0 {
                    return Err(failed.unwrap_or(error));
                }
                tracing::info!(%error, "the next best node is tried");
                failed.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether a start that failed so may succeed at another node: it is not the request that is wrong.
fn blames_node(code: tonic::Code) -> bool {
    use tonic::Code;
    !matches!(code, Code::InvalidArgument | Code::AlreadyExists | Code::Aborted)
}

/// Whether a VM goes back to the queue that did not start: its owner lets it wait as long as it takes, and it is the node that
/// could not.
fn waits_again(record: &VmRecord, code: tonic::Code) -> bool {
    record.runs.queued_unix_ms != 0 && record.runs.preempted == 0 && blames_node(code)
}

/// Starts a submitted VM and waits until it runs. If it does not, nothing is left of it, unless it waits again.
pub async fn start(scheduler: &Scheduler, entry: &VmEntry, guard: &VmGuard) -> Result<(), LaunchError> {
    let record = entry.record();
    let told = tell(scheduler, &record, Some(Instant::now() + PATIENCE)).await;
    learn(scheduler, &record.node, &told);
    match told {
        Told::Runs => {
            mark_running(scheduler, entry, guard).await;
            Ok(())
        }
        Told::NoAnswer(error) => Err(LaunchError::Unclear {
            vm: record.name.clone(),
            error,
        }),
        Told::Failed { reason, code } if record.runs.preempted > 0 => {
            // What it did before is not forgotten.
            let outcome = Outcome::Failed {
                reason: format!("node {} could not start it again: {reason}", record.node),
            };
            finish::end_vm(scheduler, entry, outcome, guard).await;
            Err(LaunchError::Failed {
                vm: record.name.clone(),
                node: record.node.clone(),
                reason,
                code,
            })
        }
        Told::Failed { reason, code } if waits_again(&record, code) => {
            queue::put_back(scheduler, entry, &record, &reason).await?;
            Err(LaunchError::Failed {
                vm: record.name.clone(),
                node: record.node.clone(),
                reason,
                code,
            })
        }
        Told::Failed { reason, code } => {
            scheduler.store.apply(vec![Write::DeleteVm(record.id)]).await?;
            // Whoever waits for the VM hears of its end before it is forgotten.
            let outcome = Outcome::Failed {
                reason: reason.clone(),
            };
            let ended = VmRecord {
                phase: Phase::Ended(outcome),
                message: reason.clone(),
                ..record.as_ref().clone()
            };
            scheduler.vms.publish(&Arc::new(ended));
            scheduler.vms.remove(record.id);
            if let Err(error) = scheduler.logs.remove(record.id).await {
                tracing::warn!(vm = %record.id, %error, "console log is left over");
            }
            scheduler
                .events
                .publish(NewEvent::new(Kind::VmLaunchFailed, reason.clone()).vm(&record));
            Err(LaunchError::Failed {
                vm: record.name.clone(),
                node: record.node.clone(),
                reason,
                code,
            })
        }
    }
}

/// Goes on with a start that was interrupted; nobody waits for the answer any more.
pub async fn resume_start(scheduler: &Scheduler, entry: &VmEntry, guard: &VmGuard) {
    let record = entry.record();
    match tell(scheduler, &record, None).await {
        Told::Runs => mark_running(scheduler, entry, guard).await,
        Told::NoAnswer(error) => tracing::info!(vm = %record.id, %error, "start: later"),
        Told::Failed { reason, code } if waits_again(&record, code) => {
            if let Err(error) = queue::put_back(scheduler, entry, &record, &reason).await {
                tracing::error!(vm = %record.id, error = &error as &dyn std::error::Error, "start: later");
            }
        }
        Told::Failed { reason, .. } => {
            let reason = format!("node {} could not start it: {reason}", record.node);
            finish::end_vm(scheduler, entry, Outcome::Failed { reason }, guard).await;
        }
    }
}

/// A node where starts fail is not the first choice for a while.
fn learn(scheduler: &Scheduler, node: &NodeName, told: &Told) {
    match told {
        Told::Runs => scheduler.failures.clear(node, None),
        Told::Failed { code, reason } if blames_node(*code) => scheduler.failures.note(node, None, reason),
        Told::Failed { .. } | Told::NoAnswer(_) => {}
    }
}

async fn mark_running(scheduler: &Scheduler, entry: &VmEntry, _guard: &VmGuard) {
    let record = entry.record();
    let message = format!("started on {}: {}", record.node, record.message);
    let running = VmRecord {
        phase: Phase::Running,
        message: String::new(),
        runs: Runs {
            started_unix_ms: now_unix_ms(),
            ..record.runs.clone()
        },
        ..record.as_ref().clone()
    };
    let running = finish::save_at_last(scheduler, running, Vec::new()).await;
    scheduler
        .events
        .publish(NewEvent::new(Kind::VmStarted, message).vm(&running));
}

#[derive(Debug)]
enum Told {
    /// It runs, or has run and ended by itself.
    Runs,
    /// It does not run and never will: the node has confirmed that.
    Failed { reason: String, code: tonic::Code },
    /// Not known yet.
    NoAnswer(AgentError),
}

/// Tells the node to start the VM, and asks until it is clear what came of it. Without a deadline, for a start that was
/// interrupted: asks before it tells, and asks once.
async fn tell(scheduler: &Scheduler, record: &VmRecord, deadline: Option<Instant>) -> Told {
    let agent = match scheduler.agent(&record.node) {
        Ok(agent) => agent,
        Err(error) => return Told::NoAnswer(error),
    };
    let interrupted = match deadline {
        None => known(&agent, record).await,
        Some(_) => Known::Nothing,
    };
    let failure = match interrupted {
        Known::Runs => return Told::Runs,
        Known::Silent(error) => return Told::NoAnswer(error),
        Known::Starting | Known::Nothing | Known::Failed => {
            match agent.launch(scheduler.spec_to_launch(record)).await {
                Ok(_) => return Told::Runs,
                Err(error) => error,
            }
        }
    };
    let mut backoff = Backoff::new();
    loop {
        let unclear = match known(&agent, record).await {
            Known::Runs => return Told::Runs,
            Known::Starting => failure.clone(),
            Known::Silent(error) => error,
            // The undo: after it the epoch can never start there, so a lost request still on its way is void, too.
            Known::Nothing | Known::Failed => match agent.destroy(record.id, record.epoch).await {
                Ok(()) => {
                    let code = failure.code().unwrap_or(tonic::Code::Internal);
                    let reason = failure.to_string();
                    return Told::Failed { reason, code };
                }
                Err(error) => error,
            },
        };
        if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            return Told::NoAnswer(unclear);
        }
        backoff.pause().await;
    }
}

/// What a node knows of a VM that it was told to start.
#[derive(Debug)]
enum Known {
    /// It runs, or has run and ended by itself.
    Runs,
    /// It is being started.
    Starting,
    /// It is not there.
    Nothing,
    /// It is there, and did not start.
    Failed,
    /// The node did not say.
    Silent(AgentError),
}

async fn known(agent: &Agent, record: &VmRecord) -> Known {
    let facts = match agent.describe(record.id, record.epoch).await {
        Ok(facts) => facts,
        Err(error) if error.is_not_found() => return Known::Nothing,
        Err(error) => return Known::Silent(error),
    };
    let state = facts
        .status
        .as_ref()
        .map_or(vm::VmState::Unspecified, vm::VmStatus::state);
    match (state, outcome(&facts)) {
        (vm::VmState::Running, None) | (_, Some(Outcome::Exited { .. })) => Known::Runs,
        (_, Some(Outcome::Failed { .. })) => Known::Failed,
        _ => Known::Starting,
    }
}
