//! The life of one migration as an SVG: rates, what remained and throttling over time, phases shaded, the pause marked.

mod chart;

use shoal_proto::cluster::Migration;
use shoal_proto::vm::{MigrationPhase, MigrationReport, MigrationSample};

use crate::format;
use crate::view::{MigrationView, phase};
use chart::{Band, Chart, Line, Panel};

const PAGE_BYTES: u64 = 4096;
const MIB: f64 = (1 << 20) as f64;

/// Draws it.
///
/// # Errors
/// There is nothing to draw, in words.
pub fn svg(migration: &Migration) -> Result<String, String> {
    let report = migration.report.as_ref().ok_or_else(|| {
        format!(
            "migration {} has not ended; its life can be drawn when it has",
            migration.id
        )
    })?;
    let samples = if report.samples.len() > 1 {
        report.samples.clone()
    } else {
        from_passes(report)
    };
    if samples.len() < 2 {
        return Err(format!(
            "migration {} has no samples to draw: it ended too early, or is too old (the last 1,000 keep theirs)",
            migration.id
        ));
    }
    let end = samples
        .last()
        .map_or(0, |last| last.elapsed_us)
        .max(report.total_us);
    Ok(Chart {
        title: title(migration, report),
        end: seconds(end),
        bands: bands(&samples, end),
        mark: pause(&samples, report).map(|(from, to)| Band {
            label: format!("pause {}", format::micros(report.downtime_us)),
            color: "#c62828",
            from: seconds(from),
            to: seconds(to),
        }),
        panels: panels(&samples),
    }
    .to_svg())
}

fn title(migration: &Migration, report: &MigrationReport) -> String {
    let view = MigrationView::from(migration);
    format!(
        "{}: {} to {}, {} in {}, {} sent",
        view.vm,
        view.from,
        view.to,
        view.result,
        format::micros(report.total_us),
        format::size(report.bytes_sent),
    )
}

fn panels(samples: &[MigrationSample]) -> Vec<Panel> {
    let points = |value: fn(&MigrationSample) -> f64| -> Vec<(f64, f64)> {
        samples
            .iter()
            .map(|sample| (seconds(sample.elapsed_us), value(sample)))
            .collect()
    };
    let rate = points(|s| mib(s.rate_bytes_per_second));
    let line = |name, color, value| Line {
        name,
        color,
        points: points(value),
    };
    vec![
        Panel {
            unit: "MiB/s",
            least_top: 1.0,
            lines: vec![
                Line {
                    name: "rate",
                    color: "#1565c0",
                    points: smoothed(&rate),
                },
                line("dirty rate", "#ef6c00", |s| mib(s.dirty_rate_bytes_per_second)),
            ],
        },
        Panel {
            unit: "MiB",
            least_top: 1.0,
            lines: vec![line("remaining", "#2e7d32", |s| mib(s.remaining_bytes))],
        },
        Panel {
            unit: "%",
            least_top: 100.0,
            lines: vec![line("throttle", "#6a1b9a", |s| f64::from(s.throttle_percent))],
        },
    ]
}

/// Rates over a hundredth of the whole instead of from one sample to the next: pages go out in bursts, and a sample that
/// falls between two of them says nothing. Each value is of the time since the one before.
fn smoothed(rates: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut sent = 0.0;
    let sums: Vec<f64> = (0..rates.len())
        .map(|at| {
            let since = at.checked_sub(1).map_or(rates[at].0, |before| rates[before].0);
            sent += rates[at].1 * (rates[at].0 - since);
            sent
        })
        .collect();
    let half = rates.last().map_or(0.0, |last| last.0) / 200.0;
    let (mut first, mut last) = (0, 0);
    (0..rates.len())
        .map(|at| {
            let now = rates[at].0;
            while now - rates[first].0 > half {
                first += 1;
            }
            while last + 1 < rates.len() && rates[last + 1].0 - now <= half {
                last += 1;
            }
            let before = if first == at { at.saturating_sub(1) } else { first };
            let took = rates[last].0 - rates[before].0;
            let rate = if took > 0.0 {
                (sums[last] - sums[before]) / took
            } else {
                rates[at].1
            };
            (now, rate)
        })
        .collect()
}

/// Stretches of one phase. The phases of the pause are marked apart.
fn bands(samples: &[MigrationSample], end: u64) -> Vec<Band> {
    let mut bands: Vec<(MigrationPhase, u64)> = Vec::new();
    for sample in samples {
        let now = match sample.phase() {
            MigrationPhase::Unspecified => MigrationPhase::Negotiate,
            phase if in_pause(phase) => MigrationPhase::Pause,
            phase => phase,
        };
        if bands.last().is_none_or(|(last, _)| *last != now) {
            let from = if bands.is_empty() { 0 } else { sample.elapsed_us };
            bands.push((now, from));
        }
    }
    let ends: Vec<u64> = bands.iter().skip(1).map(|(_, from)| *from).chain([end]).collect();
    bands
        .into_iter()
        .zip(ends)
        .filter(|((phase, _), _)| !in_pause(*phase) && *phase != MigrationPhase::Done)
        .map(|((band, from), to)| Band {
            label: phase(band).to_owned(),
            color: match band {
                MigrationPhase::PreCopy => "#e3f2fd",
                MigrationPhase::PostCopy => "#fff3e0",
                _ => "#eceff1",
            },
            from: seconds(from),
            to: seconds(to),
        })
        .collect()
}

