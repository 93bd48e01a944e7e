//! Pictures of comparisons, as SVG: one for each scenario, and one of all.

mod svg;

use self::svg::{Anchor, Svg, number, ticks};
use crate::measure::Outcome;
use crate::policy::PolicyKind;
use crate::report::Comparison;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 110.0;
const RIGHT: f64 = 20.0;
const ROW: f64 = 22.0;
const GAP: f64 = 54.0;
const GREY: &str = "#5f6b7a";
const GRID: &str = "#e3e7ec";
const SMALL: &str = r##"font-size="11" fill="#5f6b7a""##;
const PLAIN: &str = r##"fill="#1d2733""##;
const BOLD: &str = r##"fill="#1d2733" font-weight="bold""##;
const TITLE: &str = r##"fill="#1d2733" font-size="16" font-weight="bold""##;

/// By policy, the same in every picture.
fn color(policy: &str) -> &'static str {
    match PolicyKind::parse(policy) {
        Some(PolicyKind::Shoal) => "#0072b2",
        Some(PolicyKind::OpenMosix) => "#d55e00",
        Some(PolicyKind::Hbal) => "#009e73",
        Some(PolicyKind::Drs) => "#cc79a7",
        Some(PolicyKind::Threshold20) => "#e69f00",
        Some(PolicyKind::Threshold30) => "#b59b00",
        Some(PolicyKind::LrMmt) => "#d55e00",
        Some(PolicyKind::RoundRobin) => "#8c96a3",
        Some(PolicyKind::Random) => "#b8c0ca",
        Some(PolicyKind::None) | None => "#5f6b7a",
    }
}

/// A column of bars.
struct Bars {
    title: &'static str,
    value: fn(&Outcome) -> f64,
    /// Where bars begin.
    base: f64,
    decimals: usize,
}

const SPREAD: [Bars; 4] = [
    Bars {
        title: "mean slowdown",
        value: |outcome| outcome.slowdown_mean,
        base: 1.0,
        decimals: 4,
    },
    Bars {
        title: "slowdown, 99th percentile",
        value: |outcome| outcome.slowdown_p99,
        base: 1.0,
        decimals: 3,
    },
    Bars {
        title: "GB sent by migrations",
        value: |outcome| outcome.bytes / 1e9,
        base: 0.0,
        decimals: 1,
    },
    Bars {
        title: "VMs killed, memory short",
        value: |outcome| outcome.oom,
        base: 0.0,
        decimals: 1,
    },
];

const PACK: [Bars; 4] = [
    Bars {
        title: "energy, kWh",
        value: |outcome| outcome.energy,
        base: 0.0,
        decimals: 1,
    },
    Bars {
        title: "SLATAH, %",
        value: |outcome| outcome.slatah * 100.0,
        base: 0.0,
        decimals: 2,
    },
    Bars {
        title: "PDM, %",
        value: |outcome| outcome.pdm * 100.0,
        base: 0.0,
        decimals: 4,
    },
    Bars {
        title: "ESV × 1000",
        value: |outcome| outcome.esv * 1000.0,
        base: 0.0,
        decimals: 4,
    },
];

/// One scenario: bars by policy above, a line by policy over time below.
#[must_use]
pub fn scenario(comparison: &Comparison) -> String {
    let rows = comparison.outcomes.len() as f64;
    let (bars_top, lines_height) = (76.0, 190.0);
    let lines_top = bars_top + rows * ROW + GAP;
    let mut svg = Svg::new(WIDTH, lines_top + lines_height + 70.0);
    svg.label(20.0, 28.0, Anchor::Start, TITLE, &comparison.scenario);
    let runs = if comparison.runs == 1 {
        "one run".to_owned()
    } else {
        format!("mean of {} runs", comparison.runs)
    };
    let what = format!(
        "{} nodes, {} VMs, {:.0} s, {runs}",
        comparison.nodes, comparison.vms, comparison.duration
    );
    svg.label(WIDTH - RIGHT, 28.0, Anchor::End, SMALL, &what);
    let columns = if comparison.pack { &PACK } else { &SPREAD };
    for (row, outcome) in comparison.outcomes.iter().enumerate() {
        let y = bars_top + row as f64 * ROW + 13.0;
        let style = if outcome.policy == PolicyKind::Shoal.name() {
            BOLD
        } else {
            PLAIN
        };
        svg.label(LEFT - 8.0, y, Anchor::End, style, &outcome.policy);
    }
    let width = (WIDTH - LEFT - RIGHT) / columns.len() as f64;
    for (column, bars) in columns.iter().enumerate() {
        bars_of(
            &mut svg,
            comparison,
            bars,
            LEFT + column as f64 * width,
            width - 64.0,
            bars_top,
        );
    }
    lines(&mut svg, comparison, lines_top, lines_height);
    svg.finish()
}

