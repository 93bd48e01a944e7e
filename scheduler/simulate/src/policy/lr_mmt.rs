//! LR-MMT of Beloglazov and Buyya, *Optimal online deterministic algorithms and adaptive heuristics for energy and performance
//! efficient dynamic consolidation of virtual machines in cloud data centers* (CCPE 24(13), 2012).
//!
//! - A host is overloaded when a line fitted to its last ten uses, weighted tricubically (Loess), times the safety parameter
//!   1.2, reaches 1 at the end of its longest migration. Until there are ten, when its use is above 0.7.
//! - The VM that migrates in the least time leaves, until the host is not overloaded.
//! - Power-aware best fit decreasing: VMs by falling CPU use, each to the host whose power grows least and that would not be
//!   overloaded with it.
//! - Then hosts by rising use are emptied, if all of their VMs find room on others that are switched on.
//!
//! The history of a host is that of the VMs that are on it now, as in the authors' CloudSim.

use std::collections::{HashMap, VecDeque};

use shoal_plan::{LaunchRequest, NodeName};

use super::digest::Digest;
use super::{Balancer, Move, Observation, Orders};
use crate::model::Scenario;
use crate::power::PowerModel;

const HISTORY: usize = 10;
const SAFETY: f64 = 1.2;
const FALLBACK: f64 = 0.7;
/// Seconds between rounds.
pub(super) const INTERVAL: f64 = 300.0;

/// Its state: what each VM used, the newest last, in work per second.
#[derive(Debug)]
pub(super) struct LrMmt {
    power: Vec<PowerModel>,
    link: f64,
    history: HashMap<String, VecDeque<f64>>,
}

/// The line through points at 1, 2, …, weighted tricubically with the last as centre: value at 1 + `ahead` past the last.
fn loess(values: &[f64], ahead: f64) -> f64 {
    let count = values.len() as f64;
    let (mut weights, mut xs, mut ys, mut xx, mut xy) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for (at, y) in values.iter().enumerate() {
        let x = at as f64 + 1.0;
        // The oldest would have weight 0; CloudSim gives the first two that of the third.
        let distance = (count - x.max(3.0)) / (count - 1.0);
        let weight = (1.0 - distance.powi(3)).powi(3);
        weights += weight;
        xs += weight * x;
        ys += weight * y;
        xx += weight * x * x;
        xy += weight * x * y;
    }
    let determinant = weights * xx - xs * xs;
    let slope = if determinant.abs() < 1e-12 {
        0.0
    } else {
        (weights * xy - xs * ys) / determinant
    };
    (ys - slope * xs) / weights + slope * (count + ahead)
}

struct Hosts<'a> {
    digest: Digest<'a>,
    /// Of each VM, by its number.
    histories: Vec<Vec<f64>>,
    /// Sums of those by host, the newest last.
    sums: Vec<[f64; HISTORY]>,
    power: &'a [PowerModel],
    link: f64,
}

