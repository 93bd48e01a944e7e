//! What is never as smooth as a model: figures of a second, instants that are taken for a load, reports that come late,
//! predictions, VMs that boot, and other users of the hosts.
//!
//! A draw depends on the seed, on what it is for and on its number, and on nothing else: not on what a policy did before. So all
//! policies meet the same noise.

use crate::model::NodeSpec;
use crate::random::Random;
use crate::world::Tenant;

/// How much of it there is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    /// Standard deviation of a second's CPU use, as a part of it.
    pub cpu: f64,
    /// A node's load as common tools see it is the number of threads that are runnable at one instant, instead of a mean.
    pub queue: bool,
    /// Probability that at such an instant a thread of a VM's monitor is runnable, too.
    pub shadow: f64,
    /// Reports come up to so many seconds late.
    pub delay: f64,
    /// What a policy is told of a link is off by up to this part, and so is how long it expects a move to take.
    pub link: f64,
    /// The same for how fast a VM dirties memory.
    pub dirty: f64,
    /// Seconds that a VM boots, ± a half: it wants a whole CPU and grows to what it holds afterwards.
    pub boot: f64,
    /// Part of the time that other tenants use something of a host.
    pub tenants: f64,
    /// Part of its CPUs that they then want at most.
    pub tenant_cpu: f64,
    /// Part of its memory that they then hold at most.
    pub tenant_memory: f64,
    /// Seconds that they stay on average.
    pub tenant_stays: f64,
}

impl Default for Noise {
    fn default() -> Self {
        Self {
            cpu: 0.1,
            queue: true,
            shadow: 0.1,
            delay: 2.0,
            link: 0.3,
            dirty: 0.3,
            boot: 8.0,
            tenants: 0.2,
            tenant_cpu: 0.25,
            tenant_memory: 0.03,
            tenant_stays: 60.0,
        }
    }
}

/// What a draw is for.
#[derive(Debug, Clone, Copy)]
enum Of {
    Cpu = 1,
    Queue,
    Delay,
    Link,
    Dirty,
    Boot,
    Tenant,
    TenantFirst,
    TenantSize,
}

/// The seed of all draws of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(Random::fork(seed, "noise").bits())
    }

    fn draw(self, of: Of, who: usize, number: u64) -> Random {
        let mut random = Random::new(self.0 ^ (of as u64) << 56 ^ (who as u64) << 32 ^ number);
        // Neighbours differ by a bit; after one step they have nothing in common.
        Random::new(random.bits())
    }
}

impl Noise {
    /// None at all.
    pub const OFF: Self = Self {
        cpu: 0.0,
        queue: false,
        shadow: 0.0,
        delay: 0.0,
        link: 0.0,
        dirty: 0.0,
        boot: 0.0,
        tenants: 0.0,
        tenant_cpu: 0.0,
        tenant_memory: 0.0,
        tenant_stays: 60.0,
    };

    /// Factor on what a VM, or what else runs on a node, was seen to use in the second before a report.
    pub(crate) fn cpu_error(&self, chance: Chance, who: usize, report: u64) -> f64 {
        if self.cpu <= 0.0 {
            return 1.0;
        }
        (1.0 + self.cpu * chance.draw(Of::Cpu, who, report).normal()).max(0.0)
    }

    /// Threads of a VM that are runnable at an instant, if each of its CPUs is wanted for a part of the time.
    pub(crate) fn runnable(&self, chance: Chance, who: usize, report: u64, cpus: u32, wanted: f64) -> f64 {
        if !self.queue {
            return wanted;
        }
        let mut random = chance.draw(Of::Queue, who, report);
        let part = wanted / f64::from(cpus.max(1));
        let mut threads = 0.0;
        for _ in 0..cpus {
            threads += if random.unit() < part { 1.0 } else { 0.0 };
        }
        threads + if random.unit() < self.shadow { 1.0 } else { 0.0 }
    }

    /// How late a node's report comes.
    pub(crate) fn report_delay(&self, chance: Chance, node: usize, report: u64) -> f64 {
        self.delay * chance.draw(Of::Delay, node, report).unit()
    }

