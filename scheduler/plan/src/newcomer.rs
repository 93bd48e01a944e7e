//! A VM that looks for a node, and the filters: each says why a node cannot take it.

use std::sync::Arc;

use crate::cluster::{Cluster, Node, Vm, bytes, expected_resident, is_exclusive};
use crate::cpus::CpuLimit;
use crate::failover::{Change, Failover, need};
use crate::kvm::{Kernels, KvmNeed};
use crate::labels::Rules;
use crate::model::{CpuClass, NodeState, NodeView};
use crate::place::{Largest, LaunchRequest};
use crate::policy::Policy;
use crate::reject::RejectReason;
use crate::score::Use;
use crate::together::{Apart, Marks};

/// Other VMs that are thought to come to a node, or to leave it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Beside {
    pub declared: f64,
    pub vcpus: f64,
    pub cpu: f64,
    pub memory: f64,
    pub at_horizon: f64,
    /// VMs that leave.
    pub gone: usize,
    /// Of these, those that had the node for themselves.
    pub exclusive_gone: usize,
}

/// A VM that looks for a node.
#[derive(Debug)]
pub(crate) struct Newcomer<'a> {
    pub cpus: u32,
    /// What vCPUs count against.
    cpu_limit: CpuLimit,
    pub declared: f64,
    /// Expected at once.
    pub usage: Use,
    /// Expected at the policy's horizon.
    at_horizon: f64,
    cpu_class: Option<&'a CpuClass>,
    /// What it can boot where it starts.
    kernels: Option<&'a Kernels>,
    /// Of the KVM where it goes on.
    kvm: KvmNeed,
    rules: Option<&'a Rules>,
    pub marks: Marks,
    /// Where it is.
    from: Option<usize>,
    /// It leaves whether or not those stay that it asks to be with.
    must_leave: bool,
    /// Someone asked for this node: what failed there is tried again.
    pub undeterred: bool,
    /// The cluster must fit without any one node afterwards.
    pub n_plus_one: bool,
    /// What else comes to the node, or leaves it in exchange.
    pub beside: Beside,
    /// Nodes that are kept for those who have waited long are not for it.
    pub in_turn: bool,
    /// Later is soon enough: limits do not count.
    patient: bool,
    /// For automatic moves: the part of a node's memory that growth must not pass. They obey the limits, too.
    ahead: Option<f64>,
    /// Declared memory does not count, and this part of a node's memory may be held: see [`crate::usher`].
    last_resort: Option<f64>,
}

impl<'a> Newcomer<'a> {
    pub fn launch(cluster: &Cluster<'a>, request: &'a LaunchRequest) -> Self {
        let expected = expected_resident(request.memory, cluster.policy);
        let rules = request.rules.as_deref();
        Self {
            cpus: request.cpus,
            cpu_limit: if request.queued {
                CpuLimit::Slots
            } else {
                CpuLimit::Overcommit
            },
            declared: request.memory.0 as f64,
            usage: Use {
                cpu: f64::from(request.cpus),
                memory: expected,
            },
            at_horizon: expected,
            cpu_class: request.cpu_class.as_ref(),
            kernels: request.kernels.as_deref(),
            kvm: KvmNeed::Unknown,
            rules,
            marks: cluster.together.marks_of(&request.labels, rules),
            from: None,
            must_leave: false,
            undeterred: request.node.is_some(),
            n_plus_one: true,
            beside: Beside::default(),
            in_turn: false,
            patient: false,
            ahead: None,
            last_resort: None,
        }
    }

    /// A VM moved because someone asked for it.
    pub fn migration(cluster: &Cluster<'a>, number: usize) -> Self {
        let vm: &Vm<'a> = &cluster.vms[number];
        Self {
            cpus: vm.view.cpus,
            cpu_limit: CpuLimit::Free,
            declared: vm.declared,
            usage: vm.usage(),
            at_horizon: vm.memory_there(cluster.policy.usher_horizon.as_secs_f64()),
            cpu_class: vm.view.cpu_class.as_ref(),
            kernels: None,
            kvm: cluster.kvm_need(number),
            rules: vm.view.rules.as_deref(),
            marks: cluster.together.marks(number).clone(),
            from: Some(vm.node),
            must_leave: false,
            undeterred: false,
            n_plus_one: false,
            beside: Beside::default(),
            in_turn: false,
            patient: false,
            ahead: None,
            last_resort: None,
        }
    }

    /// A VM that a plan moves off its node: its destination must stay below the threshold, growth counted.
    pub fn evicted(cluster: &Cluster<'a>, vm: usize) -> Self {
        Self {
            ahead: Some(cluster.policy.usher_threshold),
            must_leave: true,
            ..Self::migration(cluster, vm)
        }
    }

