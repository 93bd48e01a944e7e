//! Traces of real VMs as CSV: Shoal's own form, and PlanetLab's. Both are bounded, and every error names the line and field.

use std::io::Read;
use std::sync::Arc;

use flate2::read::GzDecoder;
use shoal_plan::text::{parse_duration, parse_number, parse_size};

/// More is refused, after decompression.
const MOST_BYTES: u64 = 256 << 20;
const MOST_VMS: usize = 100_000;
const MOST_SAMPLES: usize = 20_000_000;
/// The first line of Shoal's own form.
const HEADER: &str = "shoal-trace 1";
/// PlanetLab's samples are five minutes apart.
const PLANETLAB_INTERVAL: f64 = 300.0;

/// How a file is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TraceForm {
    /// `NAME,PERCENT,PERCENT,…`, five minutes apart; sizes are chosen by the scenario.
    PlanetLab,
    /// First `shoal-trace 1 interval=DURATION`, then `NAME,ARRIVAL,CPUS,MEMORY,SAMPLE,…`.
    #[default]
    Shoal,
}

/// What is wrong with a trace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct TraceError {
    /// From 1; 0 for the file as a whole.
    pub line: usize,
    /// The field, the value and what was expected.
    pub problem: String,
}

/// One VM's samples.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceVm {
    /// As in the file; unique.
    pub name: String,
    /// Seconds.
    pub arrival: f64,
    /// Virtual CPUs, where the file says so.
    pub cpus: Option<u32>,
    /// Bytes it is given, where the file says so.
    pub memory: Option<u64>,
    /// CPU use as a part of the VM's CPUs.
    pub cpu: Vec<f32>,
    /// Bytes held, one a sample; empty where the file does not say.
    pub resident: Vec<u64>,
}

/// A trace.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// Seconds between samples.
    pub interval: f64,
    /// In the file's order.
    pub vms: Arc<[TraceVm]>,
}

/// Reads a trace; gzip is recognised.
///
/// # Errors
/// The first line that is not understood, or too much of anything.
pub fn parse_trace(data: &[u8], form: TraceForm) -> Result<Trace, TraceError> {
    let whole = |problem: String| TraceError { line: 0, problem };
    let mut text = String::new();
    let limit = MOST_BYTES + 1;
    let read = if data.starts_with(&[0x1f, 0x8b]) {
        GzDecoder::new(data).take(limit).read_to_string(&mut text)
    } else {
        data.take(limit).read_to_string(&mut text)
    };
    read.map_err(|error| whole(format!("cannot be read as text: {error}")))?;
    if text.len() as u64 > MOST_BYTES {
        return Err(whole(format!("larger than {MOST_BYTES} bytes")));
    }
    parse_text(&text, form)
}

fn parse_text(text: &str, form: TraceForm) -> Result<Trace, TraceError> {
    let mut interval = (form == TraceForm::PlanetLab).then_some(PLANETLAB_INTERVAL);
    let mut vms: Vec<TraceVm> = Vec::new();
    let mut names = std::collections::HashSet::new();
    let mut samples = 0;
    for (index, line) in text.lines().enumerate() {
        let at_line = |problem: String| TraceError {
            line: index + 1,
            problem,
        };
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        if interval.is_none() {
            interval = Some(parse_header(line).map_err(at_line)?);
            continue;
        }
        if vms.len() == MOST_VMS {
            return Err(at_line(format!("more than {MOST_VMS} VMs")));
        }
        let vm = parse_vm(line, form).map_err(at_line)?;
        samples += vm.cpu.len();
        if samples > MOST_SAMPLES {
            return Err(at_line(format!("more than {MOST_SAMPLES} samples")));
        }
        if !names.insert(vm.name.clone()) {
            return Err(at_line(format!("name: '{}' is there twice", cut(&vm.name))));
        }
        vms.push(vm);
    }
    let whole = |problem: String| TraceError { line: 0, problem };
    let interval = interval.ok_or_else(|| whole(format!("the first line must be '{HEADER} interval=…'")))?;
    if vms.is_empty() {
        return Err(whole("it holds no VMs".to_owned()));
    }
    Ok(Trace {
        interval,
        vms: vms.into(),
    })
}

fn parse_header(line: &str) -> Result<f64, String> {
    let rest = line
        .strip_prefix(HEADER)
        .and_then(|rest| rest.trim().strip_prefix("interval="))
        .ok_or_else(|| format!("'{}' is not the first line '{HEADER} interval=…'", cut(line)))?;
    parse_duration(rest)
        .map(|interval| interval.as_secs_f64())
        .filter(|interval| (0.1..=86_400.0).contains(interval))
        .ok_or_else(|| format!("interval: '{}' is not a duration of 100ms to 86400s", cut(rest)))
}

fn parse_vm(line: &str, form: TraceForm) -> Result<TraceVm, String> {
    let mut fields = line.split(',').map(str::trim);
    let name = fields.next().unwrap_or_default();
    if name.is_empty() || name.len() > 128 {
        return Err(format!("name: '{}' is not 1 to 128 characters", cut(name)));
    }
    let mut vm = TraceVm {
        name: name.to_owned(),
        arrival: 0.0,
        cpus: None,
        memory: None,
        cpu: Vec::new(),
        resident: Vec::new(),
    };
    if form == TraceForm::Shoal {
        parse_sizes(&mut vm, &mut fields)?;
    }
    for (number, field) in fields.enumerate() {
        let bad = |what: &str| format!("sample {}: '{}' is not {what}", number + 1, cut(field));
        let (cpu, memory) = match field.split_once(':') {
            Some((cpu, memory)) if form == TraceForm::Shoal => (cpu, Some(memory)),
            _ => (field, None),
        };
        let percent = parse_number(cpu).filter(|percent| *percent <= 100.0);
        let percent = percent.ok_or_else(|| bad("a percentage of 0 to 100"))?;
        #[allow(clippy::cast_possible_truncation)] // 0 to 1, to seven digits
        vm.cpu.push((percent / 100.0) as f32);
        if let Some(memory) = memory {
            let most = vm.memory.unwrap_or(u64::MAX);
            let held = parse_size(memory).filter(|held| *held <= most);
            let held = held.ok_or_else(|| bad("PERCENT:SIZE of at most the VM's memory"))?;
            vm.resident.push(held);
        }
        if !vm.resident.is_empty() && vm.resident.len() != vm.cpu.len() {
            return Err(bad("PERCENT:SIZE like the samples before it"));
        }
    }
    if vm.cpu.is_empty() {
        return Err("sample 1: missing".to_owned());
    }
    Ok(vm)
}

