//! All policies on one scenario, as a table, and what is held against the goals.

use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::engine::run;
use crate::measure::{ANY_REASON, Judged, Outcome};
use crate::model::{Mode, Scenario};
use crate::policy::PolicyKind;

/// Within this part of the best is as good as the best.
const TOLERANCE: f64 = 0.02;

/// At most this part of the moves may be needless.
const NEEDLESS: f64 = 0.10;
const NOT_KNOWN: &str = "-";

const PACK_HEADER: &[&str] = &[
    "POLICY",
    "ENERGY kWh",
    "SLATAH %",
    "PDM %",
    "ESV",
    "MIGRATIONS",
    "SENT GB",
    "ACTIVE NODES",
    "SLOWDOWN",
    "P99",
    "OOM",
    "UNDONE",
];
const SPREAD_HEADER: &[&str] = &[
    "POLICY",
    "SLOWDOWN",
    "P99",
    "OVER MEMORY s",
    "OOM",
    "MIGRATIONS",
    "SENT GB",
    "IMBALANCE",
    "UNDONE",
    "EQUALS",
    "NEEDLESS %",
    "GAIN s",
    "OF PREDICTED %",
    "DOWNTIME ms",
    "WAITING s",
];

/// A goal, and whether it is met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// What was to be.
    pub goal: String,
    /// Whether it is.
    pub met: bool,
    /// The figures.
    pub figures: String,
}

/// The results of one scenario.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Its name.
    pub scenario: String,
    /// Whether it is about consolidation.
    pub pack: bool,
    /// Hosts.
    pub nodes: usize,
    /// VMs of the first run.
    pub vms: usize,
    /// Seconds.
    pub duration: f64,
    /// Seed of the first run.
    pub seed: u64,
    /// Runs that the outcomes are the mean of.
    pub runs: u32,
    /// By policy.
    pub outcomes: Vec<Outcome>,
    /// What is held against the goals, if Shoal is among the policies.
    pub verdicts: Vec<Verdict>,
}

