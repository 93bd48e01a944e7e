//! Simulations as text: docs/simulation.md lists every line and field. `policy`, `node` and `vm` lines are those of
//! `shoal-cluster`, so that a cluster that was kept for replay can be simulated as it is.

mod fields;
mod finish;

use std::path::Path;

use shoal_plan::{DEFAULT_PRIORITY, NodeName};

use self::fields::Fields;
use crate::model::{MemoryModel, MigrationModel, Mode, NodeSpec, Scenario};
use crate::noise::Noise;
use crate::policy::PolicyKind;
use crate::power::PowerModel;
use crate::trace::{TraceForm, cut, parse_trace};
use crate::workload::{Shape, Workload};

/// The first line.
const HEADER: &str = "shoal-simulation 1";
const MOST_NODES: usize = 10_000;
const MOST_VMS: usize = 100_000;
/// Moves of a run that are judged unless a text says otherwise.
const JUDGED: usize = 40;
const MOST_REPORTS: f64 = 10e6;
const MOST_SECONDS: f64 = 31.0 * 86_400.0;
/// Segments are made for every VM, so their count is bounded, too.
const MOST_SEGMENTS: f64 = 20e6;

/// What is wrong with a text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct SimulationError {
    /// From 1; 0 for the text as a whole.
    pub line: usize,
    /// The field, the value and what was expected.
    pub problem: String,
}

/// Reads a scenario from a file. Traces are looked for beside it.
///
/// # Errors
/// The file or a trace cannot be read or understood.
pub fn load(path: &Path) -> Result<Scenario, SimulationError> {
    let whole = |problem: String| SimulationError { line: 0, problem };
    let text = std::fs::read_to_string(path).map_err(|error| whole(format!("cannot be read: {error}")))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let stem = path
        .file_stem()
        .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    parse(&text, &stem, &|file| {
        std::fs::read(folder.join(file)).map_err(|error| error.to_string())
    })
}

/// How a trace named in a text is read.
pub type ReadFile<'a> = &'a dyn Fn(&str) -> Result<Vec<u8>, String>;

/// Reads a scenario. `name` is its name unless the text says another.
///
/// # Errors
/// The first line that is not understood, with the field and what was expected.
pub fn parse(text: &str, name: &str, read: ReadFile<'_>) -> Result<Scenario, SimulationError> {
    let mut draft = Draft::new(name);
    // Lines of the cluster's own form keep their numbers.
    let mut cluster = String::new();
    let mut seen_header = false;
    for (index, line) in text.lines().enumerate() {
        let at_line = |problem: String| SimulationError {
            line: index + 1,
            problem,
        };
        let line = line.split('#').next().unwrap_or_default().trim();
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        if !line.is_empty() && !seen_header {
            if line != HEADER {
                return Err(at_line(format!(
                    "'{}' is not the first line '{HEADER}'",
                    cut(line)
                )));
            }
            seen_header = true;
            cluster.push_str("shoal-cluster 1");
        } else if matches!(first, "policy" | "node" | "vm") {
            cluster.push_str(line);
        } else if !line.is_empty() {
            draft.line(line, read).map_err(at_line)?;
        }
        cluster.push('\n');
    }
    if !seen_header {
        return Err(SimulationError {
            line: 0,
            problem: format!("the first line must be '{HEADER}'"),
        });
    }
    let cluster = shoal_plan::text::parse(&cluster).map_err(|error| SimulationError {
        line: error.line,
        problem: error.problem,
    })?;
    draft
        .finish(cluster)
        .map_err(|problem| SimulationError { line: 0, problem })
}

#[derive(Debug)]
struct Draft {
    scenario: Scenario,
    vms: usize,
}

impl Draft {
    fn new(name: &str) -> Self {
        Self {
            scenario: Scenario {
                name: name.to_owned(),
                mode: Mode::Spread,
                duration: 3600.0,
                interval: 1.0,
                seed: 1,
                runs: 1,
                policies: Vec::new(),
                policy: shoal_plan::Policy::default(),
                nodes: Vec::new(),
                workloads: Vec::new(),
                migration: MigrationModel::default(),
                memory: MemoryModel::default(),
                noise: Noise::default(),
                judged: JUDGED,
            },
            vms: 0,
        }
    }

