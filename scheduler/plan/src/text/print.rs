//! Snapshot, policy and plan to text.

use std::collections::HashSet;
use std::fmt::Write;
use std::time::Duration;

use super::policy::print_policy;
use super::value::{print_duration, print_name, print_size};
use super::{HEADER, KERNELS};
use crate::action::Plan;
use crate::kvm::Kernels;
use crate::labels::{Labels, Rules, print_terms};
use crate::margins::Margins;
use crate::model::{
    CannotMove, ClusterSnapshot, DEFAULT_PRIORITY, NodeName, NodeState, NodeView, VmId, VmView,
};
use crate::place::{LaunchRequest, PlaceError, Placement};
use crate::policy::Policy;
use crate::preempt::Held;
use crate::queue::{Turn, Waiting, take_turns};

/// One line of `KEY=VALUE`.
pub(super) struct Line(pub(super) String);

impl Line {
    pub(super) fn field(&mut self, key: &str, value: &str) {
        self.0.push(' ');
        self.0.push_str(key);
        self.0.push('=');
        self.0.push_str(value);
    }

    pub(super) fn size(&mut self, key: &str, bytes: u64) {
        self.field(key, &print_size(bytes));
    }

    fn size_unless_zero(&mut self, key: &str, bytes: u64) {
        if bytes > 0 {
            self.size(key, bytes);
        }
    }

    pub(super) fn number(&mut self, key: &str, value: f64, default: f64) {
        if value != default {
            self.field(key, &value.to_string());
        }
    }

    pub(super) fn duration(&mut self, key: &str, value: Duration) {
        self.field(key, &print_duration(value));
    }
}

impl Line {
    fn labels(&mut self, key: &str, labels: &Labels) {
        if !labels.is_empty() {
            self.field(key, &labels.to_string());
        }
    }

    fn priority(&mut self, priority: u32) {
        if priority != DEFAULT_PRIORITY {
            self.field("priority", &priority.to_string());
        }
    }

    fn request(&mut self, request: &LaunchRequest) {
        self.field("cpus", &request.cpus.to_string());
        self.size("memory", request.memory.0);
        if let Some(node) = &request.node {
            self.field("node", &print_name(node.as_str()));
        }
        if let Some(node) = &request.prefer {
            self.field("prefer", &print_name(node.as_str()));
        }
        if request.queued {
            self.field("queued", "yes");
        }
        if let Some(class) = &request.cpu_class {
            self.field("cpu_class", &print_name(class.as_str()));
        }
        if let Some(kernels) = &request.kernels {
            self.kernels(kernels);
        }
        self.labels("labels", &request.labels);
        self.rules(request.rules.as_deref());
        self.priority(request.priority);
    }

    fn kernels(&mut self, kernels: &Kernels) {
        self.field("image", &print_name(&kernels.image));
        let (_, text) = KERNELS
            .into_iter()
            .find(|(kernels_of, _)| *kernels_of == (kernels.hardware, kernels.software))
            .unwrap_or_default();
        self.field("kernels", text);
        if let Some(cpus) = kernels.software_cpus {
            self.field("software_cpus", &cpus.to_string());
        }
    }

    fn rules(&mut self, rules: Option<&Rules>) {
        let Some(rules) = rules else { return };
        for (key, terms) in [
            ("selector", &rules.selector),
            ("tolerate", &rules.tolerations),
            ("affinity", &rules.affinity),
            ("anti_affinity", &rules.anti_affinity),
        ] {
            if !terms.is_empty() {
                self.field(key, &print_terms(terms));
            }
        }
        if rules.exclusive {
            self.field("exclusive", "yes");
        }
    }
}

/// The snapshot and policy as text that [`super::parse`] reads back. VMs, and room, on nodes that the snapshot does not have are
/// left out: they play no part in any decision.
#[must_use]
pub fn print(snapshot: &ClusterSnapshot, policy: &Policy) -> String {
    let mut text = format!("{HEADER}\n{}\n", print_policy(policy));
    let margins = &snapshot.margins;
    if *margins != Margins::default() {
        let mut line = Line("margins".to_owned());
        line.number("move_time", margins.move_time, 1.0);
        line.number("growth", margins.growth, 1.0);
        line.size_unless_zero("burst", margins.burst.0);
        line.duration("delay", margins.delay);
        text.push_str(&line.0);
        text.push('\n');
    }
    for node in &snapshot.nodes {
        text.push_str(&print_node(node));
        text.push('\n');
    }
    let known: HashSet<_> = snapshot.nodes.iter().map(|node| &node.name).collect();
    for vm in snapshot.vms.iter().filter(|vm| known.contains(&vm.node)) {
        text.push_str(&print_vm(vm));
        text.push('\n');
    }
    for held in snapshot.held.iter().filter(|held| known.contains(&held.node)) {
        text.push_str(&print_held(held));
        text.push('\n');
    }
    text
}