    /// One that must leave where it is, or be killed there: its destination must stay below this part of its memory.
    pub fn last_resort(cluster: &Cluster<'a>, vm: usize, part: f64) -> Self {
        Self {
            ahead: Some(part),
            last_resort: Some(part),
            ..Self::evicted(cluster, vm)
        }
    }

    /// A VM that a plan moves to where its rules hold: its destination must stay below the threshold, growth counted.
    pub fn corrected(cluster: &Cluster<'a>, vm: usize) -> Self {
        Self {
            must_leave: false,
            ..Self::evicted(cluster, vm)
        }
    }

    /// A VM that a plan has suspended, and that is to run on where it goes: its destination must stay below the target with it.
    pub fn to_run_on(cluster: &Cluster<'a>, vm: usize) -> Self {
        Self {
            ahead: Some(cluster.policy.usher_target),
            ..Self::corrected(cluster, vm)
        }
    }

    /// A VM that a plan moves for balance: its destination must stay below the target, growth counted.
    pub fn balanced(cluster: &Cluster<'a>, vm: usize) -> Self {
        Self {
            ahead: Some(cluster.policy.usher_target),
            cpu_limit: CpuLimit::Overcommit,
            n_plus_one: cluster.failover.as_ref().is_some_and(Failover::is_safe),
            ..Self::migration(cluster, vm)
        }
    }

    /// A VM that a plan exchanges for another, which makes room for it.
    pub fn exchanged(cluster: &Cluster<'a>, vm: usize, makes_room: f64) -> Self {
        Self {
            beside: Beside {
                at_horizon: -makes_room,
                ..Beside::default()
            },
            ..Self::balanced(cluster, vm)
        }
    }

    /// A VM of a node that is to be emptied, now or later.
    pub fn packed(cluster: &Cluster<'a>, vm: usize) -> Self {
        Self {
            patient: true,
            ..Self::balanced(cluster, vm)
        }
    }

    /// What it means for N+1 if it comes to a node.
    pub fn change(&self, policy: &Policy, to: usize) -> Change {
        Change {
            to,
            from: self.from,
            need: need(policy, self.declared, self.usage.memory),
        }
    }

    /// vCPUs it declares.
    pub fn vcpus(&self) -> f64 {
        f64::from(self.cpus)
    }

    /// It has its node for itself.
    pub fn is_exclusive(&self) -> bool {
        is_exclusive(self.rules)
    }

    /// Bytes it will hold at the horizon.
    pub fn at_horizon(&self) -> f64 {
        self.at_horizon
    }

    /// Whether a node can take it.
    pub fn check(&self, cluster: &Cluster<'_>, number: usize) -> Result<(), RejectReason> {
        self.check_node(cluster, number)?;
        self.check_failover(cluster, number)
    }