fn bars_of(svg: &mut Svg, comparison: &Comparison, bars: &Bars, left: f64, width: f64, top: f64) {
    svg.label(left, top - 10.0, Anchor::Start, SMALL, bars.title);
    let values: Vec<f64> = comparison.outcomes.iter().map(bars.value).collect();
    // A policy that switches nothing off would flatten the others; its bar is cut.
    let counts = |outcome: &Outcome| !comparison.pack || outcome.migrations > 0.0;
    let longest = comparison
        .outcomes
        .iter()
        .zip(&values)
        .filter(|(outcome, _)| counts(outcome))
        .map(|(_, value)| value - bars.base)
        .fold(0.0, f64::max)
        .max(1e-12);
    for (row, (outcome, value)) in comparison.outcomes.iter().zip(&values).enumerate() {
        let y = top + row as f64 * ROW;
        let part = ((value - bars.base) / longest).max(0.0);
        let length = part.min(1.0) * width;
        svg.rect(left, y + 2.0, length, ROW - 6.0, color(&outcome.policy));
        if part > 1.0 + 1e-9 {
            svg.rect(left + width - 14.0, y + 1.0, 4.0, ROW - 4.0, "#ffffff");
        }
        let label = format!("{value:.*}", bars.decimals);
        svg.label(left + length + 4.0, y + 13.0, Anchor::Start, SMALL, &label);
    }
    svg.stroke(
        (left, top - 2.0),
        (left, top + comparison.outcomes.len() as f64 * ROW),
        GREY,
    );
}

fn lines(svg: &mut Svg, comparison: &Comparison, top: f64, height: f64) {
    let (left, width) = (LEFT, WIDTH - LEFT - RIGHT);
    let (title, value): (&str, fn(&crate::measure::Sample) -> f64) = if comparison.pack {
        ("nodes that are on (policies that move VMs)", |sample| {
            sample.active
        })
    } else {
        (
            "imbalance: standard deviation over nodes of CPU wanted / CPUs, plus that of memory held / memory",
            |sample| sample.imbalance,
        )
    };
    svg.label(left, top - 12.0, Anchor::Start, SMALL, title);
    // In pack mode the first hour, when all is on, would flatten the rest.
    let drawn: Vec<&Outcome> = comparison
        .outcomes
        .iter()
        .filter(|outcome| !comparison.pack || outcome.migrations > 0.0)
        .collect();
    let late = |outcome: &&Outcome| {
        let samples = outcome.series.iter().skip(if comparison.pack {
            outcome.series.len() / 24
        } else {
            0
        });
        samples.map(value).fold(0.0, f64::max)
    };
    let most = drawn.iter().map(late).fold(0.0, f64::max).max(1e-9) * 1.05;
    let y = |amount: f64| top + height - amount.min(most) / most * height;
    for tick in ticks(most) {
        svg.stroke((left, y(tick)), (left + width, y(tick)), GRID);
        svg.label(left - 8.0, y(tick) + 4.0, Anchor::End, SMALL, &number(tick));
    }
    let (unit, name) = if comparison.duration >= 4.0 * 3600.0 {
        (3600.0, "h")
    } else {
        (60.0, "min")
    };
    let span = comparison.duration / unit;
    for tick in ticks(span) {
        let x = left + tick / span * width;
        svg.label(
            x,
            top + height + 16.0,
            if x > left + width - 20.0 {
                Anchor::End
            } else {
                Anchor::Middle
            },
            SMALL,
            &format!("{} {name}", number(tick)),
        );
    }
    for outcome in &drawn {
        let ours = outcome.policy == PolicyKind::Shoal.name();
        let points = outcome
            .series
            .iter()
            .map(|sample| (left + sample.time / comparison.duration * width, y(value(sample))));
        svg.polyline(points, color(&outcome.policy), if ours { 2.4 } else { 1.1 });
    }
    svg.stroke((left, top + height), (left + width, top + height), GREY);
    let mut x = left;
    for outcome in &drawn {
        svg.rect(x, top + height + 33.0, 14.0, 4.0, color(&outcome.policy));
        svg.label(
            x + 18.0,
            top + height + 39.0,
            Anchor::Start,
            SMALL,
            &outcome.policy,
        );
        x += 30.0 + outcome.policy.len() as f64 * 6.4;
    }
}

