//! Text to snapshot and policy. Every error says which line, which field, and what was expected.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use shoal_estimate::Estimate;

use super::fields::{COUNT, DURATION, Fields, LABELS, NAME, NUMBER, SIZE, TERMS, cut, parse_from_str};
use super::policy::set_policy;
use super::print::cannot_move;
use super::value::{parse_duration, parse_name, parse_number, parse_size};
use super::{HEADER, KERNELS};
use crate::kvm::{Kernels, KvmKind, SoftwareKernel};
use crate::labels::{Rules, parse_terms};
use crate::model::{
    Bytes, BytesPerSecond, CannotMove, ClusterSnapshot, CpuClass, CpuLacks, Failing, InFlight, NodeName,
    NodeState, NodeView, VmId, VmView,
};
use crate::place::LaunchRequest;
use crate::policy::Policy;
use crate::preempt::Held;

const KVM: &str = "hardware or software";
const MOST_NODES: usize = 100_000;
const MOST_VMS: usize = 1_000_000;
const MOST_LAUNCHES: usize = 10_000;

/// What a text holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scenario {
    /// The cluster.
    pub snapshot: ClusterSnapshot,
    /// The policy; checked.
    pub policy: Policy,
    /// VMs to start, with their names, in order.
    pub launches: Vec<(String, LaunchRequest)>,
}

/// What is wrong with a text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct TextError {
    /// From 1; 0 for the text as a whole.
    pub line: usize,
    /// The field, the value and what was expected.
    pub problem: String,
}

/// Reads what [`super::print`] writes, or a person.
///
/// # Errors
/// The first line that is not understood, with the field and what was expected.
pub fn parse(text: &str) -> Result<Scenario, TextError> {
    let mut scenario = Scenario::default();
    let mut seen_header = false;
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let at_line = |problem| TextError {
            line: index + 1,
            problem,
        };
        if seen_header {
            parse_line(line, &mut scenario).map_err(at_line)?;
        } else if line == HEADER {
            seen_header = true;
        } else {
            return Err(at_line(format!(
                "'{}' is not the first line '{HEADER}'",
                cut(line)
            )));
        }
    }
    let problem = if seen_header {
        check(&scenario)
    } else {
        Err(format!("the first line must be '{HEADER}'"))
    };
    problem.map_err(|problem| TextError { line: 0, problem })?;
    Ok(scenario)
}

fn parse_line(line: &str, scenario: &mut Scenario) -> Result<(), String> {
    let mut words = line.split_ascii_whitespace();
    match words.next() {
        Some("policy") => {
            let mut fields = Fields::new("policy", words)?;
            set_policy(&mut scenario.policy, &mut fields)?;
            fields.finish()
        }
        Some("margins") => {
            let (mut fields, margins) = (Fields::new("margins", words)?, &mut scenario.snapshot.margins);
            fields.number("move_time", &mut margins.move_time)?;
            fields.number("growth", &mut margins.growth)?;
            fields.set("burst", SIZE, parse_size, &mut margins.burst.0)?;
            fields.set("delay", DURATION, parse_duration, &mut margins.delay)?;
            fields.finish()
        }
        Some("node") => {
            let name = words
                .next()
                .and_then(parse_name)
                .ok_or("node: a name must follow")?;
            if scenario.snapshot.nodes.len() == MOST_NODES {
                return Err(format!("more than {MOST_NODES} nodes"));
            }
            let mut fields = Fields::new(&format!("node {}", cut(&name)), words)?;
            scenario.snapshot.nodes.push(node(&name, &mut fields)?);
            fields.finish()
        }
        Some("vm") => {
            let id = words.next().and_then(parse_name).ok_or("vm: an id must follow")?;
            if scenario.snapshot.vms.len() == MOST_VMS {
                return Err(format!("more than {MOST_VMS} VMs"));
            }
            let mut fields = Fields::new(&format!("vm {}", cut(&id)), words)?;
            scenario.snapshot.vms.push(vm(&id, &mut fields)?);
            fields.finish()
        }
        Some("launch") => {
            let name = words
                .next()
                .and_then(parse_name)
                .ok_or("launch: a name must follow")?;
            if scenario.launches.len() == MOST_LAUNCHES {
                return Err(format!("more than {MOST_LAUNCHES} launches"));
            }
            let mut fields = Fields::new(&format!("launch {}", cut(&name)), words)?;
            scenario.launches.push((name, launch(&mut fields)?));
            fields.finish()
        }
        Some("held") => {
            let id = words
                .next()
                .and_then(parse_name)
                .ok_or("held: the id of the VM that waits must follow")?;
            if scenario.snapshot.held.len() == MOST_LAUNCHES {
                return Err(format!("room is held for more than {MOST_LAUNCHES} VMs"));
            }
            let mut fields = Fields::new(&format!("held {}", cut(&id)), words)?;
            scenario.snapshot.held.push(held(&id, &mut fields)?);
            fields.finish()
        }
        word => Err(format!(
            "'{}' is none of policy, node, vm, held, launch",
            cut(word.unwrap_or_default())
        )),
    }
}