    /// The same but for N+1, which takes longer.
    pub fn check_node(&self, cluster: &Cluster<'_>, number: usize) -> Result<(), RejectReason> {
        let (policy, node) = (cluster.policy, &cluster.nodes[number]);
        if self.from == Some(number) {
            return Err(RejectReason::SameNode);
        }
        self.kvm.check(node.view)?;
        if let Some(kernels) = self.kernels {
            kernels.check(self.cpus, node.view)?;
        }
        if node.view.state != NodeState::Ready {
            return Err(RejectReason::NotReady(node.view.state));
        }
        let from = self.from.map(|from| &cluster.nodes[from].view.name);
        if let Some(why) = node.view.fails(from).filter(|_| !self.undeterred) {
            return Err(RejectReason::Failing { why: Arc::clone(why) });
        }
        self.check_rules(cluster, number)?;
        if self.in_turn && node.kept {
            return Err(RejectReason::Kept);
        }
        if self.cpus > node.view.cpus {
            return Err(RejectReason::TooFewCpus {
                needed: self.cpus,
                has: node.view.cpus,
            });
        }
        if let Some(lacking) = self.cpu_class.and_then(|class| node.view.lacks(class)) {
            return Err(RejectReason::CpuFeatures {
                lacking: lacking.clone(),
            });
        }
        if let Some(from) = self.from.map(|from| cluster.nodes[from].view)
            && from.migration_tls != node.view.migration_tls
        {
            return Err(RejectReason::Tls {
                from: from.name.clone(),
                from_lacks: !from.migration_tls,
            });
        }
        let limit = node.lends * policy.overcommit;
        let committed = node.committed + self.beside.declared;
        if self.last_resort.is_none() && committed + self.declared > limit {
            let (declared, needed) = (bytes(committed), bytes(self.declared));
            return Err(RejectReason::Committed {
                declared,
                needed,
                limit: bytes(limit),
            });
        }
        self.cpu_limit.check(policy, node, self.cpus, &self.beside)?;
        let limit = node.memory * self.last_resort.unwrap_or(policy.usher_threshold);
        let occupied = node.occupied + self.beside.memory;
        if occupied + self.usage.memory > limit {
            let (used, needed) = (bytes(occupied), bytes(self.usage.memory));
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

    /// Whether its image has no kernel for a node, or one with too few CPUs, which lasts.
    pub fn never_starts(&self, cluster: &Cluster<'_>, number: usize) -> bool {
        let starts = |kernels: &Kernels| kernels.check(self.cpus, cluster.nodes[number].view);
        self.kernels
            .is_some_and(|kernels| starts(kernels).is_err_and(|reason| reason.is_of_kvm()))
    }

    /// What one VM that comes as this one may have on a node if that is ready and empty and nothing of it reserved.
    pub fn most_there(&self, cluster: &Cluster<'_>, number: usize) -> Largest {
        let (policy, node) = (cluster.policy, &cluster.nodes[number]);
        let cpus = f64::from(node.view.cpus);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // not negative, and no more than its CPUs
        let cpus = self.cpu_limit.most(policy, cpus).min(cpus) as u32;
        // So much is expected of it: see `expected_resident`.
        let expected = node.memory * policy.usher_threshold;
        Largest {
            cpus,
            memory: bytes(node.memory.min(expected) * policy.overcommit),
        }
    }

    fn check_rules(&self, cluster: &Cluster<'_>, number: usize) -> Result<(), RejectReason> {
        self.check_labels(cluster.nodes[number].view)?;
        self.check_exclusive(cluster, number)?;
        if cluster.together.is_empty() {
            return Ok(());
        }
        let against = cluster
            .together
            .against(&self.marks, number, self.from, self.must_leave);
        against.map_or(Ok(()), |apart| Err(apart.into()))
    }

    /// What it asks of the node's labels and taints.
    pub fn check_labels(&self, node: &NodeView) -> Result<(), RejectReason> {
        if let Some(rules) = self.rules
            && let Some(term) = rules.selector.iter().find(|term| !term.matches(&node.labels))
        {
            return Err(RejectReason::Selector { term: term.clone() });
        }
        if let Some(taint) = Rules::untolerated(self.rules, &node.taints) {
            return Err(RejectReason::Taint { taint: taint.clone() });
        }
        Ok(())
    }

    /// A node that one VM has for itself, in both directions.
    fn check_exclusive(&self, cluster: &Cluster<'_>, number: usize) -> Result<(), RejectReason> {
        let node = &cluster.nodes[number];
        let vms = (node.vms.len() + node.reserved).saturating_sub(self.beside.gone);
        if self.is_exclusive() && vms > 0 {
            return Err(RejectReason::NotAlone { vms });
        }
        if node.exclusive > self.beside.exclusive_gone {
            let views = node.vms.iter().map(|&vm| cluster.vms[vm].view);
            let mut of_its_own = views.filter(|view| is_exclusive(view.rules.as_deref()));
            let vm = of_its_own.next().map(|view| Arc::clone(&view.name));
            return Err(RejectReason::Exclusive { vm });
        }
        Ok(())
    }

    pub fn check_failover(&self, cluster: &Cluster<'_>, number: usize) -> Result<(), RejectReason> {
        let Some(failover) = cluster.failover.as_ref().filter(|_| self.n_plus_one) else {
            return Ok(());
        };
        match failover.shortfall(Some(self.change(cluster.policy, number))) {
            None => Ok(()),
            Some(shortfall) => Err(RejectReason::NPlusOne {
                node: cluster.nodes[shortfall.node].view.name.clone(),
                needed: bytes(shortfall.needed),
                room: bytes(shortfall.room),
            }),
        }
    }

    /// Whether some node, or the one asked for, has room and only takes as many as allowed right now.
    pub fn waits_for_a_move(&self, cluster: &Cluster<'_>, asked: Option<usize>) -> bool {
        let busy = |number| matches!(self.check(cluster, number), Err(RejectReason::Busy { .. }));
        match asked {
            Some(asked) => busy(asked),
            None => (0..cluster.nodes.len()).any(busy),
        }
    }

    fn check_ahead(&self, policy: &Policy, node: &Node<'_>, ahead: f64) -> Result<(), RejectReason> {
        let (predicted, limit) = (
            node.projected + self.beside.at_horizon + self.at_horizon,
            node.memory * ahead,
        );
        if predicted > limit {
            let seconds = policy.usher_horizon.as_secs();
            return Err(RejectReason::Growth {
                predicted: bytes(predicted),
                seconds,
                limit: bytes(limit),
            });
        }
        if node.incoming >= policy.max_in_per_node && !self.patient {
            return Err(RejectReason::Busy {
                incoming: node.incoming,
            });
        }
        Ok(())
    }
}

impl From<Apart<'_>> for RejectReason {
    fn from(apart: Apart<'_>) -> Self {
        match apart {
            Apart::Missing(term) => Self::Affinity { term: term.clone() },
            Apart::Refused(term) => Self::AntiAffinity { term: term.clone() },
            Apart::Refuses(term) => Self::AntiAffinityThere { term: term.clone() },
        }
    }
}
