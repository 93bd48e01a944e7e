//! Recordings of a real cluster: what its planner was shown, second by second, and what the planner of now would have made of it.
//! So the noise of real figures becomes a test.
//!
//! A file is text, gzipped: a first line, then for each moment `at MILLISECONDS` and the cluster as
//! [`shoal_plan::text`] has it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::time::Duration;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::Serialize;
use shoal_plan::{
    Bytes, BytesPerSecond, ClusterSnapshot, Hold, InFlight, NodeName, Plan, Policy, VmId, round, text,
};

/// The first line, followed by `started=` and milliseconds since 1970.
const HEADER: &str = "shoal-recording 1";
/// More is refused, after decompression.
const MOST_BYTES: u64 = 512 << 20;
/// A day, one a second.
const MOST_MOMENTS: usize = 86_400;

/// What is wrong with a recording.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct RecordingError {
    /// From 1; 0 for the file as a whole.
    pub line: usize,
    /// What was found and what was expected.
    pub problem: String,
}

/// Whether a file is a recording, by how it begins.
#[must_use]
pub fn is_recording(data: &[u8]) -> bool {
    data.starts_with(&[0x1f, 0x8b]) || data.starts_with(HEADER.as_bytes())
}

/// Writes a recording, compressed.
#[derive(Debug)]
pub struct Writer<W: Write> {
    encoder: GzEncoder<W>,
    started_ms: Option<i64>,
}

impl<W: Write> Writer<W> {
    /// Begins one.
    #[must_use]
    pub fn new(into: W) -> Self {
        Self {
            encoder: GzEncoder::new(into, Compression::best()),
            started_ms: None,
        }
    }

    /// Adds a moment: milliseconds since 1970, and the cluster as text. Time counts from the first one.
    ///
    /// # Errors
    /// Those of the file.
    pub fn moment(&mut self, now_ms: i64, cluster: &str) -> io::Result<()> {
        let started = match self.started_ms {
            Some(started) => started,
            None => {
                writeln!(self.encoder, "{HEADER} started={now_ms}")?;
                *self.started_ms.insert(now_ms)
            }
        };
        writeln!(self.encoder, "at {}", now_ms.saturating_sub(started).max(0))?;
        self.encoder.write_all(cluster.as_bytes())
    }

    /// Ends it, and gives back what it was written into.
    ///
    /// # Errors
    /// Those of the file.
    pub fn finish(self) -> io::Result<W> {
        self.encoder.finish()
    }
}

/// A cluster at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Moment {
    /// Since the recording began.
    pub at: Duration,
    /// What the planner was shown, and its policy.
    pub cluster: text::Scenario,
}

/// Reads a recording, compressed or not. One that was cut off is read up to its last whole moment.
///
/// # Errors
/// The first line that is not understood, or too much of anything.
pub fn read(data: &[u8]) -> Result<Vec<Moment>, RecordingError> {
    let whole = |problem: String| RecordingError { line: 0, problem };
    let mut bytes = Vec::new();
    let limit = MOST_BYTES + 1;
    let mut cut_off = false;
    if data.starts_with(&[0x1f, 0x8b]) {
        match GzDecoder::new(data).take(limit).read_to_end(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => cut_off = true,
            read => {
                read.map_err(|error| whole(format!("cannot be decompressed: {error}")))?;
            }
        }
    } else {
        bytes.extend_from_slice(data);
    }
    if bytes.len() as u64 > MOST_BYTES {
        return Err(whole(format!("is larger than {MOST_BYTES} bytes")));
    }
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text,
        Err(error) if cut_off => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        Err(error) => return Err(whole(format!("is no text: {error}"))),
    };
    parse(text, cut_off)
}

fn parse(text: &str, cut_off: bool) -> Result<Vec<Moment>, RecordingError> {
    let mut lines = text.split_inclusive('\n').enumerate();
    let first = lines.next().map_or("", |(_, line)| line.trim());
    if first != HEADER && !first.starts_with(&format!("{HEADER} ")) {
        return Err(RecordingError {
            line: 1,
            problem: format!("the first line must be '{HEADER} started=MILLISECONDS'"),
        });
    }
    // Where each moment begins: its line, its time, its text.
    let mut parts: Vec<(usize, Duration, String)> = Vec::new();
    for (index, line) in lines {
        let at_line = |problem: String| RecordingError {
            line: index + 1,
            problem,
        };
        if let Some(time) = line.strip_prefix("at ") {
            let time = time.trim().parse().map_err(|_| {
                at_line("at: must be followed by milliseconds since the recording began".to_owned())
            })?;
            if parts.len() == MOST_MOMENTS {
                return Err(at_line(format!("more than {MOST_MOMENTS} moments")));
            }
            parts.push((index + 1, Duration::from_millis(time), String::new()));
        } else if let Some((_, _, cluster)) = parts.last_mut() {
            cluster.push_str(line);
        } else if !line.trim().is_empty() {
            return Err(at_line(
                "the first moment must begin with 'at MILLISECONDS'".to_owned(),
            ));
        }
    }
    if cut_off {
        parts.pop();
    }
    let moment = |(line, at, cluster): (usize, Duration, String)| {
        let cluster = text::parse(&cluster).map_err(|error| RecordingError {
            line: line + error.line,
            problem: error.problem,
        })?;
        Ok(Moment { at, cluster })
    };
    parts.into_iter().map(moment).collect()
}