fn check(scenario: &Scenario) -> Result<(), String> {
    scenario.policy.check().map_err(|error| error.to_string())?;
    let mut nodes: HashSet<&NodeName> = HashSet::new();
    for node in &scenario.snapshot.nodes {
        if !nodes.insert(&node.name) {
            return Err(format!("node {} is there twice", cut(node.name.as_str())));
        }
    }
    let mut vms: HashSet<&VmId> = HashSet::new();
    for vm in &scenario.snapshot.vms {
        if !vms.insert(&vm.id) {
            return Err(format!("vm {} is there twice", cut(vm.id.as_str())));
        }
        if !nodes.contains(&vm.node) {
            return Err(format!(
                "vm {}: node: {} is not in the text",
                cut(vm.id.as_str()),
                cut(vm.node.as_str())
            ));
        }
    }
    Ok(())
}

fn node(name: &str, fields: &mut Fields<'_>) -> Result<NodeView, String> {
    let mut node = NodeView::new(name, fields.required("cpus", COUNT, parse_cpus)?, Bytes(0));
    node.memory = Bytes(fields.required("memory", SIZE, parse_size)?);
    node.memory_available = node.memory;
    fields.set(
        "state",
        "ready, cordoned, draining or unreachable",
        parse_state,
        &mut node.state,
    )?;
    fields.number("speed", &mut node.speed)?;
    let limit = |text: &str| parse_number(text).map(Some);
    fields.set("cpu_limit", NUMBER, limit, &mut node.cpu_limit)?;
    fields.set("available", SIZE, parse_size, &mut node.memory_available.0)?;
    fields.rate("other_growth", &mut node.other_growth)?;
    fields.number("other", &mut node.other.mean)?;
    fields.number("other_error", &mut node.other.error)?;
    fields.number("pressure_memory", &mut node.pressure_memory)?;
    fields.number("pressure_cpu", &mut node.pressure_cpu)?;
    fields.set("migration_tls", "yes or no", parse_yes, &mut node.migration_tls)?;
    let lacks = "CLASS:FEATURES, separated by ;";
    fields.set("cpu_lacks", lacks, parse_cpu_lacks, &mut node.cpu_lacks)?;
    fields.set("kvm", KVM, parse_kvm, &mut node.kvm)?;
    let trouble = |text: &str| parse_name(text).map(|why| Some(Arc::from(why)));
    fields.set(
        "kvm_trouble",
        "percent-encoded text",
        trouble,
        &mut node.kvm_trouble,
    )?;
    let failing = "NODE:WORDS, separated by ;";
    fields.set("failing", failing, parse_failing, &mut node.failing)?;
    fields.set("labels", LABELS, parse_from_str, &mut node.labels)?;
    fields.set("taints", LABELS, parse_from_str, &mut node.taints)?;
    fields.set("reserved_memory", SIZE, parse_size, &mut node.reserved_memory.0)?;
    fields.number("reserved_cpus", &mut node.reserved_cpus)?;
    let rate = |text: &str| parse_size(text).map(|rate| Some(BytesPerSecond(rate)));
    fields.set("link_rate", SIZE, rate, &mut node.link_rate)?;
    fields.set("report_age", DURATION, parse_duration, &mut node.report_age)?;
    if node.memory_available > node.memory {
        return Err(format!("node {}: available: must be at most memory", cut(name)));
    }
    Ok(node)
}

