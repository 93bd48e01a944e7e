//! What VMs want over time: generators, each with its own stream of random numbers, and traces.

use std::f64::consts::TAU;
use std::sync::Arc;

use shoal_plan::{DEFAULT_PRIORITY, NodeName};

use crate::model::{NodeSpec, Segment, VmSpec};
use crate::random::Random;
use crate::trace::Trace;

const GIB: f64 = (1_u64 << 30) as f64;
/// Instance types of the paper: work per second (MIPS / 1000) and MB of memory.
const PAPER_TYPES: [(f64, f64); 4] = [(2.5, 870.0), (2.0, 1740.0), (1.0, 1740.0), (0.5, 613.0)];

/// What all generators have in common. Values that a kind has no use for are ignored by it.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// How many.
    pub vms: usize,
    /// Virtual CPUs of each.
    pub cpus: u32,
    /// Bytes given to each.
    pub memory: f64,
    /// Part of it that is held at the start.
    pub resident: f64,
    /// CPU use, as a part of its CPUs: when idle, and when busy.
    pub idle: f64,
    /// See `idle`.
    pub busy: f64,
    /// Seconds: period of a day, or between two herds.
    pub period: f64,
    /// Seconds over which the VMs arrive, or for which a herd stays.
    pub window: f64,
    /// Mean work of a job, in seconds of one CPU.
    pub work: f64,
    /// Exponent of the heavy tail.
    pub alpha: f64,
    /// Bytes per second by which a leaking VM grows.
    pub leak: f64,
    /// A leak comes in bursts: within a fifth of each period of about so many seconds, five times as fast. 0: it is steady.
    pub bursts: f64,
    /// Part of the VMs that leak, or that are in one herd.
    pub part: f64,
    /// Bytes dirtied per unit of work.
    pub dirty: f64,
    /// All start here.
    pub node: Option<NodeName>,
    /// 0 to 9.
    pub priority: u32,
    /// They may be stopped for others of higher priority.
    pub preemptible: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            vms: 100,
            cpus: 1,
            memory: GIB,
            resident: 0.5,
            idle: 0.1,
            busy: 0.8,
            period: 3600.0,
            window: 600.0,
            work: 120.0,
            alpha: 1.1,
            leak: 1e6,
            bursts: 0.0,
            part: 0.25,
            dirty: 20e6,
            node: None,
            priority: DEFAULT_PRIORITY,
            preemptible: false,
        }
    }
}

/// Where VMs come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Workload {
    /// Batch jobs whose work has a heavy tail, arriving at random: most end soon, a few run on and on.
    HeavyTail(Shape),
    /// Services whose load follows the time of day, in four time zones.
    Diurnal(Shape),
    /// Services some of which leak memory.
    Leak(Shape),
    /// Idle services of which a part wakes up at once, again and again.
    Herd(Shape),
    /// Services with a steady load.
    Steady(Shape),
    /// Recorded VMs.
    Trace {
        /// What was recorded.
        trace: Trace,
        /// Sizes where the trace has none, and how fast memory is dirtied.
        shape: Shape,
        /// The paper's four VM types instead, a quarter of the VMs each.
        paper_types: bool,
    },
    /// VMs written out in the scenario.
    Given(Vec<VmSpec>),
}

impl Workload {
    /// The VMs, the same for the same seed.
    pub fn generate(
        &self,
        seed: u64,
        number: usize,
        duration: f64,
        nodes: &[NodeSpec],
        into: &mut Vec<VmSpec>,
    ) {
        let mut random = Random::fork(seed, &format!("workload {number}"));
        let name = |kind: &str, vm: usize| format!("{kind}{number}-{vm:05}");
        match self {
            Self::HeavyTail(shape) => heavy_tail(shape, &mut random, |vm| name("job", vm), into),
            Self::Diurnal(shape) => {
                let day = |vm: usize, random: &mut Random| diurnal(shape, vm, duration, random);
                services(shape, &mut random, |vm| name("web", vm), day, into);
            }
            Self::Leak(shape) => leaks(shape, duration, &mut random, |vm| name("leak", vm), into),
            Self::Herd(shape) => herd(shape, duration, &mut random, |vm| name("herd", vm), into),
            Self::Steady(shape) => {
                let steady = |_: usize, random: &mut Random| {
                    let cpu = random.between(shape.idle, shape.busy) * f64::from(shape.cpus);
                    vec![segment(0.0, cpu)]
                };
                services(shape, &mut random, |vm| name("vm", vm), steady, into);
            }
            Self::Trace {
                trace,
                shape,
                paper_types,
            } => traced(trace, shape, *paper_types, nodes, into),
            Self::Given(vms) => into.extend(vms.iter().cloned()),
        }
    }
}