fn print_node(node: &NodeView) -> String {
    let mut line = Line(format!("node {}", print_name(node.name.as_str())));
    if node.state != NodeState::Ready {
        line.field("state", &node.state.to_string());
    }
    line.field("cpus", &node.cpus.to_string());
    line.number("speed", node.speed, 1.0);
    if let Some(limit) = node.cpu_limit {
        line.number("cpu_limit", limit, f64::NAN);
    }
    line.size("memory", node.memory.0);
    line.size("available", node.memory_available.min(node.memory).0);
    line.size_unless_zero("other_growth", node.other_growth.0);
    line.number("other", node.other.mean, 0.0);
    line.number("other_error", node.other.error, 0.0);
    line.number("pressure_memory", node.pressure_memory, 0.0);
    line.number("pressure_cpu", node.pressure_cpu, 0.0);
    if node.migration_tls {
        line.field("migration_tls", "yes");
    }
    if !node.cpu_lacks.is_empty() {
        let lacks = node
            .cpu_lacks
            .iter()
            .map(|(class, lacking)| format!("{class}:{lacking}"));
        line.field("cpu_lacks", &print_name(&lacks.collect::<Vec<_>>().join(";")));
    }
    if let Some(kvm) = node.kvm {
        line.field("kvm", &kvm.to_string());
    }
    if let Some(why) = node.kvm_trouble.as_deref().filter(|why| !why.is_empty()) {
        line.field("kvm_trouble", &print_name(why));
    }
    if !node.failing.is_empty() {
        let failing = node.failing.iter().map(|(from, why)| {
            let from = from.as_ref().map_or("", NodeName::as_str);
            format!("{from}:{}", why.replace(';', ","))
        });
        line.field("failing", &print_name(&failing.collect::<Vec<_>>().join(";")));
    }
    line.labels("labels", &node.labels);
    line.labels("taints", &node.taints);
    line.size_unless_zero("reserved_memory", node.reserved_memory.0);
    line.number("reserved_cpus", node.reserved_cpus, 0.0);
    if let Some(rate) = node.link_rate {
        line.size("link_rate", rate.0);
    }
    if !node.report_age.is_zero() {
        line.duration("report_age", node.report_age);
    }
    line.0
}

fn print_vm(vm: &VmView) -> String {
    let mut line = Line(format!("vm {}", print_name(vm.id.as_str())));
    if *vm.name != *vm.id.as_str() && !vm.name.is_empty() {
        line.field("name", &print_name(&vm.name));
    }
    line.field("node", &print_name(vm.node.as_str()));
    line.field("cpus", &vm.cpus.to_string());
    line.size("memory", vm.declared.0);
    if let Some(resident) = vm.resident {
        line.size("resident", resident.0);
    }
    match vm.cpu {
        Some(cpu) => {
            line.number("cpu", cpu.mean, 0.0);
            line.number("cpu_error", cpu.error, 0.0);
        }
        None => line.field("cpu", "unknown"),
    }
    if let Some(rate) = vm.dirty_rate {
        line.size("dirty", rate.0);
    }
    if let Some(set) = vm.working_set {
        line.size("working_set", set.0);
    }
    line.size_unless_zero("growth", vm.growth.0);
    if let Some(why) = vm.cannot_move {
        line.field("cannot_move", cannot_move(why));
    }
    if let Some(flight) = &vm.in_flight {
        line.field("to", &print_name(flight.to.as_str()));
        line.size_unless_zero("received", flight.received.0);
    }
    if let Some(age) = vm.since_last_move {
        line.duration("since_last_move", age);
    }
    if let Some(class) = &vm.cpu_class {
        line.field("cpu_class", &print_name(class.as_str()));
    }
    if let Some(kvm) = vm.kvm {
        line.field("kvm", &kvm.to_string());
    }
    if vm.ring3 {
        line.field("kernel", "ring3");
    }
    line.labels("labels", &vm.labels);
    line.rules(vm.rules.as_deref());
    if let Some(home) = &vm.home {
        line.field("home", &print_name(home.as_str()));
    }
    if vm.suspended {
        line.field("suspended", "yes");
    }
    if let Some(growth) = vm.suspended_growth {
        line.size("suspended_growth", growth.0);
    }
    line.priority(vm.priority);
    if vm.preemptible {
        line.field("preemptible", "yes");
    }
    if let Some(ran) = vm.ran {
        line.duration("ran", ran);
    }
    if let Some(pause) = vm.longest_pause {
        line.duration("longest_pause", pause);
    }
    if let Some(other) = &vm.gives_way_to {
        line.field("gives_way_to", &print_name(other.as_str()));
    }
    line.0
}