/// Runs every policy of a scenario, each as often as it says, on up to `threads` CPUs. The result does not depend on those.
#[must_use]
pub fn compare(scenario: &Scenario, threads: usize) -> Comparison {
    let runs: Vec<(usize, PolicyKind, u64)> = scenario
        .policies
        .iter()
        .enumerate()
        .flat_map(|(number, kind)| {
            (0..scenario.runs).map(move |run| (number, *kind, scenario.seed.wrapping_add(u64::from(run))))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<Outcome>>> = Mutex::new(vec![None; runs.len()]);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, runs.len().max(1)) {
            scope.spawn(|| {
                while let Some((at, (_, kind, seed))) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    runs.get(at).map(|run| (at, run))
                } {
                    let outcome = run(scenario, *kind, *seed);
                    results.lock().unwrap_or_else(PoisonError::into_inner)[at] = Some(outcome);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    let outcomes = (0..scenario.policies.len()).filter_map(|number| {
        let of_policy = runs.iter().zip(&results).filter(|(run, _)| run.0 == number);
        let outcomes: Vec<Outcome> = of_policy.filter_map(|(_, outcome)| outcome.clone()).collect();
        Outcome::mean(&outcomes)
    });
    let outcomes: Vec<Outcome> = outcomes.collect();
    Comparison {
        scenario: scenario.name.clone(),
        pack: scenario.mode == Mode::Pack,
        nodes: scenario.nodes.len(),
        vms: crate::engine::vm_specs(scenario, scenario.seed).len(),
        duration: scenario.duration,
        seed: scenario.seed,
        runs: scenario.runs,
        verdicts: verdicts(scenario.mode, &outcomes),
        outcomes,
    }
}

fn verdicts(mode: Mode, outcomes: &[Outcome]) -> Vec<Verdict> {
    let named = |kind: PolicyKind| outcomes.iter().find(|outcome| outcome.policy == kind.name());
    let Some(ours) = named(PolicyKind::Shoal) else {
        return Vec::new();
    };
    let mut verdicts = Vec::new();
    let mut held = |goal: &str, met: bool, figures: String| {
        verdicts.push(Verdict {
            goal: goal.to_owned(),
            met,
            figures,
        });
    };
    if mode == Mode::Pack {
        if let Some(theirs) = named(PolicyKind::LrMmt) {
            let figures = format!("{:.3e} against {:.3e}", ours.esv, theirs.esv);
            held("ESV below LR-MMT's", ours.esv < theirs.esv, figures);
        }
        return verdicts;
    }
    if let Some(best) = outcomes
        .iter()
        .min_by(|a, b| a.slowdown_mean.total_cmp(&b.slowdown_mean))
    {
        let met = ours.slowdown_mean <= best.slowdown_mean * (1.0 + TOLERANCE);
        let figures = format!(
            "{:.4}; best is {} with {:.4}",
            ours.slowdown_mean, best.policy, best.slowdown_mean
        );
        held("mean slowdown within 2 % of the best", met, figures);
    }
    let least = outcomes
        .iter()
        .map(|outcome| outcome.oom)
        .fold(f64::INFINITY, f64::min);
    let met = ours.oom == 0.0 || least > 0.0;
    held(
        "no OOM where any policy has none",
        met,
        format!("{:.1}; least is {least:.1}", ours.oom),
    );
    if let (Some(none), Some(theirs)) = (named(PolicyKind::None), named(PolicyKind::OpenMosix)) {
        let gain = |outcome: &Outcome| none.slowdown_mean - outcome.slowdown_mean;
        let (ours_gain, their_gain) = (gain(ours), gain(theirs));
        // With no more gain than theirs, no more bytes; with more gain, more in proportion.
        let allowed = if their_gain > 0.0 {
            theirs.bytes * (ours_gain / their_gain).max(1.0)
        } else if ours_gain > 0.0 {
            f64::INFINITY
        } else {
            theirs.bytes
        };
        let figures = format!(
            "{:.1} GB for a gain of {ours_gain:.4} against {:.1} GB for {their_gain:.4}",
            ours.bytes / 1e9,
            theirs.bytes / 1e9
        );
        held(
            "no more bytes than openMosix for the same gain",
            ours.bytes <= allowed,
            figures,
        );
    }
    if let Some((met, figures)) = needless(ours, outcomes) {
        held(
            "needless moves at most a tenth, and half of the best rival's",
            met,
            figures,
        );
    }
    held(
        "no moves of equals",
        ours.equals == 0.0,
        format!("{:.1}", ours.equals),
    );
    verdicts
}

/// Whether few of our moves were needless, if any was judged. The best rival is the one with the least slowdown among those that
/// move anything.
fn needless(ours: &Outcome, outcomes: &[Outcome]) -> Option<(bool, String)> {
    let part = ours.needless_part()?;
    let number = |outcome: &Outcome| outcome.needless_part().map(|part| part * outcome.begun);
    let own = number(ours)?;
    let mut figures = format!("{:.0} %, {own:.1} a run", part * 100.0);
    let rivals = outcomes
        .iter()
        .filter(|other| other.policy != ours.policy && other.judged > 0.0);
    let best = rivals.min_by(|a, b| a.slowdown_mean.total_cmp(&b.slowdown_mean));
    let mut met = part <= NEEDLESS;
    if let Some((best, theirs)) = best.and_then(|best| Some((best, number(best)?))) {
        met &= own <= theirs / 2.0;
        let _ = write!(figures, "; best rival is {} with {theirs:.1}", best.policy);
    }
    Some((met, figures))
}

impl Comparison {
    /// As a table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{}: {} nodes, {} VMs, {:.0} s, seed {}, {}\n",
            self.scenario,
            self.nodes,
            self.vms,
            self.duration,
            self.seed,
            if self.runs == 1 {
                "one run".to_owned()
            } else {
                format!("mean of {} runs", self.runs)
            },
        );
        let header = if self.pack { PACK_HEADER } else { SPREAD_HEADER };
        let mut rows: Vec<Vec<String>> = vec![header.iter().map(|cell| (*cell).to_owned()).collect()];
        rows.extend(self.outcomes.iter().map(|outcome| {
            if self.pack {
                pack_row(outcome)
            } else {
                spread_row(outcome)
            }
        }));
        // What is not known of any policy is left out.
        let unknown =
            |column: &usize| rows.len() > 1 && rows.iter().skip(1).all(|row| row[*column] == NOT_KNOWN);
        let shown: Vec<usize> = (0..header.len()).filter(|column| !unknown(column)).collect();
        let widths: Vec<usize> = (0..header.len())
            .map(|column| {
                rows.iter()
                    .map(|row| row[column].chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        for row in rows {
            for &column in &shown {
                let (cell, width) = (&row[column], widths[column]);
                // Figures to the right, names to the left.
                let _ = if column == 0 {
                    write!(text, "{cell:<width$}")
                } else {
                    write!(text, "  {cell:>width$}")
                };
            }
            text.push('\n');
        }
        for verdict in &self.verdicts {
            let word = if verdict.met { "PASS" } else { "MISS" };
            let _ = writeln!(text, "{word}  {}: {}", verdict.goal, verdict.figures);
        }
        for outcome in &self.outcomes {
            text.push_str(&reasons(outcome));
        }
        text
    }
}

/// A count, with a decimal where it is the mean of several runs.
fn count(value: f64) -> String {
    if (value - value.round()).abs() < 1e-9 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

/// What moves were for that were judged, if the policy says.
fn reasons(outcome: &Outcome) -> String {
    let told = |(reason, _): &(&String, &Judged)| reason.as_str() != ANY_REASON;
    let of = |(reason, by): (&String, &Judged)| {
        let each = by.realised / by.judged;
        let needless = part(by.needless, by.judged);
        format!(
            "{} {reason}, {needless} % needless, {each:.0} s each",
            count(by.judged)
        )
    };
    let each: Vec<String> = outcome.by_reason.iter().filter(told).map(of).collect();
    if each.is_empty() {
        return String::new();
    }
    format!("{} moves that were judged: {}\n", outcome.policy, each.join("; "))
}

/// Percent of a whole.
fn part(of: f64, whole: f64) -> String {
    if whole > 0.0 {
        format!("{:.0}", of / whole * 100.0)
    } else {
        NOT_KNOWN.to_owned()
    }
}

fn spread_row(outcome: &Outcome) -> Vec<String> {
    vec![
        outcome.policy.clone(),
        format!("{:.4}", outcome.slowdown_mean),
        format!("{:.3}", outcome.slowdown_p99),
        format!("{:.0}", outcome.above_threshold),
        count(outcome.oom),
        count(outcome.migrations),
        format!("{:.1}", outcome.bytes / 1e9),
        format!("{:.3}", outcome.imbalance),
        count(outcome.undone),
        count(outcome.equals),
        part(outcome.needless, outcome.judged),
        if outcome.judged > 0.0 {
            format!("{:.1}", outcome.realised / outcome.judged)
        } else {
            NOT_KNOWN.to_owned()
        },
        part(outcome.realised_of_predicted, outcome.predicted),
        format!("{:.0}", outcome.downtime_max * 1000.0),
        format!("{:.0}", outcome.waiting),
    ]
}

fn pack_row(outcome: &Outcome) -> Vec<String> {
    vec![
        outcome.policy.clone(),
        format!("{:.2}", outcome.energy),
        format!("{:.2}", outcome.slatah * 100.0),
        format!("{:.4}", outcome.pdm * 100.0),
        format!("{:.3e}", outcome.esv),
        count(outcome.migrations),
        format!("{:.1}", outcome.bytes / 1e9),
        format!("{:.1}", outcome.active),
        format!("{:.4}", outcome.slowdown_mean),
        format!("{:.3}", outcome.slowdown_p99),
        count(outcome.oom),
        count(outcome.undone),
    ]
}