fn vm(id: &str, fields: &mut Fields<'_>) -> Result<VmView, String> {
    let on = fields.required("node", NAME, parse_name)?;
    let cpus = fields.required("cpus", COUNT, parse_cpus)?;
    let mut vm = VmView::new(id, &on, cpus, Bytes(fields.required("memory", SIZE, parse_size)?));
    let named = |text: &str| parse_name(text).map(Arc::from);
    fields.set("name", NAME, named, &mut vm.name)?;
    fields.set(
        "resident",
        SIZE,
        |text| parse_size(text).map(|size| Some(Bytes(size))),
        &mut vm.resident,
    )?;
    let cpu = |text: &str| match text {
        "unknown" => Some(None),
        _ => parse_number(text).map(|cpus| Some(Estimate::exactly(cpus))),
    };
    fields.set("cpu", "a number or unknown", cpu, &mut vm.cpu)?;
    if let Some(cpu) = &mut vm.cpu {
        fields.number("cpu_error", &mut cpu.error)?;
    }
    fields.set(
        "dirty",
        SIZE,
        |text| parse_size(text).map(|size| Some(BytesPerSecond(size))),
        &mut vm.dirty_rate,
    )?;
    let set = |text: &str| parse_size(text).map(|size| Some(Bytes(size)));
    fields.set("working_set", SIZE, set, &mut vm.working_set)?;
    fields.rate("growth", &mut vm.growth)?;
    fields.set(
        "suspended_growth",
        SIZE,
        |text| parse_size(text).map(|size| Some(BytesPerSecond(size))),
        &mut vm.suspended_growth,
    )?;
    fields.set("suspended", "yes or no", parse_yes, &mut vm.suspended)?;
    if vm.suspended_growth.is_some() && !vm.suspended {
        return Err(format!("vm {}: suspended_growth: needs `suspended=yes`", cut(id)));
    }
    let why = "starting, stopping, in-doubt, not-running, locked, pinned or settling";
    fields.set(
        "cannot_move",
        why,
        |text| parse_cannot_move(text).map(Some),
        &mut vm.cannot_move,
    )?;
    let mut received = 0;
    fields.set("received", SIZE, parse_size, &mut received)?;
    let to = |text: &str| {
        Some(Some(InFlight {
            to: NodeName::new(&parse_name(text)?),
            received: Bytes(received),
        }))
    };
    fields.set("to", NAME, to, &mut vm.in_flight)?;
    if received > 0 && vm.in_flight.is_none() {
        return Err(format!("vm {}: received: needs `to`", cut(id)));
    }
    fields.set(
        "since_last_move",
        DURATION,
        |text| parse_duration(text).map(Some),
        &mut vm.since_last_move,
    )?;
    fields.set(
        "cpu_class",
        NAME,
        |text| parse_name(text).map(|name| Some(CpuClass::new(&name))),
        &mut vm.cpu_class,
    )?;
    fields.set("kvm", KVM, parse_kvm, &mut vm.kvm)?;
    let ring3 = |text: &str| match text {
        "plain" => Some(false),
        "ring3" => Some(true),
        _ => None,
    };
    fields.set("kernel", "plain or ring3", ring3, &mut vm.ring3)?;
    fields.set("labels", LABELS, parse_from_str, &mut vm.labels)?;
    vm.rules = rules(fields)?;
    let home = |text: &str| parse_name(text).map(|name| Some(NodeName::new(&name)));
    fields.set("home", NAME, home, &mut vm.home)?;
    priority(fields, &mut vm.priority)?;
    fields.set("preemptible", "yes or no", parse_yes, &mut vm.preemptible)?;
    let ran = |text: &str| parse_duration(text).map(Some);
    fields.set("ran", DURATION, ran, &mut vm.ran)?;
    fields.set("longest_pause", DURATION, ran, &mut vm.longest_pause)?;
    let other = |text: &str| parse_name(text).map(|id| Some(VmId::new(&id)));
    fields.set("gives_way_to", "the id of a VM", other, &mut vm.gives_way_to)?;
    Ok(vm)
}