    fn line(&mut self, line: &str, read: ReadFile<'_>) -> Result<(), String> {
        let (word, rest) = line
            .split_once(|c: char| c.is_ascii_whitespace())
            .unwrap_or((line, ""));
        match word {
            "simulation" => self.simulation(rest),
            "policies" => self.policies(rest),
            "nodes" => self.nodes(rest),
            "workload" => self.workload(rest),
            "trace" => self.trace(rest, read),
            "migration" => self.migration(rest),
            "memory" => self.memory(rest),
            "noise" => self.noise(rest),
            _ => Err(format!(
                "'{}' is none of simulation, policies, policy, nodes, node, workload, trace, vm, migration, memory, noise",
                cut(word)
            )),
        }
    }

    fn simulation(&mut self, rest: &str) -> Result<(), String> {
        let scenario = &mut self.scenario;
        let mut fields = Fields::new("simulation", rest)?;
        if let Some(name) = fields.take("name") {
            let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
                return Err(format!(
                    "simulation: name: '{}' is not 1 to 64 letters, digits, - _ .",
                    cut(name)
                ));
            }
            name.clone_into(&mut scenario.name);
        }
        fields.seconds("duration", 1.0..=MOST_SECONDS, &mut scenario.duration)?;
        fields.seconds("interval", 0.1..=3600.0, &mut scenario.interval)?;
        fields.whole("seed", 0..=u64::MAX, &mut scenario.seed)?;
        let mut runs = u64::from(scenario.runs);
        fields.whole("runs", 1..=100, &mut runs)?;
        scenario.runs = u32::try_from(runs).unwrap_or(1);
        let mut judged = scenario.judged as u64;
        fields.whole("judged", 0..=10_000, &mut judged)?;
        scenario.judged = usize::try_from(judged).unwrap_or(0);
        match fields.take("mode") {
            None => {}
            Some("spread") => scenario.mode = Mode::Spread,
            Some("pack") => scenario.mode = Mode::Pack,
            Some(other) => {
                return Err(format!(
                    "simulation: mode: '{}' is not spread or pack",
                    cut(other)
                ));
            }
        }
        if scenario.duration / scenario.interval > MOST_REPORTS {
            return Err(format!("simulation: interval: more than {MOST_REPORTS} reports"));
        }
        fields.finish()
    }

    fn policies(&mut self, rest: &str) -> Result<(), String> {
        for name in rest.split_ascii_whitespace() {
            let kind = PolicyKind::parse(name).ok_or_else(|| {
                let names: Vec<&str> = PolicyKind::ALL.iter().map(|kind| kind.name()).collect();
                format!("policies: '{}' is none of {}", cut(name), names.join(", "))
            })?;
            if self.scenario.policies.contains(&kind) {
                return Err(format!("policies: {name} is there twice"));
            }
            self.scenario.policies.push(kind);
        }
        Ok(())
    }

    fn nodes(&mut self, rest: &str) -> Result<(), String> {
        let (prefix, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        if prefix.is_empty() || prefix.contains('=') {
            return Err("nodes: a name must follow".to_owned());
        }
        let mut fields = Fields::new("nodes", rest)?;
        let (mut count, mut cpus, mut memory, mut speed) = (1, 0, 0.0, 1.0);
        fields.whole("count", 1..=MOST_NODES as u64, &mut count)?;
        fields.whole("cpus", 1..=4096, &mut cpus)?;
        fields.size("memory", &mut memory)?;
        fields.number("speed", 0.01..=100.0, &mut speed)?;
        let power = power(&mut fields)?;
        fields.finish()?;
        if cpus == 0 || memory < (1 << 20) as f64 {
            return Err(format!(
                "nodes {}: cpus and memory (1MiB at least) are needed",
                cut(prefix)
            ));
        }
        let first = self.scenario.nodes.len();
        for number in 0..count {
            self.scenario.nodes.push(NodeSpec {
                name: NodeName::new(&format!("{prefix}{:04}", first as u64 + number + 1)),
                cpus: u32::try_from(cpus).unwrap_or(1),
                speed,
                memory: crate::observe::bytes(memory).0,
                power,
            });
        }
        Ok(())
    }

    fn shape(&mut self, fields: &mut Fields<'_>, mut shape: Shape) -> Result<Shape, String> {
        let (mut vms, mut cpus) = (shape.vms as u64, u64::from(shape.cpus));
        fields.whole("vms", 1..=MOST_VMS as u64, &mut vms)?;
        fields.whole("cpus", 1..=1024, &mut cpus)?;
        fields.size("memory", &mut shape.memory)?;
        fields.number("resident", 0.0..=1.0, &mut shape.resident)?;
        fields.number("idle", 0.0..=1.0, &mut shape.idle)?;
        fields.number("busy", 0.0..=1.0, &mut shape.busy)?;
        fields.seconds("period", 1.0..=MOST_SECONDS, &mut shape.period)?;
        fields.seconds("window", 0.0..=MOST_SECONDS, &mut shape.window)?;
        fields.seconds("work", 0.001..=MOST_SECONDS, &mut shape.work)?;
        fields.number("alpha", 0.1..=10.0, &mut shape.alpha)?;
        fields.size("leak", &mut shape.leak)?;
        fields.seconds("bursts", 0.0..=MOST_SECONDS, &mut shape.bursts)?;
        fields.number("part", 0.0..=1.0, &mut shape.part)?;
        fields.size("dirty", &mut shape.dirty)?;
        let mut priority = u64::from(shape.priority);
        fields.whole("priority", 0..=9, &mut priority)?;
        shape.priority = u32::try_from(priority).unwrap_or(DEFAULT_PRIORITY);
        shape.preemptible = match fields.take("preemptible") {
            None | Some("no") => false,
            Some("yes") => true,
            Some(other) => {
                return Err(format!(
                    "{}: preemptible: '{}' is not yes or no",
                    fields.line(),
                    cut(other)
                ));
            }
        };
        shape.node = fields.take("node").map(NodeName::new);
        shape.vms = usize::try_from(vms).unwrap_or(MOST_VMS);
        shape.cpus = u32::try_from(cpus).unwrap_or(1);
        Ok(shape)
    }

    fn workload(&mut self, rest: &str) -> Result<(), String> {
        let (kind, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let mut fields = Fields::new("workload", rest)?;
        let shape = self.shape(&mut fields, Shape::default())?;
        fields.finish()?;
        let segments = match kind {
            "diurnal" => 60.0 * self.scenario.duration / shape.period,
            "herd" => 2.0 * self.scenario.duration / shape.period,
            // A period of a burst is half as long at least.
            "leak" if shape.bursts > 0.0 => 4.0 * self.scenario.duration / shape.bursts,
            _ => 1.0,
        };
        if segments * shape.vms as f64 > MOST_SEGMENTS {
            return Err(
                "workload: period or bursts: too short for so many VMs and so long a simulation".to_owned(),
            );
        }
        self.vms += shape.vms;
        self.scenario.workloads.push(match kind {
            "heavy-tail" => Workload::HeavyTail(shape),
            "diurnal" => Workload::Diurnal(shape),
            "leak" => Workload::Leak(shape),
            "herd" => Workload::Herd(shape),
            "steady" => Workload::Steady(shape),
            _ => {
                return Err(format!(
                    "workload: '{}' is none of heavy-tail, diurnal, leak, herd, steady",
                    cut(kind)
                ));
            }
        });
        Ok(())
    }

    fn trace(&mut self, rest: &str, read: ReadFile<'_>) -> Result<(), String> {
        let (file, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let mut fields = Fields::new("trace", rest)?;
        let form = match fields.take("form") {
            None | Some("shoal") => TraceForm::Shoal,
            Some("planetlab") => TraceForm::PlanetLab,
            Some(other) => return Err(format!("trace: form: '{}' is not shoal or planetlab", cut(other))),
        };
        let paper_types = match fields.take("types") {
            None => false,
            Some("paper") => true,
            Some(other) => return Err(format!("trace: types: '{}' is not paper", cut(other))),
        };
        let shape = self.shape(
            &mut fields,
            Shape {
                vms: MOST_VMS,
                ..Shape::default()
            },
        )?;
        fields.finish()?;
        let data = read(file).map_err(|error| format!("trace {}: cannot be read: {error}", cut(file)))?;
        let trace = parse_trace(&data, form).map_err(|error| format!("trace {}: {error}", cut(file)))?;
        self.vms += trace.vms.len().min(shape.vms);
        self.scenario.workloads.push(Workload::Trace {
            trace,
            shape,
            paper_types,
        });
        Ok(())
    }

    fn migration(&mut self, rest: &str) -> Result<(), String> {
        let model = &mut self.scenario.migration;
        let mut fields = Fields::new("migration", rest)?;
        fields.size("link", &mut model.link)?;
        match fields.take("links") {
            None | Some("shared") => {}
            Some("own") => model.shared = false,
            Some(other) => return Err(format!("migration: links: '{}' is not shared or own", cut(other))),
        }
        fields.seconds("setup", 0.0..=3600.0, &mut model.setup)?;
        fields.seconds("max_downtime", 0.0..=3600.0, &mut model.max_downtime)?;
        fields.seconds("switch", 0.0..=3600.0, &mut model.switch)?;
        let mut passes = u64::from(model.passes);
        fields.whole("passes", 1..=1000, &mut passes)?;
        model.passes = u32::try_from(passes).unwrap_or(30);
        fields.number("cpu_per_byte", 0.0..=1e-6, &mut model.cpu_per_byte)?;
        fields.number("logging", 0.0..=0.9, &mut model.logging)?;
        fields.number("degradation", 0.0..=1.0, &mut model.degradation)?;
        if model.link < 1000.0 {
            return Err("migration: link: must be at least 1000 bytes per second".to_owned());
        }
        fields.finish()
    }

    fn memory(&mut self, rest: &str) -> Result<(), String> {
        let model = &mut self.scenario.memory;
        let mut fields = Fields::new("memory", rest)?;
        fields.number("swap", 0.0..=10.0, &mut model.swap)?;
        fields.number("thrash", 0.0..=1e6, &mut model.thrash)?;
        fields.seconds("restart", 0.0..=86_400.0, &mut model.restart)?;
        fields.finish()
    }

    fn noise(&mut self, rest: &str) -> Result<(), String> {
        let (first, others) = rest.split_once(' ').unwrap_or((rest, ""));
        let rest = if first == "off" {
            self.scenario.noise = Noise::OFF;
            others
        } else {
            rest
        };
        let noise = &mut self.scenario.noise;
        let mut fields = Fields::new("noise", rest)?;
        fields.number("cpu", 0.0..=10.0, &mut noise.cpu)?;
        match fields.take("queue") {
            None => {}
            Some("instant") => noise.queue = true,
            Some("mean") => noise.queue = false,
            Some(other) => return Err(format!("noise: queue: '{}' is not instant or mean", cut(other))),
        }
        fields.number("shadow", 0.0..=1.0, &mut noise.shadow)?;
        fields.seconds("delay", 0.0..=600.0, &mut noise.delay)?;
        fields.number("link", 0.0..=0.9, &mut noise.link)?;
        fields.number("dirty", 0.0..=0.9, &mut noise.dirty)?;
        fields.seconds("boot", 0.0..=3600.0, &mut noise.boot)?;
        fields.number("tenants", 0.0..=0.9, &mut noise.tenants)?;
        fields.number("tenant_cpu", 0.0..=1.0, &mut noise.tenant_cpu)?;
        fields.number("tenant_memory", 0.0..=0.5, &mut noise.tenant_memory)?;
        fields.seconds("tenant_stays", 1.0..=86_400.0, &mut noise.tenant_stays)?;
        fields.finish()
    }
}

fn power(fields: &mut Fields<'_>) -> Result<PowerModel, String> {
    match fields.take("power") {
        None => Ok(PowerModel::default()),
        Some(text) => {
            PowerModel::parse(text).ok_or_else(|| format!("nodes: power: '{}' is not g4 or g5", cut(text)))
        }
    }
}
