//! Where a VM goes: filters, each with its reason, then the lowest opportunity cost. Ties go to the first name.

use std::sync::Arc;

use crate::cluster::{Cluster, Immobile, bytes};
use crate::kvm::Kernels;
use crate::labels::{Labels, Rules};
use crate::model::{Bytes, ClusterSnapshot, CpuClass, DEFAULT_PRIORITY, NodeName, NodeState, VmId};
use crate::newcomer::Newcomer;
use crate::policy::{Mode, Policy};
use crate::reject::{RejectReason, Rejection, summarise};

/// A VM to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchRequest {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory it is given.
    pub memory: Bytes,
    /// The only node it may go to, if there is one.
    pub node: Option<NodeName>,
    /// Where it goes if it fits there, if anywhere.
    pub prefer: Option<NodeName>,
    /// It came by the queue: it takes slots.
    pub queued: bool,
    /// The CPU features it is to have; none: those of the node it comes to.
    pub cpu_class: Option<CpuClass>,
    /// What it can boot; none: whatever is asked of it.
    pub kernels: Option<Arc<Kernels>>,
    /// What affinity asks about.
    pub labels: Labels,
    /// What it asks of its node.
    pub rules: Option<Arc<Rules>>,
    /// 0 to 9: in the queue, and for whom others are stopped.
    pub priority: u32,
}

impl Default for LaunchRequest {
    fn default() -> Self {
        Self {
            cpus: 0,
            memory: Bytes(0),
            node: None,
            prefer: None,
            queued: false,
            cpu_class: None,
            kernels: None,
            labels: Labels::default(),
            rules: None,
            priority: DEFAULT_PRIORITY,
        }
    }
}

/// Where to, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The node.
    pub node: NodeName,
    /// Why this one, in words and numbers.
    pub reason: String,
}

/// Why a launch has no place.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlaceError {
    /// The node asked for is not in the cluster.
    #[error("node {0} is unknown: `shoal nodes` lists the nodes")]
    UnknownNode(NodeName),
    /// No node can take it; every node is listed.
    #[error("{}: {}", nothing_fits(.rejections, .never.as_ref()), summarise(.rejections))]
    NothingFits {
        /// One per node, by name.
        rejections: Vec<Rejection>,
        /// None of those that it may go to ever will, even empty, as long as their sizes, the image and the policy are what they
        /// are: what the largest takes.
        never: Option<Largest>,
    },
}

impl PlaceError {
    /// No node can ever take it: to wait for room is of no use.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::NothingFits { never: Some(_), .. })
    }
}

/// What nodes take when they are empty, at most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Largest {
    /// vCPUs of one VM.
    pub cpus: u32,
    /// Memory that it may be given.
    pub memory: Bytes,
}

/// What is said of kernels says itself that it lasts.
fn nothing_fits(rejections: &[Rejection], never: Option<&Largest>) -> String {
    let by_size = |rejection: &Rejection| {
        !rejection.reason.is_of_kvm() && !matches!(rejection.reason, RejectReason::NotAskedFor { .. })
    };
    match never {
        Some(largest) if rejections.iter().any(by_size) => format!(
            "nothing fits, even if every node were empty and took {} vCPUs and {}",
            largest.cpus, largest.memory
        ),
        _ => "nothing fits".to_owned(),
    }
}

/// Why a migration is refused before it starts.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MigrateError {
    /// There is no such VM.
    #[error("VM {0} is unknown, or its node is")]
    UnknownVm(VmId),
    /// The node asked for is not in the cluster.
    #[error("node {0} is unknown: `shoal nodes` lists the nodes")]
    UnknownNode(NodeName),
    /// It cannot be moved now.
    #[error("VM {vm} cannot be moved: {reason}")]
    CannotMove {
        /// The VM's name.
        vm: String,
        /// Why not.
        reason: Immobile,
    },
    /// It is on the node asked for.
    #[error("VM {vm} is on {node} already: choose another node")]
    SameNode {
        /// The VM's name.
        vm: String,
        /// The node.
        node: NodeName,
    },
    /// The node asked for takes no VMs.
    #[error("node {node} is {state} and takes no VMs: choose another node or wait until it is ready")]
    NotReady {
        /// The node.
        node: NodeName,
        /// Its state.
        state: NodeState,
    },
    /// The node asked for has no room, another CPU, or no way to speak to the VM's node.
    #[error("VM {vm} does not fit on {node}: {reason}")]
    NoRoom {
        /// The VM's name.
        vm: String,
        /// The node.
        node: NodeName,
        /// Why not.
        reason: RejectReason,
    },
    /// No node can take it; every node is listed.
    #[error("nothing fits: {}", summarise(.rejections))]
    NothingFits {
        /// One per node, by name.
        rejections: Vec<Rejection>,
    },
}

