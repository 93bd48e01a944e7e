//! Where a VM goes: filters, each with its reason, then the lowest opportunity cost. Ties go to the first name.

use crate::cluster::{Cluster, Immobile, Node, Vm, bytes, expected_resident};
use crate::model::{Bytes, ClusterSnapshot, CpuClass, NodeName, NodeState, VmId};
use crate::policy::Policy;
use crate::reject::{RejectReason, Rejection, summarise};
use crate::score::Use;

/// A VM to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchRequest {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory it is given.
    pub memory: Bytes,
    /// The only node it may go to, if there is one.
    pub node: Option<NodeName>,
    /// The CPU features it is to have; none: those of the node it comes to.
    pub cpu_class: Option<CpuClass>,
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
    #[error("nothing fits: {}", summarise(.rejections))]
    NothingFits {
        /// One per node, by name.
        rejections: Vec<Rejection>,
    },
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
    /// The node asked for has no room, or another CPU.
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
    let cluster = Cluster::new(snapshot, policy);
    let asked = match &request.node {
        Some(name) => Some(
            cluster
                .node_number(name)
                .ok_or_else(|| PlaceError::UnknownNode(name.clone()))?,
        ),
        None => None,
    };
    let newcomer = Newcomer::launch(request, policy);
    match best_node(&cluster, &newcomer, asked) {
        Some(node) => Ok(Placement {
            node: cluster.nodes[node].view.name.clone(),
            reason: explain(&cluster, &newcomer, node, asked),
        }),
        None => Err(PlaceError::NothingFits {
            rejections: rejections(&cluster, &newcomer, asked),
        }),
    }
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
    let vm_name = || vm.view.name.clone();
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
    let newcomer = Newcomer::migration(&cluster, vm);
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
            reason: explain(&cluster, &newcomer, node, asked),
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
    let (name, node) = (vm.view.name.clone(), &cluster.nodes[vm.node]);
    if let Some(reason) = cluster.immobile(number, std::time::Duration::ZERO) {
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

/// A VM that looks for a node.
#[derive(Debug)]
pub(crate) struct Newcomer {
    cpus: u32,
    declared: f64,
    /// Expected at once.
    pub usage: Use,
    /// Expected at the policy's horizon.
    at_horizon: f64,
    cpu_class: Option<CpuClass>,
    /// Where it is.
    from: Option<usize>,
    /// For automatic moves: the part of a node's memory that growth must not pass. They obey the limits, too.
    ahead: Option<f64>,
    /// Declared memory does not count, and this part of a node's memory may be held: see [`crate::usher`].
    last_resort: Option<f64>,
}

impl Newcomer {
    fn launch(request: &LaunchRequest, policy: &Policy) -> Self {
        let expected = expected_resident(request.memory, policy);
        Self {
            cpus: request.cpus,
            declared: request.memory.0 as f64,
            usage: Use {
                cpu: f64::from(request.cpus),
                memory: expected,
            },
            at_horizon: expected,
            cpu_class: request.cpu_class.clone(),
            from: None,
            ahead: None,
            last_resort: None,
        }
    }

    fn migration(cluster: &Cluster<'_>, vm: &Vm<'_>) -> Self {
        Self {
            cpus: vm.view.cpus,
            declared: vm.declared,
            usage: vm.usage(),
            at_horizon: vm.memory_at(cluster.policy.usher_horizon.as_secs_f64()),
            cpu_class: vm.view.cpu_class.clone(),
            from: Some(vm.node),
            ahead: None,
            last_resort: None,
        }
    }

    /// A VM moved by a plan: its destination must stay below `ahead` of its memory, growth counted.
    pub fn automatic(cluster: &Cluster<'_>, vm: usize, ahead: f64) -> Self {
        Self {
            ahead: Some(ahead),
            ..Self::migration(cluster, &cluster.vms[vm])
        }
    }

    /// One that must leave where it is, or be killed there.
    pub fn last_resort(cluster: &Cluster<'_>, vm: usize, part: f64) -> Self {
        Self {
            last_resort: Some(part),
            ..Self::automatic(cluster, vm, part)
        }
    }

    /// Bytes it will hold at the horizon.
    pub fn at_horizon(&self) -> f64 {
        self.at_horizon
    }

    /// Whether a node can take it.
    pub fn check(&self, cluster: &Cluster<'_>, number: usize) -> Result<(), RejectReason> {
        let (policy, node) = (cluster.policy, &cluster.nodes[number]);
        if self.from == Some(number) {
            return Err(RejectReason::SameNode);
        }
        if node.view.state != NodeState::Ready {
            return Err(RejectReason::NotReady(node.view.state));
        }
        if self.cpus > node.view.cpus {
            return Err(RejectReason::TooFewCpus {
                needed: self.cpus,
                has: node.view.cpus,
            });
        }
        if let Some(lacking) = self.cpu_class.as_ref().and_then(|class| node.view.lacks(class)) {
            return Err(RejectReason::CpuFeatures {
                lacking: lacking.clone(),
            });
        }
        let limit = node.memory * policy.overcommit;
        if self.last_resort.is_none() && node.committed + self.declared > limit {
            let (declared, needed) = (bytes(node.committed), bytes(self.declared));
            return Err(RejectReason::Committed {
                declared,
                needed,
                limit: bytes(limit),
            });
        }
        let limit = node.memory * self.last_resort.unwrap_or(policy.usher_threshold);
        if node.occupied + self.usage.memory > limit {
            let (used, needed) = (bytes(node.occupied), bytes(self.usage.memory));
            return Err(RejectReason::Memory {
                used,
                needed,
                limit: bytes(limit),
            });
        }
        if node.pressure() >= policy.pressure_threshold {
            return Err(RejectReason::Pressure {
                percent: node.pressure(),
                limit: policy.pressure_threshold,
            });
        }
        self.ahead
            .map_or(Ok(()), |ahead| self.check_ahead(policy, node, ahead))
    }

    /// Whether some node has room and only takes as many as allowed right now.
    pub fn waits_for_a_move(&self, cluster: &Cluster<'_>) -> bool {
        let busy = |number| matches!(self.check(cluster, number), Err(RejectReason::Busy { .. }));
        (0..cluster.nodes.len()).any(busy)
    }

    fn check_ahead(&self, policy: &Policy, node: &Node<'_>, ahead: f64) -> Result<(), RejectReason> {
        let (predicted, limit) = (node.projected + self.at_horizon, node.memory * ahead);
        if predicted > limit {
            let seconds = policy.usher_horizon.as_secs();
            return Err(RejectReason::Growth {
                predicted: bytes(predicted),
                seconds,
                limit: bytes(limit),
            });
        }
        if node.incoming >= policy.max_in_per_node {
            return Err(RejectReason::Busy {
                incoming: node.incoming,
            });
        }
        Ok(())
    }
}

/// The node that fits at the lowest cost.
pub(crate) fn best_node(cluster: &Cluster<'_>, newcomer: &Newcomer, asked: Option<usize>) -> Option<usize> {
    let numbers = match asked {
        Some(number) => number..number + 1,
        None => 0..cluster.nodes.len(),
    };
    let base = cluster.policy.cost_base;
    numbers
        .filter(|&number| newcomer.check(cluster, number).is_ok())
        .map(|number| (number, cluster.nodes[number].charge(base, newcomer.usage)))
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(number, _)| number)
}

/// Why each node cannot take it.
pub(crate) fn rejections(cluster: &Cluster<'_>, newcomer: &Newcomer, asked: Option<usize>) -> Vec<Rejection> {
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

fn explain(cluster: &Cluster<'_>, newcomer: &Newcomer, number: usize, asked: Option<usize>) -> String {
    let node = &cluster.nodes[number];
    let why = if asked.is_some() {
        "asked for"
    } else {
        "lowest cost of the nodes that fit"
    };
    format!(
        "{why}: load {:.2} to {:.2} on {} CPUs, memory {} to {} of {}",
        node.load_exported,
        node.load_exported + newcomer.usage.cpu,
        node.view.cpus,
        bytes(node.settled),
        bytes(node.settled + newcomer.usage.memory),
        node.view.memory,
    )
}