/// Something that would have been done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Would {
    /// Milliseconds since the recording began.
    pub at_ms: u64,
    /// What for: the kind of a move, or `suspend` or `resume`.
    pub kind: String,
    /// The VM's name.
    pub vm: String,
    /// Where it is.
    pub from: String,
    /// Where it would go; empty if it is not moved.
    pub to: String,
    /// In words and numbers.
    pub reason: String,
}

/// What the planner would have done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Replayed {
    /// How long the recording is.
    pub seconds: u64,
    /// Plans made: one for each moment.
    pub rounds: usize,
    /// In the order of time.
    pub would: Vec<Would>,
}

impl Replayed {
    /// How often each thing would have been done.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for would in &self.would {
            *counts.entry(would.kind.as_str()).or_default() += 1;
        }
        counts
    }

    /// One line: "3 in 300 s: 2 rebalance, 1 usher", or "nothing in 300 s".
    #[must_use]
    pub fn summary(&self) -> String {
        if self.would.is_empty() {
            return format!("nothing in {} s", self.seconds);
        }
        let mut text = format!("{} in {} s", self.would.len(), self.seconds);
        for (number, (kind, count)) in self.counts().into_iter().enumerate() {
            let before = if number == 0 { ": " } else { ", " };
            let _ = write!(text, "{before}{count} {kind}");
        }
        text
    }
}

/// A VM that would have been moved.
#[derive(Debug)]
struct Moved {
    /// Where the recording had it then. It is where it would have been moved to as long as the recording has it there.
    recorded_on: NodeName,
    to: NodeName,
    arrives: Duration,
}

/// Plans at each moment of a recording, with the recorded policy or another one. What would have been done counts from then on: a
/// VM that would have been moved is on its new node in all later moments, with its memory and its CPU use, until the
/// recording itself moves it or it has ended.
#[must_use]
pub fn replay(moments: &[Moment], policy: Option<&Policy>) -> Replayed {
    let mut done = Done::default();
    let mut replayed = Replayed {
        seconds: moments.last().map_or(0, |last| last.at.as_secs()),
        rounds: moments.len(),
        would: Vec::new(),
    };
    for moment in moments {
        let snapshot = done.apply(moment);
        let plan = round(&snapshot, policy.unwrap_or(&moment.cluster.policy));
        done.carry_out(moment, &plan);
        replayed.would.extend(told(moment, &plan));
    }
    replayed
}

/// What would have been done so far.
#[derive(Debug, Default)]
struct Done {
    moved: BTreeMap<VmId, Moved>,
    suspended: BTreeMap<VmId, BytesPerSecond>,
}

impl Done {
    /// A moment as it would have been.
    fn apply(&mut self, moment: &Moment) -> ClusterSnapshot {
        let mut snapshot = moment.cluster.snapshot.clone();
        self.moved.retain(|id, moved| {
            let vm = snapshot.vms.iter().find(|vm| vm.id == *id);
            vm.is_some_and(|vm| vm.node == moved.recorded_on && vm.in_flight.is_none())
        });
        self.suspended
            .retain(|id, _| snapshot.vms.iter().any(|vm| vm.id == *id));
        for vm in &mut snapshot.vms {
            if let Some(growth) = self.suspended.get(&vm.id) {
                (vm.suspended, vm.suspended_growth) = (true, Some(*growth));
                vm.growth = BytesPerSecond(0);
            }
            let Some(moved) = self.moved.get(&vm.id) else {
                continue;
            };
            if moment.at < moved.arrives {
                vm.in_flight = Some(InFlight {
                    to: moved.to.clone(),
                    received: Bytes(0),
                });
                continue;
            }
            vm.since_last_move = Some(moment.at - moved.arrives);
            let resident = vm.resident.unwrap_or(Bytes(0)).0;
            for node in &mut snapshot.nodes {
                let available = &mut node.memory_available.0;
                if node.name == vm.node {
                    *available = available.saturating_add(resident).min(node.memory.0);
                } else if node.name == moved.to {
                    *available = available.saturating_sub(resident);
                }
            }
            vm.node = moved.to.clone();
        }
        snapshot
    }