/// All scenarios that are about slowdown, by policy: how far each is from the best.
#[must_use]
pub fn summary(comparisons: &[Comparison]) -> String {
    let spread: Vec<&Comparison> = comparisons.iter().filter(|comparison| !comparison.pack).collect();
    let policies: Vec<&str> = PolicyKind::ALL
        .into_iter()
        .map(PolicyKind::name)
        .filter(|name| spread.iter().any(|comparison| found(comparison, name).is_some()))
        .collect();
    let (top, row) = (92.0, 30.0);
    let height = top + row * policies.len() as f64 + 46.0;
    let width = (WIDTH - LEFT - RIGHT) / spread.len().max(1) as f64;
    let mut svg = Svg::new(WIDTH, height);
    svg.label(
        20.0,
        28.0,
        Anchor::Start,
        TITLE,
        "mean slowdown by scenario and policy",
    );
    for (column, comparison) in spread.iter().enumerate() {
        let x = LEFT + (column as f64 + 0.5) * width;
        // Two lines where a name is long.
        let (first, second) = comparison
            .scenario
            .split_once('-')
            .unwrap_or(("", &comparison.scenario));
        svg.label(x, top - 24.0, Anchor::Middle, PLAIN, first);
        svg.label(x, top - 10.0, Anchor::Middle, PLAIN, second);
    }
    for (line, policy) in policies.iter().enumerate() {
        let y = top + line as f64 * row;
        let style = if *policy == PolicyKind::Shoal.name() {
            BOLD
        } else {
            PLAIN
        };
        svg.label(LEFT - 8.0, y + 19.0, Anchor::End, style, policy);
        for (column, comparison) in spread.iter().enumerate() {
            let Some(outcome) = found(comparison, policy) else {
                continue;
            };
            let best = comparison
                .outcomes
                .iter()
                .map(|other| other.slowdown_mean)
                .fold(f64::INFINITY, f64::min);
            let x = LEFT + column as f64 * width;
            let (fill, ink) = shade(outcome.slowdown_mean / best - 1.0);
            svg.rect(x + 2.0, y + 2.0, width - 4.0, row - 4.0, fill);
            let killed = if outcome.oom > 0.0 { " †" } else { "" };
            let label = format!("{:.3}{killed}", outcome.slowdown_mean);
            svg.label(x + width / 2.0, y + 19.0, Anchor::Middle, ink, &label);
        }
    }
    let mut x = LEFT;
    for (excess, label) in [
        (0.0, "within 2 % of the best"),
        (0.03, "to 5 %"),
        (0.08, "to 15 %"),
        (0.2, "to 50 %"),
        (1.0, "more"),
    ] {
        svg.rect(x, height - 30.0, 14.0, 14.0, shade(excess).0);
        svg.label(x + 20.0, height - 19.0, Anchor::Start, SMALL, label);
        x += 44.0 + label.len() as f64 * 6.2;
    }
    svg.label(
        WIDTH - RIGHT,
        height - 19.0,
        Anchor::End,
        SMALL,
        "† VMs were killed for want of memory",
    );
    svg.finish()
}

fn found<'a>(comparison: &'a Comparison, policy: &str) -> Option<&'a Outcome> {
    comparison
        .outcomes
        .iter()
        .find(|outcome| outcome.policy == policy)
}

/// Fill and ink for a slowdown so far above the best.
fn shade(excess: f64) -> (&'static str, &'static str) {
    const DARK: &str = r##"fill="#1d2733""##;
    const LIGHT: &str = r##"fill="#ffffff""##;
    match excess {
        best if best <= 0.02 => ("#b7e0c8", DARK),
        near if near <= 0.05 => ("#e9f0c4", DARK),
        far if far <= 0.15 => ("#fbd79b", DARK),
        far if far <= 0.50 => ("#ee9a6a", DARK),
        _ => ("#b5444a", LIGHT),
    }
}