fn segment(at: f64, cpu: f64) -> Segment {
    Segment {
        at,
        cpu,
        growth: 0.0,
        resident: None,
    }
}

fn service(shape: &Shape, name: String, random: &mut Random, mut segments: Vec<Segment>) -> VmSpec {
    segments.sort_by(|a, b| a.at.total_cmp(&b.at));
    // Sizes differ by up to a half either way.
    let memory = (shape.memory * random.between(0.5, 1.5)).floor();
    let initial = (memory * shape.resident).floor();
    VmSpec {
        name,
        arrival: 0.0,
        node: shape.node.clone(),
        cpus: shape.cpus,
        peak: f64::from(shape.cpus),
        declared: memory,
        initial,
        work: None,
        lifetime: None,
        dirty: shape.dirty,
        working_set: initial / 4.0,
        priority: shape.priority,
        preemptible: shape.preemptible,
        boots: false,
        segments: segments.into(),
    }
}

fn services(
    shape: &Shape,
    random: &mut Random,
    name: impl Fn(usize) -> String,
    mut segments: impl FnMut(usize, &mut Random) -> Vec<Segment>,
    into: &mut Vec<VmSpec>,
) {
    for vm in 0..shape.vms {
        let segments = segments(vm, random);
        into.push(service(shape, name(vm), random, segments));
    }
}

fn heavy_tail(shape: &Shape, random: &mut Random, name: impl Fn(usize) -> String, into: &mut Vec<VmSpec>) {
    // The mean of a bounded Pareto from 1 to 1000, to scale by.
    let (alpha, high) = (shape.alpha, 1000.0_f64);
    let mean = if (alpha - 1.0).abs() < 1e-9 {
        high.ln() / (1.0 - 1.0 / high)
    } else {
        alpha / (1.0 - high.powf(-alpha)) * (1.0 - high.powf(1.0 - alpha)) / (alpha - 1.0)
    };
    for vm in 0..shape.vms {
        let arrival = random.between(0.0, shape.window);
        let work = shape.work / mean * random.pareto(alpha, 1.0, high) * f64::from(shape.cpus);
        let mut job = service(shape, name(vm), random, vec![segment(0.0, f64::from(shape.cpus))]);
        job.arrival = arrival;
        job.work = Some(work);
        into.push(job);
    }
}

/// A sine over the period with noise, a step every sixtieth of it.
fn diurnal(shape: &Shape, vm: usize, duration: f64, random: &mut Random) -> Vec<Segment> {
    let zone = (vm % 4) as f64 / 4.0;
    let (step, cpus) = ((shape.period / 60.0).max(1.0), f64::from(shape.cpus));
    let mut segments = Vec::new();
    let mut at = 0.0;
    while at < duration {
        let wave = (1.0 + (TAU * (at / shape.period + zone)).sin()) / 2.0;
        let noise = random.between(0.8, 1.2);
        let part = (shape.idle + (shape.busy - shape.idle) * wave) * noise;
        segments.push(segment(at, part.min(1.0) * cpus));
        // No two VMs change at the same moment.
        at += step * random.between(0.8, 1.2);
    }
    segments
}

fn leaks(
    shape: &Shape,
    duration: f64,
    random: &mut Random,
    name: impl Fn(usize) -> String,
    into: &mut Vec<VmSpec>,
) {
    for vm in 0..shape.vms {
        let cpu = random.between(shape.idle, shape.busy) * f64::from(shape.cpus);
        let growth = if random.unit() < shape.part {
            shape.leak * random.between(0.5, 1.5)
        } else {
            0.0
        };
        let at_rate = |at: f64, growth: f64| Segment {
            growth,
            ..segment(at, cpu)
        };
        let segments = if shape.bursts > 0.0 && growth > 0.0 {
            bursts(shape.bursts, duration, growth, random, at_rate)
        } else {
            vec![at_rate(0.0, growth)]
        };
        into.push(service(shape, name(vm), random, segments));
    }
}