/// Chooses the node for a VM to start on.
///
/// # Errors
/// The node asked for is unknown, or no node fits.
pub fn place_launch(
    snapshot: &ClusterSnapshot,
    policy: &Policy,
    request: &LaunchRequest,
) -> Result<Placement, PlaceError> {
    let mut cluster = Cluster::with_rules(snapshot, policy, request.rules.as_deref().into_iter());
    place(&mut cluster, request)
}

/// Chooses the nodes for several VMs, in their order. Each that has a place takes it before the next is looked at.
#[must_use]
pub fn place_launches(
    snapshot: &ClusterSnapshot,
    policy: &Policy,
    requests: &[LaunchRequest],
) -> Vec<Result<Placement, PlaceError>> {
    let rules = requests.iter().filter_map(|request| request.rules.as_deref());
    let mut cluster = Cluster::with_rules(snapshot, policy, rules);
    requests
        .iter()
        .map(|request| place(&mut cluster, request))
        .collect()
}

/// The node that a request asks for.
pub(crate) fn asked(cluster: &Cluster<'_>, request: &LaunchRequest) -> Result<Option<usize>, PlaceError> {
    let number = |name: &NodeName| {
        let number = cluster.node_number(name);
        number.ok_or_else(|| PlaceError::UnknownNode(name.clone()))
    };
    request.node.as_ref().map(number).transpose()
}

pub(crate) fn place<'a>(
    cluster: &mut Cluster<'a>,
    request: &'a LaunchRequest,
) -> Result<Placement, PlaceError> {
    let newcomer = Newcomer::launch(cluster, request);
    place_newcomer(cluster, request, &newcomer)
}

/// The same, but for nodes that are kept for others who have waited longer.
pub(crate) fn place_in_turn<'a>(
    cluster: &mut Cluster<'a>,
    request: &'a LaunchRequest,
) -> Result<Placement, PlaceError> {
    let mut newcomer = Newcomer::launch(cluster, request);
    newcomer.in_turn = true;
    place_newcomer(cluster, request, &newcomer)
}

fn place_newcomer<'a>(
    cluster: &mut Cluster<'a>,
    request: &'a LaunchRequest,
    newcomer: &Newcomer<'a>,
) -> Result<Placement, PlaceError> {
    let asked = asked(cluster, request)?;
    let preferred = asked.map_or_else(|| preferred(cluster, request, newcomer), |_| Preferred::None);
    let best = match preferred {
        Preferred::Fits(node) => Some(node),
        Preferred::None | Preferred::Rejects(_) => best_node(cluster, newcomer, asked),
    };
    let Some(node) = best else {
        return Err(PlaceError::NothingFits {
            rejections: rejections(cluster, newcomer, asked),
            never: never(cluster, newcomer, asked),
        });
    };
    let why = match preferred {
        Preferred::Fits(_) => "preferred".to_owned(),
        Preferred::None => why(cluster, asked).to_owned(),
        Preferred::Rejects(told) => format!("{told}; {}", why(cluster, asked)),
    };
    let placement = Placement {
        node: cluster.nodes[node].view.name.clone(),
        reason: explain(cluster, newcomer, node, &why),
    };
    cluster.reserve(newcomer, node);
    Ok(placement)
}

/// What becomes of the wish for a node.
enum Preferred {
    /// There is none, or no such node any more.
    None,
    Fits(usize),
    /// In words.
    Rejects(String),
}

fn preferred(cluster: &Cluster<'_>, request: &LaunchRequest, newcomer: &Newcomer<'_>) -> Preferred {
    let wish = request.prefer.as_ref();
    let Some((name, node)) = wish.and_then(|name| Some((name, cluster.node_number(name)?))) else {
        return Preferred::None;
    };
    match newcomer.check(cluster, node) {
        Ok(()) => Preferred::Fits(node),
        Err(reason) => Preferred::Rejects(format!("{name} was preferred, and there {reason}")),
    }
}

