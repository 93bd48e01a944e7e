//! The policy's line.

use super::fields::{COUNT, DURATION, Fields, parse_from_str};
use super::print::Line;
use super::value::parse_duration;
use crate::labels::Labels;
use crate::policy::Policy;

/// The policy's fields and their values, as text.
#[must_use]
pub fn print_policy_fields(policy: &Policy) -> Vec<(String, String)> {
    let line = print_policy(policy);
    let fields = line.split(' ').filter_map(|field| field.split_once('='));
    fields
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// A policy with some fields set, checked.
///
/// # Errors
/// The first field that is not known, or whose value is not as it should be.
pub fn set_policy_fields<'a>(
    base: &Policy,
    fields: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<Policy, String> {
    let mut policy = base.clone();
    let mut fields = Fields::from_pairs("policy", fields)?;
    set_policy(&mut policy, &mut fields)?;
    fields.finish()?;
    policy.check().map_err(|error| error.to_string())?;
    Ok(policy)
}

const SWITCH: &str = "on or off";

pub(super) fn set_policy(policy: &mut Policy, fields: &mut Fields<'_>) -> Result<(), String> {
    fields.number("overcommit", &mut policy.overcommit)?;
    fields.number("cpu_overcommit", &mut policy.cpu_overcommit)?;
    fields.number("queue_slots", &mut policy.queue_slots)?;
    fields.number("usher_threshold", &mut policy.usher_threshold)?;
    fields.number("usher_target", &mut policy.usher_target)?;
    fields.number("pressure_threshold", &mut policy.pressure_threshold)?;
    fields.set(
        "usher_horizon",
        DURATION,
        parse_duration,
        &mut policy.usher_horizon,
    )?;
    fields.set("detect", DURATION, parse_duration, &mut policy.detect)?;
    fields.set(
        "migration_overhead",
        DURATION,
        parse_duration,
        &mut policy.migration_overhead,
    )?;
    fields.rate("link_rate", &mut policy.link_rate)?;
    fields.set("max_migrations", COUNT, parse_count, &mut policy.max_migrations)?;
    fields.set(
        "max_out_per_node",
        COUNT,
        parse_count,
        &mut policy.max_out_per_node,
    )?;
    fields.set("max_in_per_node", COUNT, parse_count, &mut policy.max_in_per_node)?;
    fields.set("cool_down", DURATION, parse_duration, &mut policy.cool_down)?;
    fields.set("settle", DURATION, parse_duration, &mut policy.settle)?;
    fields.set("retry_after", DURATION, parse_duration, &mut policy.retry_after)?;
    fields.number("stability", &mut policy.stability)?;
    fields.number("min_gain", &mut policy.min_gain)?;
    fields.number("cost_per_second", &mut policy.cost_per_second)?;
    fields.number("cost_base", &mut policy.cost_base)?;
    fields.set("n_plus_one", SWITCH, parse_switch, &mut policy.n_plus_one)?;
    fields.set("suspend", SWITCH, parse_switch, &mut policy.suspend)?;
    fields.set("preempt", SWITCH, parse_switch, &mut policy.preempt)?;
    fields.number("cost_of_downtime", &mut policy.cost_of_downtime)?;
    fields.set("max_downtime", DURATION, parse_duration, &mut policy.max_downtime)?;
    fields.set("payback", DURATION, parse_duration, &mut policy.payback)?;
    let level = "a whole number";
    fields.set(
        "aggressiveness",
        level,
        |text| text.parse().ok(),
        &mut policy.aggressiveness,
    )?;
    let automation = "manual, advise or automatic";
    fields.set("automation", automation, parse_from_str, &mut policy.automation)?;
    fields.set("mode", "spread or pack", parse_from_str, &mut policy.mode)?;
    fields.number("cpu_target", &mut policy.cpu_target)?;
    fields.set(
        "queue_patience",
        DURATION,
        parse_duration,
        &mut policy.queue_patience,
    )?;
    fields.set(
        "shares",
        "USER=WEIGHT,… or none",
        parse_shares,
        &mut policy.shares,
    )
}

fn parse_count(text: &str) -> Option<usize> {
    text.parse().ok()
}

fn parse_shares(text: &str) -> Option<Labels> {
    match text {
        "none" => Some(Labels::default()),
        shares => shares.parse().ok(),
    }
}

fn parse_switch(text: &str) -> Option<bool> {
    match text {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

fn switch(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

pub(super) fn print_policy(policy: &Policy) -> String {
    let mut line = Line("policy".to_owned());
    // No number equals NaN: every value is printed, so that the text stands for itself when defaults change.
    line.number("overcommit", policy.overcommit, f64::NAN);
    line.number("cpu_overcommit", policy.cpu_overcommit, f64::NAN);
    line.number("queue_slots", policy.queue_slots, f64::NAN);
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
    line.duration("settle", policy.settle);
    line.duration("retry_after", policy.retry_after);
    line.number("stability", policy.stability, f64::NAN);
    line.number("min_gain", policy.min_gain, f64::NAN);
    line.number("cost_per_second", policy.cost_per_second, f64::NAN);
    line.number("cost_base", policy.cost_base, f64::NAN);
    line.field("n_plus_one", switch(policy.n_plus_one));
    line.field("suspend", switch(policy.suspend));
    line.field("preempt", switch(policy.preempt));
    line.number("cost_of_downtime", policy.cost_of_downtime, f64::NAN);
    line.duration("max_downtime", policy.max_downtime);
    line.duration("payback", policy.payback);
    line.field("aggressiveness", &policy.aggressiveness.to_string());
    line.field("automation", &policy.automation.to_string());
    line.field("mode", &policy.mode.to_string());
    line.number("cpu_target", policy.cpu_target, f64::NAN);
    line.duration("queue_patience", policy.queue_patience);
    let shares = policy.shares.to_string();
    line.field("shares", if shares.is_empty() { "none" } else { &shares });
    line.0
}
