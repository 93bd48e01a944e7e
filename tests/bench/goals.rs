//! What the figures are to be: section 1 of the issue on the migration engine.

use crate::figures::{CaseReport, Figures, Goal, References};
use crate::table::against;

const MAX_OF_QEMU: f64 = 0.5;
const MAX_OF_TCP: f64 = 1.3;
const MAX_IDLE_GAP_MS: f64 = 2.0;
const MAX_HANDOVER_MS: f64 = 50.0;
/// Time for each byte, in the largest guest against the smallest.
const LINEAR: f64 = 1.25;
/// How much larger the largest guest must be than the smallest.
const ENOUGH_SIZES: u64 = 4;

type Figure = fn(&Figures) -> f64;

/// Holds the figures against the goals.
pub fn judge(cases: &[CaseReport], references: &References) -> Vec<Goal> {
    let filled = cases.iter().find(|case| case.name == "filled");
    let mut goals = vec![
        half_of_qemu(filled),
        near_tcp(filled, references),
        idle_gap(cases),
    ];
    let figures: [(&str, Figure); 3] = [
        ("the worst stall that the guest sees is less than QEMU's", |f| {
            f.gap_ms
        }),
        ("no more bytes than QEMU", |f| f.bytes),
        ("no more CPU time of both ends than QEMU", Figures::cpu_s),
    ];
    let table = |case: &&CaseReport| ["table", "connections"].contains(&case.group);
    for (what, figure) in figures {
        let own: Vec<_> = cases.iter().filter(table).collect();
        goals.push(below_qemu(
            &format!("{what}, in every case of the table"),
            &own,
            figure,
        ));
        let others: Vec<_> = cases.iter().filter(|case| !table(case)).collect();
        if others.iter().any(|case| case.sides.qemu.is_some()) {
            goals.push(below_qemu(
                &format!("{what}, elsewhere (no goal of the issue)"),
                &others,
                figure,
            ));
        }
    }
    goals.push(linear(cases));
    goals.push(handover(cases));
    goals.push(as_asked(cases));
    goals
}

fn half_of_qemu(filled: Option<&CaseReport>) -> Goal {
    let ratio = filled.and_then(|case| {
        let (shoal, qemu) = (
            case.sides.shoal.median?,
            case.sides.qemu.as_ref().and_then(|side| side.median)?,
        );
        Some((shoal.total_ms / qemu.total_ms, shoal.total_ms, qemu.total_ms))
    });
    goal(
        format!("total time of `filled` at most {MAX_OF_QEMU} of QEMU's"),
        ratio.map(|(ratio, shoal, qemu)| {
            (
                ratio <= MAX_OF_QEMU,
                format!("{ratio:.2} ({shoal:.0} against {qemu:.0} ms)"),
            )
        }),
    )
}

fn near_tcp(filled: Option<&CaseReport>, references: &References) -> Goal {
    let ratio = filled
        .and_then(|case| case.sides.shoal.median)
        .map(|figures| against(&figures, references.tcp));
    goal(
        format!("total time of `filled` at most {MAX_OF_TCP} times what one TCP stream needs for the bytes"),
        ratio.map(|ratio| (ratio <= MAX_OF_TCP, format!("{ratio:.2}"))),
    )
}

fn idle_gap(cases: &[CaseReport]) -> Goal {
    let idle = cases
        .iter()
        .filter(|case| case.group == "table" && !case.cmdline.contains("rate="));
    let gaps: Vec<_> = idle
        .filter_map(|case| Some((case.name, case.sides.shoal.median?)))
        .collect();
    let told: Vec<_> = gaps
        .iter()
        .map(|(name, f)| {
            format!(
                "{name} {:.2} ms (source {:.2}, pause {:.2}, destination {:.2})",
                f.gap_ms, f.gap_source_ms, f.gap_pause_ms, f.gap_destination_ms
            )
            .replace("NaN", "-")
        })
        .collect();
    let met = gaps.iter().all(|(_, f)| f.gap_ms <= MAX_IDLE_GAP_MS);
    goal(
        format!("the worst stall that an idle guest sees is at most {MAX_IDLE_GAP_MS} ms"),
        (!gaps.is_empty()).then(|| (met, told.join(", "))),
    )
}

/// In every case that both have.
fn below_qemu(what: &str, cases: &[&CaseReport], figure: Figure) -> Goal {
    let ratios: Vec<(&str, f64)> = cases
        .iter()
        .filter_map(|case| {
            let (shoal, qemu) = (
                case.sides.shoal.median?,
                case.sides.qemu.as_ref().and_then(|side| side.median)?,
            );
            Some((case.name, figure(&shoal) / figure(&qemu)))
        })
        .collect();
    let mut above: Vec<_> = ratios.iter().filter(|(_, ratio)| ratio > &1.0).collect();
    above.sort_by(|a, b| b.1.total_cmp(&a.1));
    let worst = ratios.iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let text = match worst {
        Some((name, ratio)) if above.is_empty() => {
            format!("{} cases, at most {ratio:.2} of QEMU's ({name})", ratios.len())
        }
        _ => {
            let above: Vec<_> = above
                .iter()
                .map(|(name, ratio)| format!("{name} {ratio:.2}"))
                .collect();
            format!(
                "{} of {} cases above QEMU: {} times",
                above.len(),
                ratios.len(),
                above.join(", ")
            )
        }
    };
    goal(
        what.to_owned(),
        (!ratios.is_empty()).then_some((above.is_empty(), text)),
    )
}