impl Hosts<'_> {
    fn count(&mut self, vm: usize, host: usize, times: f64) {
        let history = &self.histories[vm];
        let skip = HISTORY - history.len();
        for (at, value) in history.iter().enumerate() {
            self.sums[host][skip + at] += times * value;
        }
    }

    /// Work per second wanted on the host.
    fn wanted(&self, host: usize) -> f64 {
        self.digest.nodes[host].cpu * self.digest.nodes[host].view.speed
    }

    fn utilisation(&self, host: usize) -> f64 {
        self.wanted(host) / self.digest.nodes[host].capacity
    }

    fn overloaded(&self, host: usize) -> bool {
        let node = &self.digest.nodes[host];
        if node.vms.is_empty() {
            return false;
        }
        let longest = node
            .vms
            .iter()
            .map(|&vm| self.histories[vm].len())
            .max()
            .unwrap_or(0);
        if longest < HISTORY {
            return self.utilisation(host) > FALLBACK;
        }
        let uses = self.sums[host].map(|sum| sum / node.capacity);
        let largest = node
            .vms
            .iter()
            .map(|&vm| self.digest.vms[vm].resident)
            .fold(0.0, f64::max);
        let intervals = (largest / self.link / INTERVAL).ceil();
        SAFETY * loess(&uses, intervals) >= 1.0
    }

    fn minimum_migration_time(&self, host: usize) -> Option<usize> {
        let movable = self.digest.nodes[host]
            .vms
            .iter()
            .copied()
            .filter(|&vm| self.digest.vms[vm].movable);
        movable.min_by(|&a, &b| {
            let (a, b) = (self.digest.vms[a].resident, self.digest.vms[b].resident);
            a.total_cmp(&b)
        })
    }

    fn put(&mut self, vm: usize, to: usize) {
        self.count(vm, to, 1.0);
        let work = self.work(vm);
        let (resident, declared) = (self.digest.vms[vm].resident, self.digest.vms[vm].declared);
        let node = &mut self.digest.nodes[to];
        node.cpu += work / node.view.speed;
        node.used += resident;
        node.declared += declared;
        node.vms.push(vm);
    }

    /// Work per second that a VM wants.
    fn work(&self, vm: usize) -> f64 {
        self.digest.vms[vm].cpu * self.digest.nodes[self.digest.vms[vm].node].view.speed
    }

    /// Power-aware best fit: where power grows least. `allowed` says which hosts.
    fn best_fit(&mut self, vm: usize, allowed: &[bool]) -> Option<usize> {
        let work = self.work(vm);
        let mut best: Option<(f64, usize)> = None;
        for host in (0..allowed.len()).filter(|&host| allowed[host]) {
            let node = &self.digest.nodes[host];
            let fits = node.used + self.digest.vms[vm].resident <= node.memory
                && work <= node.view.speed
                && self.wanted(host) + work <= node.capacity;
            if !fits {
                continue;
            }
            let empty = node.vms.is_empty();
            let (capacity, before) = (node.capacity, self.utilisation(host));
            let power = self.power[host];
            let off = if empty { 0.0 } else { power.watts(before) };
            let grows = power.watts(before + work / capacity) - off;
            if best.is_some_and(|best| grows >= best.0) {
                continue;
            }
            self.put(vm, host);
            let overloaded = !empty && self.overloaded(host);
            self.take(vm, host);
            if !overloaded {
                best = Some((grows, host));
            }
        }
        best.map(|(_, host)| host)
    }

    fn take(&mut self, vm: usize, host: usize) {
        self.count(vm, host, -1.0);
        let work = self.work(vm);
        let (resident, declared) = (self.digest.vms[vm].resident, self.digest.vms[vm].declared);
        let node = &mut self.digest.nodes[host];
        node.cpu -= work / node.view.speed;
        node.used -= resident;
        node.declared -= declared;
        node.vms.retain(|&other| other != vm);
    }

    fn by_falling_use(&self, vms: &mut [usize]) {
        vms.sort_by(|&a, &b| self.work(b).total_cmp(&self.work(a)).then(a.cmp(&b)));
    }

    /// Overloaded hosts shed, and what they shed finds a place.
    fn relieve(&mut self, moves: &mut Vec<(usize, usize)>) -> Vec<bool> {
        let overloaded: Vec<bool> = (0..self.digest.nodes.len())
            .map(|host| self.overloaded(host))
            .collect();
        let mut lifted = Vec::new();
        for host in (0..overloaded.len()).filter(|&host| overloaded[host]) {
            while let Some(vm) = self.minimum_migration_time(host) {
                self.take(vm, host);
                lifted.push(vm);
                if !self.overloaded(host) {
                    break;
                }
            }
        }
        self.by_falling_use(&mut lifted);
        let allowed: Vec<bool> = overloaded.iter().map(|overloaded| !overloaded).collect();
        for vm in lifted {
            match self.best_fit(vm, &allowed) {
                Some(to) => {
                    self.put(vm, to);
                    moves.push((vm, to));
                }
                None => self.put(vm, self.digest.vms[vm].node),
            }
        }
        overloaded
    }

    /// Hosts by rising use are emptied, where all of their VMs find room.
    fn empty(&mut self, overloaded: &[bool], moves: &mut Vec<(usize, usize)>) {
        let count = self.digest.nodes.len();
        let off: Vec<bool> = (0..count)
            .map(|host| self.digest.nodes[host].vms.is_empty())
            .collect();
        let mut tried: Vec<bool> = (0..count).map(|host| overloaded[host] || off[host]).collect();
        let mut allowed: Vec<bool> = tried.iter().map(|tried| !tried).collect();
        // A host that VMs have just been sent to stays on.
        for &(_, to) in moves.iter() {
            tried[to] = true;
        }
        loop {
            let candidates = (0..count).filter(|&host| !tried[host] && self.digest.nodes[host].incoming == 0);
            let Some(host) = candidates.min_by(|&a, &b| self.utilisation(a).total_cmp(&self.utilisation(b)))
            else {
                return;
            };
            tried[host] = true;
            allowed[host] = false;
            let mut vms = self.digest.nodes[host].vms.clone();
            vms.retain(|&vm| self.digest.vms[vm].movable);
            self.by_falling_use(&mut vms);
            let mut planned = Vec::new();
            for &vm in &vms {
                let Some(to) = self.best_fit(vm, &allowed) else {
                    break;
                };
                self.put(vm, to);
                planned.push((vm, to));
            }
            if planned.len() == vms.len() {
                for &(vm, to) in &planned {
                    self.take(vm, host);
                    tried[to] = true;
                    moves.push((vm, to));
                }
            } else {
                for (vm, to) in planned {
                    self.take(vm, to);
                }
            }
        }
    }
}