/// If none of the nodes that it may go to could take it even if it were empty: what the largest of them take.
fn never(cluster: &Cluster<'_>, newcomer: &Newcomer<'_>, asked: Option<usize>) -> Option<Largest> {
    let nodes = (0..cluster.nodes.len()).filter(|&node| asked.is_none_or(|asked| asked == node));
    let mut largest = None;
    for node in nodes {
        let most = newcomer.most_there(cluster, node);
        if !newcomer.never_starts(cluster, node)
            && newcomer.cpus <= most.cpus
            && newcomer.declared <= most.memory.0 as f64
        {
            return None;
        }
        let so_far: Largest = largest.unwrap_or_default();
        largest = Some(Largest {
            cpus: so_far.cpus.max(most.cpus),
            memory: so_far.memory.max(most.memory),
        });
    }
    largest
}

/// On this node, which has room for it, or not at all.
pub(crate) fn place_where_room_was_made<'a>(
    cluster: &mut Cluster<'a>,
    request: &'a LaunchRequest,
    node: usize,
) -> Option<Placement> {
    let newcomer = Newcomer::launch(cluster, request);
    newcomer.check(cluster, node).ok()?;
    let placement = Placement {
        node: cluster.nodes[node].view.name.clone(),
        reason: explain(cluster, &newcomer, node, "room was made for it"),
    };
    cluster.reserve(&newcomer, node);
    Some(placement)
}

/// Chooses, or checks, the node for a VM to move to because someone asked for it. Cool-down and the limits on migrations
/// at once are for automatic moves and do not count here.
///
/// # Errors
/// One variant for each thing that can be wrong with the request, or no node fits.
pub fn place_migration(
    snapshot: &ClusterSnapshot,
    policy: &Policy,
    vm: &VmId,
    node: Option<&NodeName>,
) -> Result<Placement, MigrateError> {
    let cluster = Cluster::new(snapshot, policy);
    let number = cluster.vms.binary_search_by(|other| other.view.id.cmp(vm));
    let number = number.map_err(|_| MigrateError::UnknownVm(vm.clone()))?;
    let vm = &cluster.vms[number];
    let vm_name = || vm.view.name.to_string();
    let asked = match node {
        Some(name) => Some(
            cluster
                .node_number(name)
                .ok_or_else(|| MigrateError::UnknownNode(name.clone()))?,
        ),
        None => None,
    };
    if asked == Some(vm.node) {
        return Err(MigrateError::SameNode {
            vm: vm_name(),
            node: vm.view.node.clone(),
        });
    }
    if let Some(reason) = cluster.immobile(number, std::time::Duration::ZERO) {
        return Err(MigrateError::CannotMove {
            vm: vm_name(),
            reason,
        });
    }
    let mut newcomer = Newcomer::migration(&cluster, number);
    newcomer.undeterred = asked.is_some();
    if let Some(asked) = asked {
        let target = cluster.nodes[asked].view;
        match newcomer.check(&cluster, asked) {
            Ok(()) => {}
            Err(RejectReason::NotReady(state)) => {
                return Err(MigrateError::NotReady {
                    node: target.name.clone(),
                    state,
                });
            }
            Err(reason) => {
                return Err(MigrateError::NoRoom {
                    vm: vm_name(),
                    node: target.name.clone(),
                    reason,
                });
            }
        }
    }
    match best_node(&cluster, &newcomer, asked) {
        Some(node) => Ok(Placement {
            node: cluster.nodes[node].view.name.clone(),
            reason: explain(&cluster, &newcomer, node, why(&cluster, asked)),
        }),
        None => Err(MigrateError::NothingFits {
            rejections: rejections(&cluster, &newcomer, asked),
        }),
    }
}

/// Checks whether a VM can go to a new VMM on the node that it is on, because someone asked for it. With `shared` memory
/// nothing is copied; otherwise the node holds it twice until the old VMM is gone. A node that takes no VMs from elsewhere
/// may do it.
///
/// # Errors
/// The VM is unknown or cannot be moved, or there is no room for the copy.
pub fn place_handover(
    snapshot: &ClusterSnapshot,
    policy: &Policy,
    vm: &VmId,
    shared: bool,
) -> Result<Placement, MigrateError> {
    let cluster = Cluster::new(snapshot, policy);
    let number = cluster.vms.binary_search_by(|other| other.view.id.cmp(vm));
    let number = number.map_err(|_| MigrateError::UnknownVm(vm.clone()))?;
    let vm = &cluster.vms[number];
    let (name, node) = (vm.view.name.to_string(), &cluster.nodes[vm.node]);
    let immobile = cluster.immobile(number, std::time::Duration::ZERO);
    // It stays where it is locked to.
    if let Some(reason) = immobile.filter(|why| !matches!(why, Immobile::Told(told) if told.is_wished())) {
        return Err(MigrateError::CannotMove { vm: name, reason });
    }
    if !shared && node.occupied + vm.resident > node.memory {
        let reason = RejectReason::Memory {
            used: bytes(node.occupied),
            needed: bytes(vm.resident),
            limit: bytes(node.memory),
        };
        return Err(MigrateError::NoRoom {
            vm: name,
            node: node.view.name.clone(),
            reason,
        });
    }
    let how = if shared {
        "its memory is handed over"
    } else {
        "its memory is copied"
    };
    Ok(Placement {
        node: node.view.name.clone(),
        reason: format!("to a new VMM on the same node, {how}"),
    })
}

