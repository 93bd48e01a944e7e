//! The figures as text.

use crate::figures::{CaseReport, Figures, Machine, Pair, References, Side, Startup, median};

const GIB: f64 = (1u64 << 30) as f64;
const MIB: f64 = (1u64 << 20) as f64;
/// With less to send, the time says nothing about the rate.
const ENOUGH_BYTES: f64 = 16.0 * MIB;

/// The machine.
pub fn machine(machine: &Machine) -> String {
    let virtualization = if machine.hardware_virtualization {
        "hardware virtualization"
    } else {
        "no hardware virtualization seen"
    };
    format!(
        "{} CPUs ({}), {virtualization}, Linux {}, load average {:.2}\n",
        machine.cpus, machine.cpu_model, machine.kernel, machine.load_average
    )
}

/// The references.
pub fn references(references: &References) -> String {
    let rows = [
        ("memcpy, touched memory", references.memcpy_touched),
        ("memcpy into fresh memory, 4 KiB pages", references.memcpy_fresh),
        (
            "memcpy into fresh memory, huge pages",
            references.memcpy_fresh_huge,
        ),
        ("TCP, one stream over loopback, 1 MiB chunks", references.tcp),
        ("the same into fresh memory, huge pages", references.tcp_fresh),
        (
            "the same beside one busy CPU",
            references.tcp_fresh_beside_busy_cpu,
        ),
    ];
    let mut text = "references\n".to_owned();
    for (what, rate) in rows {
        text += &format!("  {what:<44}{:>8.2} GiB/s\n", rate / GIB);
    }
    text
}

/// Starting: medians.
pub fn startup(startup: &Pair<Startup>) -> String {
    let row = |what: &str, figure: &dyn Fn(&Startup) -> f64, unit: &str| {
        row(
            what,
            figure(&startup.shoal),
            startup.qemu.as_ref().map(figure),
            unit,
        )
    };
    header("starting a guest of 1 GiB")
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

/// One case: medians, and Shoal's and QEMU's time against the references.
pub fn case(case: &CaseReport, references: &References) -> String {
    let (shoal, qemu) = (&case.sides.shoal, case.sides.qemu.as_ref());
    let mut text = header(&format!("{}: {}", case.name, case.title));
    if let Some(median) = shoal.median {
        let other = qemu.and_then(|side| side.median);
        let row = |what: &str, figure: &dyn Fn(&Figures) -> f64, unit: &str| {
            row(what, figure(&median), other.as_ref().map(figure), unit)
        };
        let against = |rate: f64| {
            move |f: &Figures| {
                if f.bytes < ENOUGH_BYTES {
                    return f64::NAN;
                }
                f.total_ms / 1e3 / (f.bytes / rate)
            }
        };
        text += &row("total", &|f| f.total_ms, "ms");
        text += &row("downtime", &|f| f.downtime_ms, "ms");
        text += &row("worst gap the guest saw", &|f| f.gap_ms, "ms");
        text += &row("  in the 3 s before", &|f| f.gap_before_ms, "ms");
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
        text += &row("total / TCP for the bytes", &against(references.tcp), "x");
        text += &row(
            "  into fresh memory, beside a busy CPU",
            &against(references.tcp_fresh_beside_busy_cpu),
            "x",
        );
    }
    text + &failures("Shoal", shoal) + &qemu.map_or_else(String::new, |side| failures("QEMU", side))
}

fn failures(who: &str, side: &Side) -> String {
    side.failures
        .iter()
        .map(|why| format!("  {who} FAILED: {why}\n"))
        .collect()
}

fn header(title: &str) -> String {
    format!(
        "{title}\n  {:<40}{:>12}{:>12}{:>14}\n",
        "", "Shoal", "QEMU", "Shoal/QEMU"
    )
}

fn row(what: &str, shoal: f64, qemu: Option<f64>, unit: &str) -> String {
    let number = |value: Option<f64>| match value.filter(|value| value.is_finite()) {
        None => "-".to_owned(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) => format!("{value:.2}"),
    };
    let ratio = qemu.map(|qemu| shoal / qemu);
    format!(
        "  {what:<40}{:>12}{:>12}{:>14}  {unit}\n",
        number(Some(shoal)),
        number(qemu),
        number(ratio)
    )
}
