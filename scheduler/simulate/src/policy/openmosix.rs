//! openMosix, from what is published: the constants of Kerrighed's `mosix_probe.c` and `mosix_load_balancer.c`, which name
//! MOSIX as their origin, and Barak and Braverman's memory ushering.
//!
//! - Every second each node tells two random others its exported load; each decides by what it has been told, old or not.
//! - It moves when the exported load there plus 130 % of the process is below its own local mean. The process is the second
//!   most loaded one. One at a time.
//! - A node that runs out of memory moves a process to one with room, whatever the loads. The threshold is not published:
//!   here, less than 5 % free. The process that leaves the least above it goes, to the node with the most room.

use shoal_plan::{LaunchRequest, NodeName};

use super::digest::Digest;
use super::{Balancer, Observation, Orders};
use crate::random::Random;

const TOLD: usize = 2;
/// Percent of a process's load that is counted at the destination.
const STABILITY: f64 = 1.30;
/// A node knows so many others at most; the oldest news is forgotten.
const VECTOR: usize = 8;
const FREE: f64 = 0.05;

/// News of a node.
#[derive(Debug, Clone, Copy)]
struct News {
    about: usize,
    load: f64,
    free: f64,
}

/// Its state: what each node knows of others, the newest last.
#[derive(Debug)]
pub(super) struct OpenMosix {
    random: Random,
    known: Vec<Vec<News>>,
}

impl OpenMosix {
    pub fn new(seed: u64) -> Self {
        Self {
            random: Random::fork(seed, "dissemination"),
            known: Vec::new(),
        }
    }

    fn tell(&mut self, digest: &Digest<'_>) {
        let count = digest.nodes.len();
        self.known.resize(count, Vec::new());
        for (about, node) in digest.nodes.iter().enumerate() {
            let news = News {
                about,
                load: node.queue.exported / (node.cpus * node.view.speed),
                free: node.memory - node.used,
            };
            for _ in 0..TOLD {
                let to = self.random.below(count);
                if to == about {
                    continue;
                }
                let known = &mut self.known[to];
                known.retain(|other| other.about != about);
                known.push(news);
                if known.len() > VECTOR {
                    known.remove(0);
                }
            }
        }
    }

    /// Off a node whose memory runs out.
    fn usher(&self, digest: &Digest<'_>, from: usize) -> Option<(usize, usize)> {
        let node = &digest.nodes[from];
        let needed = node.used - node.memory * (1.0 - FREE);
        if needed <= 0.0 || node.outgoing > 0 {
            return None;
        }
        let mut vms: Vec<usize> = node
            .vms
            .iter()
            .copied()
            .filter(|&vm| digest.vms[vm].movable)
            .collect();
        // The smallest that is enough, or else the largest.
        vms.sort_by(|&a, &b| {
            let key = |vm: usize| {
                let resident = digest.vms[vm].resident;
                if resident >= needed {
                    (0, resident)
                } else {
                    (1, -resident)
                }
            };
            let (a, b) = (key(a), key(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
        let mut others: Vec<&News> = self.known[from].iter().collect();
        others.sort_by(|a, b| b.free.total_cmp(&a.free).then(a.about.cmp(&b.about)));
        vms.into_iter().find_map(|vm| {
            let to = others
                .iter()
                .find(|other| other.free > digest.vms[vm].resident && digest.fits(vm, other.about))?;
            Some((vm, to.about))
        })
    }

    /// The published rule.
    fn balance(&self, digest: &Digest<'_>, from: usize) -> Option<(usize, usize)> {
        let node = &digest.nodes[from];
        if node.outgoing > 0 || node.incoming > 0 {
            return None;
        }
        let mut vms: Vec<usize> = node
            .vms
            .iter()
            .copied()
            .filter(|&vm| digest.vms[vm].movable)
            .collect();
        vms.sort_by(|&a, &b| digest.vms[b].cpu.total_cmp(&digest.vms[a].cpu).then(a.cmp(&b)));
        let vm = *vms.get(1).or(vms.first())?;
        let own = node.queue.local / (node.cpus * node.view.speed);
        let mut best: Option<(f64, usize)> = None;
        for other in &self.known[from] {
            let there = &digest.nodes[other.about];
            let load = other.load + STABILITY * digest.vms[vm].cpu / (there.cpus * there.view.speed);
            if load < own && best.is_none_or(|best| load < best.0) && digest.fits(vm, other.about) {
                best = Some((load, other.about));
            }
        }
        best.map(|(_, to)| (vm, to))
    }
}

impl Balancer for OpenMosix {
    /// As `mosrun -b`: the best node now.
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let digest = Digest::new(seen);
        digest.cheapest(request, |node| {
            let node = &digest.nodes[node];
            node.cpu.max(node.queue.exported) / (node.cpus * node.view.speed)
        })
    }

    fn round(&mut self, seen: &Observation<'_>) -> Orders {
        let mut digest = Digest::new(seen);
        self.tell(&digest);
        let mut moves = Vec::new();
        for from in 0..digest.nodes.len() {
            if let Some((vm, to)) = self.usher(&digest, from).or_else(|| self.balance(&digest, from)) {
                // Each node decides for itself: only the executor's limits tell that another has sent there too.
                moves.push(digest.apply(vm, to));
            }
        }
        moves.into()
    }
}