impl LrMmt {
    pub fn new(scenario: &Scenario) -> Self {
        Self {
            power: scenario.nodes.iter().map(|node| node.power).collect(),
            link: scenario.migration.link,
            history: HashMap::new(),
        }
    }

    fn hosts<'a>(&'a self, seen: &Observation<'a>) -> Hosts<'a> {
        let digest = Digest::new(seen);
        let histories: Vec<Vec<f64>> = digest
            .vms
            .iter()
            .map(|vm| {
                let history = self.history.get(vm.view.id.as_str());
                history.map_or_else(Vec::new, |history| history.iter().copied().collect())
            })
            .collect();
        let mut hosts = Hosts {
            sums: vec![[0.0; HISTORY]; digest.nodes.len()],
            digest,
            histories,
            power: &self.power,
            link: self.link,
        };
        for vm in 0..hosts.digest.vms.len() {
            hosts.count(vm, hosts.digest.vms[vm].node, 1.0);
        }
        hosts
    }

    fn remember(&mut self, seen: &Observation<'_>) {
        let digest = Digest::new(seen);
        let mut history = HashMap::with_capacity(digest.vms.len());
        for vm in &digest.vms {
            let mut uses = self.history.remove(vm.view.id.as_str()).unwrap_or_default();
            uses.push_back(vm.cpu * digest.nodes[vm.node].view.speed);
            if uses.len() > HISTORY {
                uses.pop_front();
            }
            history.insert(vm.view.id.as_str().to_owned(), uses);
        }
        self.history = history;
    }
}

impl Balancer for LrMmt {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let digest = Digest::new(seen);
        digest.cheapest(request, |host| {
            let node = &digest.nodes[host];
            let part = |cpu: f64| cpu / node.cpus;
            let full = part(node.cpu + f64::from(request.cpus)) > FALLBACK && !node.vms.is_empty();
            let before = if node.vms.is_empty() {
                0.0
            } else {
                self.power[host].watts(part(node.cpu))
            };
            let grows = self.power[host].watts(part(node.cpu + f64::from(request.cpus))) - before;
            if full { 1e6 + part(node.cpu) } else { grows }
        })
    }

    fn round(&mut self, seen: &Observation<'_>) -> Orders {
        self.remember(seen);
        let mut hosts = self.hosts(seen);
        let mut moves = Vec::new();
        let overloaded = hosts.relieve(&mut moves);
        hosts.empty(&overloaded, &mut moves);
        let named = moves.into_iter().map(|(vm, to)| {
            let (vm, to) = (&hosts.digest.vms[vm], &hosts.digest.nodes[to]);
            Move::new(vm.view.id.clone(), to.view.name.clone())
        });
        named.collect::<Vec<Move>>().into()
    }

    fn interval(&self) -> f64 {
        INTERVAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_goes_through_a_line() {
        let values: Vec<f64> = (1..=10).map(|x| 0.05 * f64::from(x)).collect();
        assert!((loess(&values, 1.0) - 0.55).abs() < 1e-9);
        // The newest weigh most: a line through points of equal weight would be at 0.43.
        let mut late = vec![0.2; 10];
        (late[8], late[9]) = (0.4, 0.6);
        assert!(loess(&late, 1.0) > 0.45);
    }
}
