//! The figures as text.

use crate::figures::{CaseReport, Figures, Goal, Machine, Pair, References, Run, Side, Startup, median};

const GIB: f64 = (1u64 << 30) as f64;
const MIB: f64 = (1u64 << 20) as f64;
/// With less to send, the time says nothing about the rate.
const ENOUGH_BYTES: f64 = 16.0 * MIB;
/// Load average above which others take CPU time from what is measured.
const BUSY: f64 = 0.7;

/// The machine.
pub fn machine(machine: &Machine) -> String {
    let virtualization = if machine.hardware_virtualization {
        "hardware virtualization"
    } else {
        "no hardware virtualization seen"
    };
    let peer = |who: &str, version: &Option<String>| match version {
        Some(version) => format!("{who}: {version}\n"),
        None => format!("{who}: takes no part (not on PATH, or not wanted)\n"),
    };
    let busy = if machine.load_average > BUSY {
        "THIS MACHINE IS BUSY: times and gaps below say little\n"
    } else {
        ""
    };
    format!(
        "{} CPUs ({}), {virtualization}, Linux {}, load average {:.2}\n{busy}",
        machine.cpus, machine.cpu_model, machine.kernel, machine.load_average
    ) + &peer("QEMU", &machine.qemu)
        + &peer("Cloud Hypervisor", &machine.cloud_hypervisor)
}

/// The references.
pub fn references(references: &References, link: Option<f64>) -> String {
    let rows = [
        ("memcpy, touched memory", Some(references.memcpy_touched)),
        (
            "memcpy into fresh memory, 4 KiB pages",
            Some(references.memcpy_fresh),
        ),
        (
            "memcpy into fresh memory, huge pages",
            Some(references.memcpy_fresh_huge),
        ),
        (
            "TCP, one stream over loopback, 1 MiB chunks",
            Some(references.tcp),
        ),
        (
            "the same into fresh memory, huge pages",
            Some(references.tcp_fresh),
        ),
        (
            "the same beside one busy CPU",
            Some(references.tcp_fresh_beside_busy_cpu),
        ),
        ("TLS 1.3, one stream over loopback", Some(references.tls)),
        ("TCP, one stream over 1 Gbit/s", link),
    ];
    let mut text = "references\n".to_owned();
    for (what, rate) in rows {
        if let Some(rate) = rate {
            text += &format!("  {what:<44}{:>8.2} GiB/s\n", rate / GIB);
        }
    }
    text
}

/// Starting: medians.
pub fn startup(startup: &Pair<Startup>) -> String {
    let row = |what: &str, figure: &dyn Fn(&Startup) -> f64, unit: &str| {
        let qemu = startup.qemu.as_ref().map(figure);
        row(what, &[Some(figure(&startup.shoal)), qemu], unit)
    };
    header("starting a guest of 1 GiB", &["QEMU"])
        + &row(
            "process start to first guest byte",
            &|s| median(&s.first_byte_ms),
            "ms",
        )
        + &row("  through the API", &|s| median(&s.first_byte_by_api_ms), "ms")
        + &row(
            "memory beyond guest RAM",
            &|s| median(&s.memory_beyond_guest_bytes) / MIB,
            "MiB",
        )
}

/// One case: medians, and the time against the references; `link` in place of loopback where it is the link.
pub fn case(case: &CaseReport, references: &References, link: Option<f64>) -> String {
    let (shoal, qemu) = (&case.sides.shoal, case.sides.qemu.as_ref());
    let others = [("QEMU", qemu), ("Cloud Hyp.", case.cloud_hypervisor.as_ref())];
    let others: Vec<(&str, &Side)> = others
        .into_iter()
        .filter_map(|(who, side)| Some((who, side?)))
        .collect();
    let names: Vec<&str> = others.iter().map(|(who, _)| *who).collect();
    let mut text = header(&format!("{}: {}", case.name, case.title), &names);
    if let Some(own) = shoal.median {
        let row = |what: &str, figure: &dyn Fn(&Figures) -> f64, unit: &str| {
            let others = others.iter().map(|(_, side)| side.median.as_ref().map(figure));
            let values: Vec<_> = std::iter::once(Some(figure(&own))).chain(others).collect();
            row(what, &values, unit)
        };
        let against = |rate: f64| move |figures: &Figures| against(figures, rate);
        text += &row("total", &|f| f.total_ms, "ms");
        text += &row("downtime", &|f| f.downtime_ms, "ms");
        text += &row("worst gap the guest saw", &|f| f.gap_ms, "ms");
        text += &row("  at the source, before the pause", &|f| f.gap_source_ms, "ms");
        text += &row("  the pause", &|f| f.gap_pause_ms, "ms");
        text += &row("  at the destination", &|f| f.gap_destination_ms, "ms");
        text += &row("  in the 3 s before all that", &|f| f.gap_before_ms, "ms");
        text += &row("sent", &|f| f.bytes / MIB, "MiB");
        text += &row("passes", &|f| f.passes, "");
        text += &row("CPU of the source without vCPUs", &|f| f.cpu_source_s, "s");
        text += &row(
            "CPU of the destination without vCPUs",
            &|f| f.cpu_destination_s,
            "s",
        );
        text += &row(
            "destination's memory beyond guest RAM",
            &|f| f.destination_beyond_guest_bytes / MIB,
            "MiB",
        );
        if let Some(rate) = link.filter(|_| case.group == "link") {
            text += &row("total / TCP over the link, for the bytes", &against(rate), "x");
        } else {
            text += &row("total / TCP for the bytes", &against(references.tcp), "x");
            text += &row(
                "  into fresh memory, beside a busy CPU",
                &against(references.tcp_fresh_beside_busy_cpu),
                "x",
            );
            if case.group == "tls" {
                text += &row("total / TLS for the bytes", &against(references.tls), "x");
            }
        }
    }
    if let Some(run) = middle(shoal) {
        for detail in &run.details {
            text += &format!("  {detail}\n");
        }
    }
    for run in &shoal.runs {
        for note in &run.not_as_asked {
            text += &format!("  NOT AS ASKED: {note}\n");
        }
    }
    text += &failures("Shoal", shoal);
    for (who, side) in others {
        text += &failures(who, side);
    }
    text
}