/// Nothing, and five times as much for a fifth of the time, in turn.
fn bursts(
    period: f64,
    duration: f64,
    growth: f64,
    random: &mut Random,
    at_rate: impl Fn(f64, f64) -> Segment,
) -> Vec<Segment> {
    let mut segments = vec![at_rate(0.0, 0.0)];
    let mut at = period * random.unit();
    while at < duration {
        let lasts = period * random.between(0.5, 1.5);
        segments.push(at_rate(at, growth * 5.0));
        segments.push(at_rate(at + lasts / 5.0, 0.0));
        at += lasts;
    }
    segments
}

fn herd(
    shape: &Shape,
    duration: f64,
    random: &mut Random,
    name: impl Fn(usize) -> String,
    into: &mut Vec<VmSpec>,
) {
    let cpus = f64::from(shape.cpus);
    let mut schedules: Vec<Vec<Segment>> = vec![vec![segment(0.0, shape.idle * cpus)]; shape.vms];
    let mut at = shape.period / 2.0;
    while at < duration {
        for segments in &mut schedules {
            if random.unit() < shape.part {
                // All within two seconds, for about as long.
                let wakes = at + random.between(0.0, 2.0);
                let sleeps = wakes + shape.window * random.between(0.8, 1.2);
                segments.push(segment(wakes, shape.busy * cpus));
                segments.push(segment(sleeps, shape.idle * cpus));
            }
        }
        at += shape.period;
    }
    for (vm, segments) in schedules.into_iter().enumerate() {
        into.push(service(shape, name(vm), random, segments));
    }
}

fn traced(trace: &Trace, shape: &Shape, paper_types: bool, nodes: &[NodeSpec], into: &mut Vec<VmSpec>) {
    let count = trace.vms.len().min(shape.vms);
    let quarter = count.div_ceil(PAPER_TYPES.len()).max(1);
    // In the trace, a CPU is one of the first node's.
    let speed = nodes.first().map_or(1.0, |node| node.speed);
    for (number, vm) in trace.vms.iter().take(count).enumerate() {
        let cpus = vm.cpus.unwrap_or(shape.cpus);
        let (peak, declared, resident) = if paper_types {
            let (peak, megabytes) = PAPER_TYPES[(number / quarter).min(PAPER_TYPES.len() - 1)];
            (peak, megabytes * 1e6, 1.0)
        } else {
            let memory = vm.memory.map_or(shape.memory, |memory| memory as f64);
            let resident = if vm.memory.is_some() { 1.0 } else { shape.resident };
            (f64::from(cpus) * speed, memory, resident)
        };
        let mut segments = Vec::with_capacity(vm.cpu.len());
        let mut last = f32::NAN;
        for (sample, cpu) in vm.cpu.iter().enumerate() {
            let held = vm.resident.get(sample).map(|held| *held as f64);
            #[allow(clippy::float_cmp)] // the same sample again
            if *cpu == last && held.is_none() {
                continue;
            }
            last = *cpu;
            segments.push(Segment {
                resident: held,
                ..segment(
                    vm.arrival + sample as f64 * trace.interval,
                    f64::from(*cpu) * peak,
                )
            });
        }
        let initial = vm
            .resident
            .first()
            .map_or(declared * resident, |held| *held as f64);
        into.push(VmSpec {
            name: vm.name.clone(),
            arrival: vm.arrival,
            node: shape.node.clone(),
            cpus,
            peak,
            declared,
            initial,
            work: None,
            lifetime: Some(vm.cpu.len() as f64 * trace.interval),
            dirty: shape.dirty,
            working_set: initial / 4.0,
            priority: shape.priority,
            preemptible: shape.preemptible,
            boots: true,
            segments: Arc::from(segments),
        });
    }
}