fn launch(fields: &mut Fields<'_>) -> Result<LaunchRequest, String> {
    let mut request = LaunchRequest {
        cpus: fields.required("cpus", COUNT, parse_cpus)?,
        memory: Bytes(fields.required("memory", SIZE, parse_size)?),
        ..LaunchRequest::default()
    };
    let named = |text: &str| parse_name(text).map(|name| Some(NodeName::new(&name)));
    fields.set("node", NAME, named, &mut request.node)?;
    fields.set("prefer", NAME, named, &mut request.prefer)?;
    fields.set("queued", "yes or no", parse_yes, &mut request.queued)?;
    let class = |text: &str| parse_name(text).map(|name| Some(CpuClass::new(&name)));
    fields.set("cpu_class", NAME, class, &mut request.cpu_class)?;
    request.kernels = kernels(fields)?;
    fields.set("labels", LABELS, parse_from_str, &mut request.labels)?;
    request.rules = rules(fields)?;
    priority(fields, &mut request.priority)?;
    Ok(request)
}

fn kernels(fields: &mut Fields<'_>) -> Result<Option<Arc<Kernels>>, String> {
    let mut kernels = Kernels {
        image: Arc::from(""),
        hardware: false,
        software: None,
        software_cpus: None,
    };
    let (mut image, mut list) = (None, None);
    fields.set("image", NAME, |text| parse_name(text).map(Some), &mut image)?;
    fields.set(
        "kernels",
        &kernels_expected(),
        |text| parse_kernels(text).map(Some),
        &mut list,
    )?;
    let cpus = |text: &str| parse_cpus(text).map(Some);
    fields.set("software_cpus", COUNT, cpus, &mut kernels.software_cpus)?;
    match (image, list) {
        (Some(image), Some((hardware, software))) => Ok(Some(Arc::new(Kernels {
            image: Arc::from(image),
            hardware,
            software,
            ..kernels
        }))),
        (None, None) if kernels.software_cpus.is_none() => Ok(None),
        _ => Err("image, kernels: one needs the other, and software_cpus needs both".to_owned()),
    }
}

fn kernels_expected() -> String {
    let texts: Vec<&str> = KERNELS.iter().map(|(_, text)| *text).collect();
    format!("one of {}", texts.join(" "))
}

fn parse_kernels(text: &str) -> Option<(bool, Option<SoftwareKernel>)> {
    let found = KERNELS.into_iter().find(|(_, of)| *of == text);
    found.map(|(kernels, _)| kernels)
}

fn parse_kvm(text: &str) -> Option<Option<KvmKind>> {
    text.parse().ok().map(Some)
}

fn held(id: &str, fields: &mut Fields<'_>) -> Result<Held, String> {
    let node = fields.required("on", NAME, parse_name)?;
    let mut quiet = Duration::ZERO;
    fields.set("quiet", DURATION, parse_duration, &mut quiet)?;
    Ok(Held {
        vm: VmId::new(id),
        node: NodeName::new(&node),
        request: launch(fields)?,
        quiet,
    })
}