fn parse_sizes<'a>(vm: &mut TraceVm, fields: &mut impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut next = |name: &str| fields.next().ok_or_else(|| format!("{name}: missing"));
    let arrival = next("arrival")?;
    vm.arrival = parse_duration(arrival)
        .map(|arrival| arrival.as_secs_f64())
        .filter(|arrival| *arrival <= 31.0 * 86_400.0)
        .ok_or_else(|| {
            format!(
                "arrival: '{}' is not a duration like 300s, of at most 31 days",
                cut(arrival)
            )
        })?;
    let cpus = next("cpus")?;
    let count = cpus.parse().ok().filter(|count| (1..=1024).contains(count));
    vm.cpus = Some(count.ok_or_else(|| format!("cpus: '{}' is not 1 to 1024", cut(cpus)))?);
    let memory = next("memory")?;
    let size = parse_size(memory).filter(|size| (1 << 20..=1 << 44).contains(size));
    vm.memory =
        Some(size.ok_or_else(|| format!("memory: '{}' is not a size of 1MiB to 16TiB", cut(memory)))?);
    Ok(())
}

/// For messages: not the whole of a long value.
pub(crate) fn cut(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn both_forms_are_read() {
        let text =
            "# comment\nshoal-trace 1 interval=60s\na,0s,2,1GiB,50:512MiB,100:1GiB\nb,90s,1,64MiB,0.5\n";
        let trace = parse_trace(text.as_bytes(), TraceForm::Shoal).expect("good");
        assert_eq!(trace.interval, 60.0);
        assert_eq!(trace.vms[0].cpu, [0.5, 1.0]);
        assert_eq!(trace.vms[0].resident, [512 << 20, 1 << 30]);
        assert_eq!((trace.vms[1].arrival, trace.vms[1].cpus), (90.0, Some(1)));

        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(b"vm0000,24,34\nvm0001,0,100\n").expect("memory");
        let trace = parse_trace(&packed.finish().expect("memory"), TraceForm::PlanetLab).expect("good");
        assert_eq!(
            (trace.interval, trace.vms.len(), trace.vms[1].cpu[1]),
            (300.0, 2, 1.0)
        );
    }

    #[test]
    fn errors_name_the_line_and_the_field() {
        let own = |rest: &str| {
            let text = format!("shoal-trace 1 interval=60s\n{rest}");
            parse_trace(text.as_bytes(), TraceForm::Shoal)
                .expect_err(rest)
                .to_string()
        };
        for (text, problem) in [
            (
                "a,0s,1,1GiB,101",
                "line 2: sample 1: '101' is not a percentage of 0 to 100",
            ),
            (
                "a,0s,1,1GiB,1,NaN",
                "line 2: sample 2: 'NaN' is not a percentage of 0 to 100",
            ),
            ("a,0s,0,1GiB,1", "line 2: cpus: '0' is not 1 to 1024"),
            (
                "a,0s,1,lots,1",
                "line 2: memory: 'lots' is not a size of 1MiB to 16TiB",
            ),
            (
                "a,soon,1,1GiB,1",
                "line 2: arrival: 'soon' is not a duration like 300s, of at most 31 days",
            ),
            ("a,0s,1", "line 2: memory: missing"),
            ("a,0s,1,1GiB", "line 2: sample 1: missing"),
            (",0s,1,1GiB,1", "line 2: name: '' is not 1 to 128 characters"),
            (
                "a,0s,1,1GiB,1:2GiB",
                "line 2: sample 1: '1:2GiB' is not PERCENT:SIZE of at most the VM's memory",
            ),
            (
                "a,0s,1,1GiB,1:1MiB,2",
                "line 2: sample 2: '2' is not PERCENT:SIZE like the samples before it",
            ),
            ("a,0s,1,1GiB,1\na,0s,1,1GiB,1", "line 3: name: 'a' is there twice"),
            ("", "line 0: it holds no VMs"),
        ] {
            assert_eq!(own(text), problem);
        }
        let error = parse_trace(b"vm,24,-1", TraceForm::PlanetLab).expect_err("negative");
        assert_eq!(
            error.to_string(),
            "line 1: sample 2: '-1' is not a percentage of 0 to 100"
        );
        assert!(parse_trace(b"\x1f\x8b garbage", TraceForm::PlanetLab).is_err());
        assert!(parse_trace(b"\xff\xfe", TraceForm::PlanetLab).is_err());
    }

    #[test]
    fn a_gzip_bomb_is_refused() {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        let zeros = vec![b'\n'; 1 << 20];
        for _ in 0..257 {
            packed.write_all(&zeros).expect("memory");
        }
        let packed = packed.finish().expect("memory");
        assert!(packed.len() < 1 << 20);
        let error = parse_trace(&packed, TraceForm::PlanetLab).expect_err("too large");
        assert_eq!(error.to_string(), "line 0: larger than 268435456 bytes");
    }
}
