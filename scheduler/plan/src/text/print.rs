//! Snapshot, policy and plan to text.

use std::collections::HashSet;
use std::fmt::Write;
use std::time::Duration;

use super::HEADER;
use super::value::{print_duration, print_name, print_size};
use crate::action::Plan;
use crate::model::{CannotMove, ClusterSnapshot, NodeState, NodeView, VmView};
use crate::policy::Policy;

/// One line of `KEY=VALUE`.
struct Line(String);

impl Line {
    fn field(&mut self, key: &str, value: &str) {
        self.0.push(' ');
        self.0.push_str(key);
        self.0.push('=');
        self.0.push_str(value);
    }

    fn size(&mut self, key: &str, bytes: u64) {
        self.field(key, &print_size(bytes));
    }

    fn size_unless_zero(&mut self, key: &str, bytes: u64) {
        if bytes > 0 {
            self.size(key, bytes);
        }
    }

    fn number(&mut self, key: &str, value: f64, default: f64) {
        if value != default {
            self.field(key, &value.to_string());
        }
    }

    fn duration(&mut self, key: &str, value: Duration) {
        self.field(key, &print_duration(value));
    }
}

/// The snapshot and policy as text that [`super::parse`] reads back. VMs on nodes that the snapshot does not have are left
/// out: they play no part in any decision.
#[must_use]
pub fn print(snapshot: &ClusterSnapshot, policy: &Policy) -> String {
    let mut text = format!("{HEADER}\n{}\n", print_policy(policy));
    for node in &snapshot.nodes {
        text.push_str(&print_node(node));
        text.push('\n');
    }
    let known: HashSet<_> = snapshot.nodes.iter().map(|node| &node.name).collect();
    for vm in snapshot.vms.iter().filter(|vm| known.contains(&vm.node)) {
        text.push_str(&print_vm(vm));
        text.push('\n');
    }
    text
}

fn print_policy(policy: &Policy) -> String {
    let mut line = Line("policy".to_owned());
    // No number equals NaN: every value is printed, so that the text stands for itself when defaults change.
    line.number("overcommit", policy.overcommit, f64::NAN);
    line.number("usher_threshold", policy.usher_threshold, f64::NAN);
    line.number("usher_target", policy.usher_target, f64::NAN);
    line.number("pressure_threshold", policy.pressure_threshold, f64::NAN);
    line.duration("usher_horizon", policy.usher_horizon);
    line.duration("detect", policy.detect);
    line.duration("migration_overhead", policy.migration_overhead);
    line.size("link_rate", policy.link_rate.0);
    line.field("max_migrations", &policy.max_migrations.to_string());
    line.field("max_out_per_node", &policy.max_out_per_node.to_string());
    line.field("max_in_per_node", &policy.max_in_per_node.to_string());
    line.duration("cool_down", policy.cool_down);
    line.duration("retry_after", policy.retry_after);
    line.number("stability", policy.stability, f64::NAN);
    line.number("min_gain", policy.min_gain, f64::NAN);
    line.number("cost_per_second", policy.cost_per_second, f64::NAN);
    line.number("cost_base", policy.cost_base, f64::NAN);
    line.0
}

fn print_node(node: &NodeView) -> String {
    let mut line = Line(format!("node {}", print_name(node.name.as_str())));
    if node.state != NodeState::Ready {
        line.field("state", &node.state.to_string());
    }
    line.field("cpus", &node.cpus.to_string());
    line.number("speed", node.speed, 1.0);
    line.size("memory", node.memory.0);
    line.size("available", node.memory_available.min(node.memory).0);
    line.size_unless_zero("other_growth", node.other_growth.0);
    line.number("load", node.load_local, 0.0);
    line.number("exported", node.load_exported, node.load_local);
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
    line.0
}

fn print_vm(vm: &VmView) -> String {
    let mut line = Line(format!("vm {}", print_name(vm.id.as_str())));
    if vm.name != vm.id.as_str() && !vm.name.is_empty() {
        line.field("name", &print_name(&vm.name));
    }
    line.field("node", &print_name(vm.node.as_str()));
    line.field("cpus", &vm.cpus.to_string());
    line.size("memory", vm.declared.0);
    if let Some(resident) = vm.resident {
        line.size("resident", resident.0);
    }
    line.number("cpu", vm.cpu_use, 0.0);
    if let Some(rate) = vm.dirty_rate {
        line.size("dirty", rate.0);
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
    line.0
}

pub(super) fn cannot_move(why: CannotMove) -> &'static str {
    match why {
        CannotMove::Starting => "starting",
        CannotMove::Stopping => "stopping",
        CannotMove::InDoubt => "in-doubt",
        CannotMove::NotRunning => "not-running",
        CannotMove::Locked => "locked",
        CannotMove::Settling => "settling",
    }
}

/// A plan as text: one line for the scores, one an action, one a note.
#[must_use]
pub fn print_plan(plan: &Plan) -> String {
    let mut text = format!("score {:.3} to {:.3}\n", plan.score_before, plan.score_after);
    for action in &plan.actions {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{} {} from {} to {}: {}",
            action.kind, action.vm, action.from, action.to, action.reason
        );
    }
    for note in &plan.notes {
        let _ = match &note.vm {
            Some(vm) => writeln!(text, "{} {} on {}: {}", note.kind, vm, note.node, note.text),
            None => writeln!(text, "{} {}: {}", note.kind, note.node, note.text),
        };
    }
    text
}