fn priority(fields: &mut Fields<'_>, priority: &mut u32) -> Result<(), String> {
    let parse = |text: &str| text.parse().ok().filter(|priority| *priority <= 9);
    fields.set("priority", "0 to 9", parse, priority)
}

fn rules(fields: &mut Fields<'_>) -> Result<Option<Arc<Rules>>, String> {
    let mut rules = Rules::default();
    for (key, terms) in [
        ("selector", &mut rules.selector),
        ("tolerate", &mut rules.tolerations),
        ("affinity", &mut rules.affinity),
        ("anti_affinity", &mut rules.anti_affinity),
    ] {
        fields.set(key, TERMS, |text| parse_terms(text).ok(), terms)?;
    }
    fields.set("exclusive", "yes or no", parse_yes, &mut rules.exclusive)?;
    Ok((!rules.is_empty()).then(|| Arc::new(rules)))
}

fn parse_cpus(text: &str) -> Option<u32> {
    text.parse().ok()
}

fn parse_yes(text: &str) -> Option<bool> {
    match text {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

fn parse_cpu_lacks(text: &str) -> Option<CpuLacks> {
    let text = parse_name(text)?;
    let one = |text: &str| {
        let (class, lacking) = text.split_once(':')?;
        Some((CpuClass::new(class), Arc::from(lacking)))
    };
    text.split(';').map(one).collect()
}

fn parse_failing(text: &str) -> Option<Failing> {
    let text = parse_name(text)?;
    let one = |text: &str| {
        let (from, why) = text.split_once(':')?;
        let from = (!from.is_empty()).then(|| NodeName::new(from));
        Some((from, Arc::from(why)))
    };
    text.split(';').map(one).collect()
}

fn parse_state(text: &str) -> Option<NodeState> {
    let states = [
        NodeState::Ready,
        NodeState::Cordoned,
        NodeState::Draining,
        NodeState::Unreachable,
    ];
    states.into_iter().find(|state| state.to_string() == text)
}

fn parse_cannot_move(text: &str) -> Option<CannotMove> {
    use CannotMove::{InDoubt, Locked, NotRunning, Pinned, Settling, Starting, Stopping};
    [Starting, Stopping, InDoubt, NotRunning, Locked, Pinned, Settling]
        .into_iter()
        .find(|&why| cannot_move(why) == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_line_field_and_expectation() {
        let node = "node n cpus=2 memory=1GiB";
        for (body, message) in [
            ("node", "line 2: node: a name must follow"),
            (
                "host n",
                "line 2: 'host' is none of policy, node, vm, held, launch",
            ),
            (
                "node n cpus=2",
                "line 2: node n: memory is missing: a size like 384MiB or bytes",
            ),
            (
                "node n cpus=-2 memory=1GiB",
                "line 2: node n: cpus: '-2' is not a whole number",
            ),
            (
                "node n cpus=2 memory=1GiB colour=red",
                "line 2: node n: colour: no such field",
            ),
            (
                "node n cpus=2 cpus=2 memory=1GiB",
                "line 2: node n: cpus is there twice",
            ),
            (
                "node n cpus=2 memory",
                "line 2: node n: 'memory' is not KEY=VALUE",
            ),
            (
                "node n cpus=2 memory=1GiB available=2GiB",
                "line 2: node n: available: must be at most memory",
            ),
            (
                "vm v node=n cpus=1 memory=1MiB",
                "line 0: vm v: node: n is not in the text",
            ),
            (
                "policy overcommit=0.5",
                "line 0: policy overcommit: must be 1 to 100",
            ),
        ] {
            let error = parse(&format!("{HEADER}\n{body}\n")).expect_err(body);
            assert_eq!(error.to_string(), message);
        }
        let twice = parse(&format!("{HEADER}\n{node}\n{node}\n")).expect_err("twice");
        assert_eq!(twice.to_string(), "line 0: node n is there twice");
        assert!(parse("").is_err() && parse(node).is_err());
    }
}
