//! What moves do, in words of effect: how much longer the work of VMs takes than if each had the CPUs that it wants, how full
//! nodes are, how long a move takes and for how long it pauses the VM. Decisions are made by cost ([`crate::score`]); people
//! are told this.

use crate::cluster::{Cluster, Node, bytes};
use crate::cost::{Cost, Terms};

/// A node before and after.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Change<'a> {
    node: &'a Node<'a>,
    cpu: f64,
    memory: f64,
}

impl<'a> Change<'a> {
    /// What comes to it, less what leaves.
    pub fn new(node: &'a Node<'a>, cpu: f64, memory: f64) -> Self {
        Self { node, cpu, memory }
    }

    fn loads(&self) -> (f64, f64) {
        (self.node.load, (self.node.load + self.cpu).max(0.0))
    }

    /// Parts of its memory that are held.
    pub fn parts_of_memory(&self) -> (f64, f64) {
        let part = |held: f64| held / self.node.memory.max(1.0);
        (part(self.node.settled), part(self.node.settled + self.memory))
    }

    /// How much longer work takes there.
    pub fn slowdowns(&self) -> (f64, f64) {
        let (before, after) = self.parts_of_cpu();
        (before.max(1.0), after.max(1.0))
    }

    fn parts_of_cpu(&self) -> (f64, f64) {
        let (before, after) = self.loads();
        (before / self.node.cpu_capacity, after / self.node.cpu_capacity)
    }
}

impl Node<'_> {
    /// How much longer work takes here than if each VM had the CPUs that it wants: 1 where there are enough.
    pub fn slowdown(&self) -> f64 {
        (self.load / self.cpu_capacity).max(1.0)
    }
}

impl Cluster<'_> {
    /// The mean of that over all VMs of reachable nodes, weighed by what they want; 1 if none wants any.
    pub fn slowdown(&self) -> f64 {
        let (mut wanted, mut slowed) = (0.0, 0.0);
        for vm in &self.vms {
            let node = vm.to.filter(|_| vm.leaving).unwrap_or(vm.node);
            wanted += vm.demand;
            slowed += vm.demand * self.nodes[node].slowdown();
        }
        if wanted > 0.0 { slowed / wanted } else { 1.0 }
    }
}

/// What two nodes are like before and after one or two moves between them, in at most a line.
pub(crate) fn headline(from: Change<'_>, to: Change<'_>, cost: Cost) -> String {
    let names = [&from, &to].map(|change| change.node.view.name.as_str());
    let both = |what: &str, of: [String; 2]| {
        let [first, second] = of;
        format!("{what} on {} {first}, on {} {second}", names[0], names[1])
    };
    let slowed = |change: &Change<'_>| change.parts_of_cpu().0 > 1.0 || change.parts_of_cpu().1 > 1.0;
    let what = if !is_about_cpu(&from) {
        both(
            "memory",
            [&from, &to].map(|change| percents(change.parts_of_memory())),
        )
    } else if slowed(&from) || slowed(&to) {
        let times = |change: &Change<'_>| {
            let (before, after) = change.slowdowns();
            pair(&format!("{before:.1}"), &format!("{after:.1}"))
        };
        both("slowdown", [times(&from), times(&to)])
    } else {
        both("CPU", [&from, &to].map(|change| percents(change.parts_of_cpu())))
    };
    format!(
        "{what}; takes {:.1} s, pause {:.0} ms",
        cost.seconds,
        cost.downtime * 1e3
    )
}

/// The same with all figures, and when what is gained outweighs the move.
pub(crate) fn details(changes: [Change<'_>; 2], benefit: f64, cost: Cost) -> String {
    let of = |change: Change<'_>| {
        let ((load, load_then), node) = (change.loads(), change.node);
        format!(
            "{}: load {load:.2} to {load_then:.2} on {} CPUs, {} to {} of {}",
            node.view.name,
            node.view.cpus,
            bytes(node.settled),
            bytes(node.settled + change.memory),
            node.view.memory,
        )
    };
    let seconds = Terms::pays_back_after(benefit, cost).as_secs_f64().ceil();
    let [first, second] = changes.map(of);
    format!("{first}; {second}; outweighs the move after {seconds:.0} s")
}

/// It relieves the CPUs rather than the memory of the node.
fn is_about_cpu(from: &Change<'_>) -> bool {
    let falls = |(before, after): (f64, f64)| before - after;
    falls(from.parts_of_cpu()) >= falls(from.parts_of_memory())
}

fn percents((before, after): (f64, f64)) -> String {
    let percent = |part: f64| format!("{:.0} %", part * 100.0);
    pair(&percent(before), &percent(after))
}

fn pair(before: &str, after: &str) -> String {
    if before == after {
        before.to_owned()
    } else {
        format!("{before} to {after}")
    }
}