fn print_held(held: &Held) -> String {
    let mut line = Line(format!("held {}", print_name(held.vm.as_str())));
    line.field("on", &print_name(held.node.as_str()));
    line.duration("quiet", held.quiet);
    line.request(&held.request);
    line.0
}

/// VMs to start, as [`super::parse`] reads them back.
#[must_use]
pub fn print_launches(launches: &[(String, LaunchRequest)]) -> String {
    let mut text = String::new();
    for (name, request) in launches {
        let mut line = Line(format!("launch {}", print_name(name)));
        line.request(request);
        text.push_str(&line.0);
        text.push('\n');
    }
    text
}

pub(super) fn cannot_move(why: CannotMove) -> &'static str {
    match why {
        CannotMove::Starting => "starting",
        CannotMove::Stopping => "stopping",
        CannotMove::InDoubt => "in-doubt",
        CannotMove::NotRunning => "not-running",
        CannotMove::Locked => "locked",
        CannotMove::Pinned => "pinned",
        CannotMove::Settling => "settling",
    }
}

/// A plan as text: one line for the whole, one an action and one for its details, one a VM to suspend or resume, one a note.
#[must_use]
pub fn print_plan(plan: &Plan) -> String {
    let mut text = format!(
        "slowdown {:.3} to {:.3}, score {:.3} to {:.3}\n",
        plan.slowdown_before, plan.slowdown_after, plan.score_before, plan.score_after
    );
    for action in &plan.actions {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{} {} from {} to {}: {}",
            action.kind, action.vm, action.from, action.to, action.reason
        );
        if !action.details.is_empty() {
            let _ = writeln!(text, "    {}", action.details);
        }
    }
    let holds = [("suspend", &plan.suspend), ("resume", &plan.resume)];
    for (what, hold) in holds
        .iter()
        .flat_map(|(what, holds)| holds.iter().map(move |hold| (what, hold)))
    {
        let _ = writeln!(text, "{what} {} on {}: {}", hold.vm, hold.node, hold.reason);
    }
    for note in &plan.notes {
        let _ = match &note.vm {
            Some(vm) => writeln!(text, "{} {} on {}: {}", note.kind, vm, note.node, note.text),
            None => writeln!(text, "{} {}: {}", note.kind, note.node, note.text),
        };
    }
    if !plan.empty_nodes.is_empty() {
        let names: Vec<&str> = plan.empty_nodes.iter().map(NodeName::as_str).collect();
        let _ = writeln!(text, "empty {}", names.join(" "));
    }
    text
}

/// Where VMs that are to start go, or why not: one line each.
#[must_use]
pub fn print_placements(
    launches: &[(String, LaunchRequest)],
    placements: &[Result<Placement, PlaceError>],
) -> String {
    let mut text = String::new();
    for ((name, _), placement) in launches.iter().zip(placements) {
        let _ = match placement {
            Ok(placement) => writeln!(text, "start {name} on {}: {}", placement.node, placement.reason),
            Err(error) => writeln!(text, "no place for {name}: {error}"),
        };
    }
    text
}

/// Who would be stopped for VMs to start that fit nowhere, if all of them waited: one line each.
#[must_use]
pub fn print_preemptions(
    snapshot: &ClusterSnapshot,
    policy: &Policy,
    launches: &[(String, LaunchRequest)],
) -> String {
    let waiting: Vec<Waiting> = launches
        .iter()
        .map(|(name, request)| Waiting {
            id: VmId::new(name),
            name: name.clone(),
            request: request.clone(),
            since: Duration::ZERO,
        })
        .collect();
    let mut text = String::new();
    for (number, turn) in take_turns(snapshot, policy, &waiting) {
        let name = &waiting[number].name;
        let _ = match turn {
            Turn::Preempt(preemption) => {
                let victims: Vec<&str> = preemption.victims.iter().map(VmId::as_str).collect();
                let (victims, node) = (victims.join(" "), preemption.node);
                writeln!(
                    text,
                    "preempt {victims} on {node} for {name}: {}",
                    preemption.reason
                )
            }
            Turn::Awaits { reason } => writeln!(text, "await {name}: {reason}"),
            _ => continue,
        };
    }
    text
}