/// `filled` is the smallest of the sweep.
fn linear(cases: &[CaseReport]) -> Goal {
    let mut costs: Vec<(u64, f64)> = cases
        .iter()
        .filter(|case| case.name == "filled" || case.group == "sweep")
        .filter_map(|case| Some((case.filled, case.sides.shoal.median?.total_ms)))
        .map(|(filled, total_ms)| (filled, total_ms / (filled as f64 / (1u64 << 30) as f64)))
        .collect();
    costs.sort_by_key(|&(filled, _)| filled);
    let measured = match (costs.first(), costs.last()) {
        (Some(first), Some(last)) if last.0 >= first.0 * ENOUGH_SIZES => Some((*first, *last)),
        _ => None,
    };
    let told: Vec<_> = costs
        .iter()
        .map(|(filled, cost)| format!("{} MiB {cost:.0}", filled >> 20))
        .collect();
    goal(
        format!(
            "cost grows linearly with memory (each GiB of the largest at most {LINEAR} times that of the smallest)"
        ),
        measured.map(|(first, last)| {
            (
                last.1 <= first.1 * LINEAR,
                format!("ms per GiB: {}", told.join(", ")),
            )
        }),
    )
}

fn handover(cases: &[CaseReport]) -> Goal {
    let moved: Vec<_> = cases
        .iter()
        .filter(|case| case.group == "handover")
        .filter_map(|case| Some((case, case.sides.shoal.median?.total_ms)))
        .collect();
    let copied = moved.iter().any(|(case, _)| {
        case.sides
            .shoal
            .runs
            .iter()
            .any(|run| !run.not_as_asked.is_empty())
    });
    let met = !copied && moved.iter().all(|(_, total)| *total <= MAX_HANDOVER_MS);
    let mut told: Vec<_> = moved
        .iter()
        .map(|(case, total)| format!("{} {total:.0} ms", case.name))
        .collect();
    if copied {
        told.push("memory was copied".into());
    }
    goal(
        format!("a move within the host takes at most {MAX_HANDOVER_MS} ms, whatever the size"),
        (!moved.is_empty()).then(|| (met, told.join(", "))),
    )
}

fn as_asked(cases: &[CaseReport]) -> Goal {
    let runs = cases
        .iter()
        .flat_map(|case| case.sides.shoal.runs.iter().map(move |run| (case, run)));
    let (mut all, mut other) = (0, Vec::new());
    for (case, run) in runs {
        all += 1;
        if !run.not_as_asked.is_empty() && !other.contains(&case.name) {
            other.push(case.name);
        }
    }
    let told = if other.is_empty() {
        format!("{all} migrations")
    } else {
        format!("not in {}", other.join(", "))
    };
    goal(
        "each migration was made as it was asked for".into(),
        (all > 0).then_some((other.is_empty(), told)),
    )
}

fn goal(goal: String, measured: Option<(bool, String)>) -> Goal {
    let (met, measured) = match measured {
        Some((met, measured)) => (Some(met), measured),
        None => (None, "not measured".into()),
    };
    Goal { goal, measured, met }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::{Pair, Run, Side};
    use crate::gap::Gaps;
    use serde_json::Value;
    use std::time::Duration;

    const GIB: u64 = 1 << 30;
    const REFERENCES: References = References {
        memcpy_touched: 0.0,
        memcpy_fresh: 0.0,
        memcpy_fresh_huge: 0.0,
        tcp: GIB as f64,
        tcp_fresh: 0.0,
        tcp_fresh_beside_busy_cpu: 0.0,
        tls: 0.0,
    };

    fn side(total_ms: f64, gap_ms: u64) -> Side {
        let gaps = Gaps {
            before: Duration::ZERO,
            during: Duration::from_millis(gap_ms),
            source: None,
            pause: None,
            destination: None,
        };
        let figures = Figures {
            total_ms,
            bytes: GIB as f64,
            cpu_source_s: 1.0,
            cpu_destination_s: 1.0,
            ..Figures::of(&gaps)
        };
        Side::of(vec![Ok(Run {
            figures,
            not_as_asked: vec![],
            details: vec![],
            own_report: Value::Null,
        })])
    }

    fn case(
        name: &'static str,
        group: &'static str,
        filled: u64,
        shoal: Side,
        qemu: Option<Side>,
    ) -> CaseReport {
        CaseReport {
            name,
            title: "",
            group,
            cmdline: "",
            filled,
            sides: Pair { shoal, qemu },
            cloud_hypervisor: None,
        }
    }

    fn verdicts(cases: &[CaseReport]) -> Vec<Option<bool>> {
        judge(cases, &REFERENCES).iter().map(|goal| goal.met).collect()
    }

    #[test]
    fn good_figures_meet_the_goals() {
        let cases = [
            case("filled", "table", GIB, side(1000.0, 1), Some(side(2000.0, 3))),
            case("sweep-8g", "sweep", 8 * GIB, side(9000.0, 1), None),
            case("handover-8g", "handover", 8 * GIB, side(50.0, 1), None),
        ];
        assert_eq!(verdicts(&cases), [Some(true); 9]);
    }

    #[test]
    fn bad_figures_miss_them_and_what_was_not_measured_is_neither() {
        let mut handed = side(40.0, 1);
        handed.runs[0].not_as_asked.push("memory was copied".into());
        let cases = [
            case("filled", "table", GIB, side(1400.0, 3), Some(side(2000.0, 3))),
            case("untouched", "table", 0, side(20.0, 4), Some(side(10.0, 3))),
            case("sweep-8g", "sweep", 8 * GIB, side(99_000.0, 1), None),
            case("handover-8g", "handover", 8 * GIB, handed, None),
        ];
        let no = Some(false);
        // Bytes and CPU are equal to QEMU's, which is allowed.
        assert_eq!(
            verdicts(&cases),
            [no, no, no, no, Some(true), Some(true), no, no, no]
        );
        assert_eq!(verdicts(&[]), [None; 9]);
    }
}
