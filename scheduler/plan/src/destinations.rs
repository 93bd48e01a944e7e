//! Where a VM may go in a large cluster: not every node is tried for every VM, but those where an average VM costs least, of
//! the nodes that are as it asks. They are found once for all VMs that ask the same.

use std::collections::HashMap;
use std::rc::Rc;

use crate::cluster::Cluster;
use crate::kvm::KvmNeed;
use crate::labels::{Rules, Term};
use crate::model::{CpuClass, NodeState};
use crate::score::Use;

/// So many, or four times the migrations at once. Small clusters are tried whole.
const FEWEST: usize = 64;

/// What of a VM decides which nodes can ever take it.
type Asked<'a> = (&'a [Term], &'a [Term], Option<&'a CpuClass>, KvmNeed);

/// The nodes to try, by what is asked.
#[derive(Debug)]
pub(crate) struct Destinations<'a> {
    /// Ready nodes that no VM has for itself, those where an average VM costs least first.
    by_cost: Vec<usize>,
    found: HashMap<Asked<'a>, Rc<[usize]>>,
    count: usize,
}

impl<'a> Destinations<'a> {
    pub fn new(cluster: &Cluster<'a>) -> Self {
        let rate = cluster.cost_rate;
        let count = cluster.vms.len().max(1) as f64;
        let average = Use {
            cpu: cluster.vms.iter().map(|vm| vm.demand).sum::<f64>() / count,
            memory: cluster.vms.iter().map(|vm| vm.resident).sum::<f64>() / count,
        };
        let mut nodes: Vec<(usize, f64)> = (0..cluster.nodes.len())
            .filter(|&node| {
                let node = &cluster.nodes[node];
                node.view.state == NodeState::Ready && node.exclusive == 0
            })
            .map(|node| (node, cluster.nodes[node].charge(rate, average)))
            .collect();
        nodes.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        Self {
            by_cost: nodes.into_iter().map(|(node, _)| node).collect(),
            found: HashMap::new(),
            count: FEWEST.max(4 * cluster.policy.max_migrations),
        }
    }

    /// Ready nodes, those where an average VM cost least at first before others.
    pub fn cheapest(&self) -> impl Iterator<Item = usize> + '_ {
        self.by_cost.iter().copied()
    }

    /// Those for a VM, by number.
    pub fn of(&mut self, cluster: &Cluster<'a>, vm: usize) -> Rc<[usize]> {
        let view = cluster.vms[vm].view;
        let rules = view.rules.as_deref();
        let terms = |of: fn(&'a Rules) -> &'a [Term]| rules.map_or(&[] as &[Term], of);
        let asked = (
            terms(|rules| &rules.selector),
            terms(|rules| &rules.tolerations),
            view.cpu_class.as_ref(),
            cluster.kvm_need(vm),
        );
        let (by_cost, count) = (&self.by_cost, self.count);
        let found = self.found.entry(asked).or_insert_with(|| {
            let fits = |node: &&usize| {
                let node = cluster.nodes[**node].view;
                asked.0.iter().all(|term| term.matches(&node.labels))
                    && Rules::untolerated(rules, &node.taints).is_none()
                    && asked.2.is_none_or(|class| node.lacks(class).is_none())
                    && asked.3.check(node).is_ok()
            };
            let mut nodes: Vec<usize> = by_cost.iter().filter(fits).take(count).copied().collect();
            nodes.sort_unstable();
            nodes.into()
        });
        let together = cluster.together.places(vm, self.count);
        if together.is_empty() {
            return Rc::clone(found);
        }
        let mut nodes: Vec<usize> = found.iter().copied().chain(together).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes.into()
    }
}