fn in_pause(phase: MigrationPhase) -> bool {
    matches!(
        phase,
        MigrationPhase::Pause | MigrationPhase::FinalPages | MigrationPhase::State | MigrationPhase::Commit
    )
}

/// When the guest stood still. Where no sample fell into it, by the report: it is the end, or what post-copy followed.
fn pause(samples: &[MigrationSample], report: &MigrationReport) -> Option<(u64, u64)> {
    if report.downtime_us == 0 {
        return None;
    }
    let sampled = samples.iter().find(|sample| in_pause(sample.phase()));
    let by_report = report
        .total_us
        .saturating_sub(report.post_copy_us)
        .saturating_sub(report.downtime_us);
    let from = sampled.map_or(by_report, |sample| sample.elapsed_us);
    Some((from, from.saturating_add(report.downtime_us)))
}

/// For migrations whose samples are gone, or that had none: two for each pass that is known.
fn from_passes(report: &MigrationReport) -> Vec<MigrationSample> {
    let mut samples = Vec::new();
    let mut elapsed_us: u64 = 0;
    for pass in &report.pass_table {
        let per_second = |bytes: u64| {
            bytes
                .saturating_mul(1_000_000)
                .checked_div(pass.duration_us)
                .unwrap_or(0)
        };
        let sample = MigrationSample {
            elapsed_us,
            rate_bytes_per_second: per_second(pass.bytes),
            dirty_rate_bytes_per_second: per_second(pass.dirtied_pages.saturating_mul(PAGE_BYTES)),
            remaining_bytes: pass
                .pages
                .saturating_add(pass.zero_pages)
                .saturating_mul(PAGE_BYTES),
            throttle_percent: pass.throttle_percent,
            phase: MigrationPhase::PreCopy.into(),
        };
        elapsed_us = elapsed_us.saturating_add(pass.duration_us);
        let last = MigrationSample {
            elapsed_us,
            remaining_bytes: 0,
            ..sample
        };
        samples.extend([sample, last]);
    }
    samples
}

fn seconds(us: u64) -> f64 {
    std::time::Duration::from_micros(us).as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "to be drawn")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_proto::vm::{MigrationPass, MigrationResult};

    fn migration(samples: Vec<MigrationSample>) -> Migration {
        let report = MigrationReport {
            result: MigrationResult::Completed.into(),
            total_us: 2_000_000,
            downtime_us: 3_000,
            bytes_sent: 1 << 30,
            samples,
            ..Default::default()
        };
        Migration {
            id: "id".to_owned(),
            vm_name: "<web> & \"co\"".to_owned(),
            from_node: "node1".to_owned(),
            to_node: "node2".to_owned(),
            report: Some(report),
            ..Default::default()
        }
    }

    fn sample(ms: u64, phase: MigrationPhase) -> MigrationSample {
        MigrationSample {
            elapsed_us: ms * 1000,
            rate_bytes_per_second: 900 << 20,
            dirty_rate_bytes_per_second: u64::MAX,
            remaining_bytes: (2000 - ms) << 20,
            throttle_percent: 40,
            phase: phase.into(),
        }
    }

    #[test]
    fn a_life_is_drawn_with_its_phases_and_its_pause() {
        let svg = svg(&migration(vec![
            sample(0, MigrationPhase::Negotiate),
            sample(10, MigrationPhase::PreCopy),
            sample(1500, MigrationPhase::FinalPages),
            sample(1600, MigrationPhase::PostCopy),
            sample(1990, MigrationPhase::Done),
        ]))
        .expect("drawn");
        for part in [
            "<svg ",
            "</svg>",
            "&lt;web&gt; &amp; &quot;co&quot;",
            "pre-copy",
            "post-copy",
            "pause 3.0 ms",
            "MiB/s",
            "remaining",
            "throttle",
            "dirty rate",
            "seconds",
        ] {
            assert!(svg.contains(part), "no {part} in {svg}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn bursts_are_evened_out_and_what_was_sent_stays_the_same() {
        let bursts: Vec<(f64, f64)> = (0..500u32)
            .map(|at| (f64::from(at), f64::from(at % 2) * 20.0))
            .collect();
        let even = smoothed(&bursts);
        assert_eq!(even.len(), bursts.len());
        for &(at, rate) in &even[5..495] {
            assert!((8.0..=12.0).contains(&rate), "{rate} at {at}");
        }
        let steady = smoothed(&[(0.0, 7.0), (1.0, 7.0), (4.0, 7.0)]);
        assert!(
            steady.iter().all(|&(_, rate)| (rate - 7.0).abs() < 1e-9),
            "{steady:?}"
        );
        assert_eq!(smoothed(&[(0.0, 3.0)]), [(0.0, 3.0)]);
        assert_eq!(smoothed(&[]), []);
    }

    #[test]
    fn without_samples_the_passes_are_drawn_and_without_these_nothing_is() {
        let mut bare = migration(Vec::new());
        let error = svg(&bare).expect_err("nothing to draw");
        assert!(error.contains("no samples"), "{error}");
        let report = bare.report.as_mut().expect("a report");
        report.pass_table = vec![
            MigrationPass {
                pages: 1000,
                bytes: 4_096_000,
                duration_us: 1_000_000,
                dirtied_pages: 50,
                ..Default::default()
            },
            MigrationPass::default(),
        ];
        assert!(svg(&bare).expect("drawn").contains("pre-copy"));
        bare.report = None;
        assert!(svg(&bare).expect_err("it runs").contains("has not ended"));
    }
}