    /// Factor on what a node's link carries, anew each minute.
    pub(crate) fn link_error(&self, chance: Chance, node: usize, minute: u64) -> f64 {
        1.0 + self.link * chance.draw(Of::Link, node, minute).between(-1.0, 1.0)
    }

    /// Factor on how fast a VM was measured to dirty memory.
    pub(crate) fn dirty_error(&self, chance: Chance, vm: usize, report: u64) -> f64 {
        1.0 + self.dirty * chance.draw(Of::Dirty, vm, report).between(-1.0, 1.0)
    }

    /// Seconds that a VM boots.
    pub(crate) fn boot(&self, chance: Chance, vm: usize) -> f64 {
        self.boot * chance.draw(Of::Boot, vm, 0).between(0.5, 1.5)
    }

    /// What the other tenants of a node use from now on, and for how many seconds: something and nothing in turn.
    pub(crate) fn tenant(&self, chance: Chance, node: usize, visit: u64, spec: &NodeSpec) -> (Tenant, f64) {
        let mut random = chance.draw(Of::Tenant, node, visit);
        let starts_busy = chance.draw(Of::TenantFirst, node, 0).unit() < self.tenants;
        let busy = visit.is_multiple_of(2) == starts_busy;
        let away = self.tenant_stays * (1.0 / self.tenants.max(1e-3) - 1.0);
        let lasts = random
            .exponential(if busy { self.tenant_stays } else { away })
            .max(1.0);
        let mut size = chance.draw(Of::TenantSize, node, visit);
        let tenant = Tenant {
            cpu: spec.capacity() * self.tenant_cpu * size.unit(),
            memory: spec.memory as f64 * self.tenant_memory * size.unit(),
        };
        (if busy { tenant } else { Tenant::default() }, lasts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_the_same_for_all_and_spread_as_said() {
        let (noise, chance) = (Noise::default(), Chance::new(7));
        let reports = 0..20_000;
        let errors: Vec<f64> = reports.clone().map(|at| noise.cpu_error(chance, 3, at)).collect();
        assert_eq!(
            errors[17].to_bits(),
            noise.cpu_error(Chance::new(7), 3, 17).to_bits()
        );
        let mean = errors.iter().sum::<f64>() / 20_000.0;
        let deviation = (errors.iter().map(|error| (error - mean).powi(2)).sum::<f64>() / 20_000.0).sqrt();
        assert!(
            (mean - 1.0).abs() < 0.005 && (deviation - 0.1).abs() < 0.005,
            "{mean} {deviation}"
        );
        // Two CPUs that are wanted for 0.6 of the time, and a monitor's thread in one instant of ten.
        let threads = reports
            .map(|at| noise.runnable(chance, 3, at, 2, 1.2))
            .sum::<f64>()
            / 20_000.0;
        assert!((threads - 1.3).abs() < 0.02, "{threads}");
    }

    #[test]
    fn tenants_come_and_go_and_are_there_for_their_part_of_the_time() {
        let noise = Noise::default();
        let spec = NodeSpec {
            name: shoal_plan::NodeName::new("n"),
            cpus: 8,
            speed: 1.0,
            memory: 1 << 34,
            power: crate::power::PowerModel::G5,
        };
        let (mut there, mut all) = (0.0, 0.0);
        for node in 0..200 {
            let mut before = None;
            for visit in 0..20 {
                let (tenant, lasts) = noise.tenant(Chance::new(1), node, visit, &spec);
                let busy = tenant != Tenant::default();
                assert!(before != Some(busy), "they come and go in turn");
                before = Some(busy);
                assert!(tenant.cpu <= 2.0);
                there += if busy { lasts } else { 0.0 };
                all += lasts;
            }
        }
        assert!((there / all - 0.2).abs() < 0.03, "{}", there / all);
    }

    #[test]
    fn without_noise_everything_is_as_it_is() {
        let (noise, chance) = (Noise::OFF, Chance::new(1));
        assert_eq!(noise.cpu_error(chance, 0, 0), 1.0);
        assert_eq!(noise.runnable(chance, 0, 0, 2, 0.7), 0.7);
        assert_eq!(noise.report_delay(chance, 0, 0) + noise.boot(chance, 0), 0.0);
        assert_eq!(
            noise.link_error(chance, 0, 0) * noise.dirty_error(chance, 0, 0),
            1.0
        );
    }
}