/// The node that fits at the lowest cost. When the policy is to pack: the most used one that is not empty and keeps below
/// the target of CPU, if there is one.
pub(crate) fn best_node(
    cluster: &Cluster<'_>,
    newcomer: &Newcomer<'_>,
    asked: Option<usize>,
) -> Option<usize> {
    let numbers = match asked {
        Some(number) => number..number + 1,
        None => 0..cluster.nodes.len(),
    };
    let fits = |number: &usize| newcomer.check_node(cluster, *number).is_ok();
    if cluster.policy.mode == Mode::Pack {
        let used = numbers.clone().filter(|&number| {
            !cluster.nodes[number].is_empty() && has_cpu(cluster, number, newcomer.usage.cpu)
        });
        let used = used
            .filter(fits)
            .map(|number| (-cluster.nodes[number].use_part(0.0, 0.0), number));
        if let Some(number) = least(cluster, newcomer, used) {
            return Some(number);
        }
    }
    let rate = cluster.cost_rate;
    let charges = numbers
        .filter(fits)
        .map(|number| (cluster.nodes[number].charge(rate, newcomer.usage), number));
    least(cluster, newcomer, charges)
}

/// The node with the least of something that also keeps N+1, which is looked at last.
fn least(
    cluster: &Cluster<'_>,
    newcomer: &Newcomer<'_>,
    nodes: impl Iterator<Item = (f64, usize)>,
) -> Option<usize> {
    let order = |a: &(f64, usize), b: &(f64, usize)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
    if cluster.failover.is_none() || !newcomer.n_plus_one {
        return nodes.min_by(order).map(|(_, number)| number);
    }
    let mut nodes: Vec<(f64, usize)> = nodes.collect();
    nodes.sort_unstable_by(order);
    let keeps = |number: &usize| newcomer.check_failover(cluster, *number).is_ok();
    nodes.into_iter().map(|(_, number)| number).find(keeps)
}

/// Whether a node has so many CPUs left below the target of packing.
pub(crate) fn has_cpu(cluster: &Cluster<'_>, number: usize, cpus: f64) -> bool {
    let node = &cluster.nodes[number];
    node.most_load() + cpus <= cluster.policy.cpu_target * node.cpu_capacity
}

/// Why each node cannot take it.
pub(crate) fn rejections(
    cluster: &Cluster<'_>,
    newcomer: &Newcomer<'_>,
    asked: Option<usize>,
) -> Vec<Rejection> {
    let reason = |number: usize| match asked {
        Some(asked) if asked != number => Err(RejectReason::NotAskedFor {
            asked: cluster.nodes[asked].view.name.clone(),
        }),
        _ => newcomer.check(cluster, number),
    };
    let rejected = (0..cluster.nodes.len()).filter_map(|number| Some((number, reason(number).err()?)));
    rejected
        .map(|(number, reason)| Rejection {
            node: cluster.nodes[number].view.name.clone(),
            reason,
        })
        .collect()
}

/// By what a node was chosen.
fn why(cluster: &Cluster<'_>, asked: Option<usize>) -> &'static str {
    asked.map_or_else(|| cluster.why_best(), |_| "asked for")
}

fn explain(cluster: &Cluster<'_>, newcomer: &Newcomer<'_>, number: usize, why: &str) -> String {
    let node = &cluster.nodes[number];
    format!(
        "{why}: load {:.2} to {:.2} on {} CPUs, memory {} to {} of {}",
        node.load,
        node.load + newcomer.usage.cpu,
        node.view.usable_cpus(),
        bytes(node.settled),
        bytes(node.settled + newcomer.usage.memory),
        node.view.memory,
    )
}