/// Total time over the time that a stream of `rate` needs for the bytes; NaN if these are few.
pub fn against(figures: &Figures, rate: f64) -> f64 {
    if figures.bytes < ENOUGH_BYTES {
        return f64::NAN;
    }
    figures.total_ms / 1e3 / (figures.bytes / rate)
}

/// One run in a few words.
pub fn brief(figures: &Figures) -> String {
    format!(
        "{:.0} ms, downtime {:.2} ms, worst gap {:.2} ms, {:.1} MiB",
        figures.total_ms,
        figures.downtime_ms,
        figures.gap_ms,
        figures.bytes / MIB
    )
}

/// All cases as one table of Markdown, one cell for each VMM.
pub fn summary(cases: &[CaseReport], with_cloud_hypervisor: bool) -> String {
    let cell = |side: Option<&Side>| match side.map(|side| (side.median, side.failures.len())) {
        None => "-".to_owned(),
        Some((None, _)) => "FAILED".to_owned(),
        Some((Some(f), failures)) => {
            let failed = if failures > 0 {
                format!("; {failures} FAILED")
            } else {
                String::new()
            };
            format!(
                "{:.0} ms, gap {:.1} ({:.1} + {:.1}) ms, downtime {:.2} ms, {:.0} MiB, CPU {:.2} + {:.2} s{failed}",
                f.total_ms,
                f.gap_ms,
                f.gap_source_ms,
                f.gap_destination_ms,
                f.downtime_ms,
                f.bytes / MIB,
                f.cpu_source_s,
                f.cpu_destination_s
            )
            .replace("NaN", "-")
        }
    };
    let last = if with_cloud_hypervisor {
        [" Cloud Hypervisor |", "---|"]
    } else {
        ["", ""]
    };
    let mut text = format!(
        "medians; gap: worst that the guest saw (source before the pause + destination after it)\n\n\
         | case | Shoal | QEMU |{}\n|---|---|---|{}\n",
        last[0], last[1]
    );
    for case in cases {
        text += &format!(
            "| {} | {} | {} |",
            case.title,
            cell(Some(&case.sides.shoal)),
            cell(case.sides.qemu.as_ref())
        );
        if with_cloud_hypervisor {
            text += &format!(" {} |", cell(case.cloud_hypervisor.as_ref()));
        }
        text.push('\n');
    }
    text
}

/// What was to be reached, and whether it was.
pub fn goals(goals: &[Goal]) -> String {
    let mut text = "goals\n".to_owned();
    for goal in goals {
        let verdict = match goal.met {
            Some(true) => "PASS",
            Some(false) => "MISS",
            None => "  - ",
        };
        text += &format!("  {verdict}  {}: {}\n", goal.goal, goal.measured);
    }
    text
}

/// The run whose total is nearest to the median.
fn middle(side: &Side) -> Option<&Run> {
    let median = side.median?.total_ms;
    let off = |run: &Run| (run.figures.total_ms - median).abs();
    side.runs.iter().min_by(|a, b| off(a).total_cmp(&off(b)))
}

fn failures(who: &str, side: &Side) -> String {
    side.failures
        .iter()
        .map(|why| format!("  {who} FAILED: {why}\n"))
        .collect()
}

fn header(title: &str, others: &[&str]) -> String {
    let mut text = format!("{title}\n  {:<40}{:>12}", "", "Shoal");
    for other in others {
        text += &format!("{other:>12}");
    }
    if others.contains(&"QEMU") {
        text += &format!("{:>14}", "Shoal/QEMU");
    }
    text + "\n"
}

/// The first value is Shoal's, the second QEMU's if it is there.
fn row(what: &str, values: &[Option<f64>], unit: &str) -> String {
    let number = |value: Option<f64>| match value.filter(|value| value.is_finite()) {
        None => "-".to_owned(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) => format!("{value:.2}"),
    };
    let mut text = format!("  {what:<40}");
    for value in values {
        text += &format!("{:>12}", number(*value));
    }
    if let [Some(shoal), Some(qemu), ..] = values {
        text += &format!("{:>14}", number(Some(shoal / qemu)));
    }
    format!("{text}  {unit}\n")
}