    fn carry_out(&mut self, moment: &Moment, plan: &Plan) {
        for action in &plan.actions {
            let mut recorded = moment.cluster.snapshot.vms.iter();
            let recorded = recorded.find(|vm| vm.id == action.vm);
            let moved = Moved {
                recorded_on: recorded.map_or_else(|| action.from.clone(), |vm| vm.node.clone()),
                to: action.to.clone(),
                arrives: moment.at + action.expected,
            };
            self.moved.insert(action.vm.clone(), moved);
        }
        for hold in &plan.suspend {
            self.suspended.insert(hold.vm.clone(), hold.growth);
        }
        for hold in &plan.resume {
            self.suspended.remove(&hold.vm);
        }
    }
}

/// A plan, for people.
fn told(moment: &Moment, plan: &Plan) -> Vec<Would> {
    let would = |kind: &str, id: &VmId, from: &NodeName, to: &str, reason: &str| {
        let mut vms = moment.cluster.snapshot.vms.iter();
        let vm = vms.find(|vm| vm.id == *id);
        Would {
            at_ms: u64::try_from(moment.at.as_millis()).unwrap_or(u64::MAX),
            kind: kind.to_owned(),
            vm: vm.map_or_else(|| id.to_string(), |vm| vm.name.to_string()),
            from: from.to_string(),
            to: to.to_owned(),
            reason: reason.to_owned(),
        }
    };
    let hold = |kind: &str, hold: &Hold| would(kind, &hold.vm, &hold.node, "", &hold.reason);
    let moves = plan.actions.iter().map(|action| {
        would(
            &action.kind.to_string(),
            &action.vm,
            &action.from,
            action.to.as_str(),
            &action.reason,
        )
    });
    let suspend = plan.suspend.iter().map(|vm| hold("suspend", vm));
    let resume = plan.resume.iter().map(|vm| hold("resume", vm));
    moves.chain(suspend).chain(resume).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: &str = "shoal-cluster 1\npolicy cool_down=60s\nnode node1 cpus=2 memory=1GiB available=224MiB\n\
                           node node2 cpus=2 memory=1GiB\n\
                           vm a node=node1 cpus=1 memory=512MiB resident=400MiB growth=20MiB\n\
                           vm b node=node1 cpus=1 memory=512MiB resident=400MiB growth=20MiB\n";

    fn recorded() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for second in 0..30 {
            writer.moment(1_000_000 + 1000 * second, CLUSTER).expect("memory");
        }
        writer.finish().expect("memory")
    }

    #[test]
    fn what_would_be_done_counts_from_then_on() {
        let moments = read(&recorded()).expect("what was written");
        assert_eq!((moments.len(), moments[29].at), (30, Duration::from_secs(29)));
        // Two VMs fill a node: one goes, and then there is room for both.
        let replayed = replay(&moments, None);
        assert_eq!(replayed.summary(), "1 in 29 s: 1 usher", "{replayed:?}");
        assert_eq!(
            (replayed.would[0].from.as_str(), replayed.would[0].to.as_str()),
            ("node1", "node2")
        );
    }

    #[test]
    fn one_that_was_cut_off_is_read_as_far_as_it_goes() {
        let data = recorded();
        assert!(is_recording(&data));
        let cut = read(&data[..data.len() - 12]).expect("as far as it goes");
        assert!(cut.len() < 30, "{}", cut.len());
        for length in 0..data.len() {
            let _ = read(&data[..length]);
        }
    }

    #[test]
    fn errors_name_the_line() {
        let problem = |text: &str| read(text.as_bytes()).expect_err(text).to_string();
        assert_eq!(
            problem("shoal-cluster 1\n"),
            "line 1: the first line must be 'shoal-recording 1 started=MILLISECONDS'"
        );
        assert_eq!(
            problem("shoal-recording 1 started=0\nnode a\n"),
            "line 2: the first moment must begin with 'at MILLISECONDS'"
        );
        assert_eq!(
            problem("shoal-recording 1 started=0\nat noon\n"),
            "line 2: at: must be followed by milliseconds since the recording began"
        );
        let bad = problem("shoal-recording 1 started=0\nat 0\nshoal-cluster 1\nnode a cpus=x memory=1GiB\n");
        assert!(bad.starts_with("line 4: node a: cpus: "), "{bad}");
    }
}
