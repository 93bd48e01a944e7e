//! The table: where a fault strikes, what it is, and how that may end.

use shoal_tests::pair::Side;
use shoal_tests::proxy::Towards;

/// How a migration ended. What each of them means is checked in `row.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It failed; the source goes on.
    Stays,
    /// It completed; the destination runs the VM.
    Moves,
    /// The source was in doubt, was told that the destination never committed, and goes on.
    Resumed,
    /// The source is in doubt, or says nothing more; the destination runs the VM.
    RunsThere,
    /// The source's migration hangs, its guest does not.
    RunsOn,
    /// The source died before Commit. Nobody runs, and the destination says why it gave up.
    Lost,
    /// The destination died when the guest may have run there. Nobody runs, and the source says what it knows.
    Died,
    /// Post-copy without its source: the destination waits for memory, says so, and can be stopped.
    MemoryLost,
    /// Post-copy without its destination: the source keeps its copy, says so, does not run it, and can be stopped.
    Unreachable,
}

/// Ways to end that are all sound.
pub type Ends = &'static [End];

/// What kind of migration it happens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Over TCP, with all of memory compared before Commit.
    PreCopy,
    /// The same over TLS.
    Tls,
    /// The guest runs at the destination before its memory is there.
    PostCopy,
    /// Memory goes by file descriptor, over a Unix socket.
    HandOver,
    /// As [`Kind::PreCopy`], of a guest that was paused before: it is so afterwards, wherever that is.
    Paused,
}

/// What happens to the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// All are closed, and new ones too.
    Cut,
    /// Nothing more goes through, and nothing is closed.
    Silence,
    /// One bit of the next byte that goes that way is flipped.
    Corrupt(Towards),
    /// One bit of this byte that goes to the destination is flipped, counted from 0.
    CorruptByte(u64),
}

/// What strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strike {
    /// A named fault.
    Fault(&'static str, &'static str),
    /// The connections, while the named fault holds one side at that point.
    Link(Trouble, &'static str),
    /// The connections, from the start.
    LinkFromStart(Trouble),
    /// No line of one side's log can be written.
    LogFull(Side),
}

/// One row.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub kind: Kind,
    pub strike: Strike,
    /// Any of these.
    pub ends: Ends,
}

impl Row {
    pub fn name(&self) -> String {
        let strike = match self.strike {
            Strike::Fault(point, action) => format!("{point}={action}"),
            Strike::Link(trouble, point) => format!("{trouble:?} at {point}"),
            Strike::LinkFromStart(trouble) => format!("{trouble:?}"),
            Strike::LogFull(side) => format!("{side:?} with its log on a full disk"),
        };
        format!("{:?}, {strike}", self.kind)
    }

    /// Where the named fault strikes.
    pub fn side(&self) -> Option<Side> {
        match self.strike {
            Strike::Fault(point, _) | Strike::Link(_, point) if point.starts_with("source.") => {
                Some(Side::Source)
            }
            Strike::Fault(..) | Strike::Link(..) => Some(Side::Destination),
            Strike::LinkFromStart(_) | Strike::LogFull(_) => None,
        }
    }
}

/// What every point has: how it ends when the process dies there, when the thread hangs, and when the step fails.
pub struct Point {
    pub name: &'static str,
    pub kind: Kind,
    pub kill: Ends,
    pub hang: Ends,
    pub error: Ends,
}

const fn point(name: &'static str, kind: Kind, kill: Ends, hang: Ends, error: Ends) -> Point {
    Point {
        name,
        kind,
        kill,
        hang,
        error,
    }
}

use Kind::{HandOver, Paused, PostCopy, PreCopy, Tls};

const STAYS: Ends = &[End::Stays];
const MOVES: Ends = &[End::Moves];
const RESUMED: Ends = &[End::Resumed];
const RUNS_THERE: Ends = &[End::RunsThere];
/// The source is in doubt at once: who asks the destination before it has read Commit ends it there.
const IN_DOUBT: Ends = &[End::RunsThere, End::Resumed];
const RUNS_ON: Ends = &[End::RunsOn];
const LOST: Ends = &[End::Lost];
const DIED: Ends = &[End::Died];
/// No row.
const NOWHERE: Ends = &[];
const MEMORY_LOST: Ends = &[End::MemoryLost];
const UNREACHABLE: Ends = &[End::Unreachable];

/// Each point of `shoal_vmm::fault::POINTS` once, and again for migrations of another kind.
pub const POINTS: &[Point] = &[
    // What waits longest begins first.
    point("source.connect", PreCopy, LOST, RUNS_ON, STAYS),
    point("source.negotiate", PreCopy, LOST, RUNS_ON, STAYS),
    point("source.pre_copy", PreCopy, LOST, RUNS_ON, STAYS),
    point("source.pause", PreCopy, LOST, RUNS_ON, STAYS),
    point("source.final_pages", PreCopy, LOST, RUNS_ON, STAYS),
    point("source.verify", PreCopy, LOST, RUNS_ON, STAYS),
    point("source.state", PreCopy, LOST, RUNS_ON, STAYS),
    point("source.ready", PreCopy, LOST, RUNS_ON, STAYS),
    point("source.commit", PreCopy, RUNS_THERE, RUNS_THERE, IN_DOUBT),
    point("source.post_copy", PostCopy, MEMORY_LOST, MEMORY_LOST, MOVES),
    point("destination.connect", PreCopy, STAYS, STAYS, STAYS),
    point("destination.negotiate", PreCopy, STAYS, STAYS, STAYS),
    point("destination.memory", PreCopy, STAYS, STAYS, STAYS),
    point("destination.pre_copy", PreCopy, STAYS, STAYS, STAYS),
    point("destination.pause", PreCopy, STAYS, STAYS, STAYS),
    point("destination.final_pages", PreCopy, STAYS, STAYS, STAYS),
    point("destination.verify", PreCopy, STAYS, STAYS, STAYS),
    point("destination.state", PreCopy, STAYS, STAYS, STAYS),
    point("destination.ready", PreCopy, RESUMED, RESUMED, RESUMED),
    point("destination.ran_mark", PreCopy, RESUMED, RESUMED, RESUMED),
    point("destination.commit", PreCopy, RESUMED, RESUMED, RESUMED),
    // No thread can hang between the mark and the run: nothing waits there.
    point("destination.marked", PreCopy, DIED, NOWHERE, MOVES),
    point("destination.running", PreCopy, DIED, RUNS_THERE, MOVES),
    point("destination.post_copy", PostCopy, UNREACHABLE, UNREACHABLE, MOVES),
    // Up to Commit post-copy is as safe as any migration.
    point("source.final_pages", PostCopy, LOST, RUNS_ON, STAYS),
    point("source.state", PostCopy, LOST, RUNS_ON, STAYS),
    point("destination.pause", PostCopy, STAYS, STAYS, STAYS),
    point("destination.state", PostCopy, STAYS, STAYS, STAYS),
    point("destination.ready", PostCopy, RESUMED, RESUMED, RESUMED),
    // So is a move within a host, where both sides have the same memory.
    point("source.pause", HandOver, LOST, RUNS_ON, STAYS),
    point("source.state", HandOver, LOST, RUNS_ON, STAYS),
    point("source.commit", HandOver, RUNS_THERE, RUNS_THERE, IN_DOUBT),
    point("destination.negotiate", HandOver, STAYS, STAYS, STAYS),
    point("destination.state", HandOver, STAYS, STAYS, STAYS),
    point("destination.ready", HandOver, RESUMED, RESUMED, RESUMED),
    point("destination.ran_mark", HandOver, RESUMED, RESUMED, RESUMED),
    point("destination.running", HandOver, DIED, RUNS_THERE, MOVES),
];

const fn fault(point: &'static str, action: &'static str, ends: Ends) -> Row {
    fault_of(PreCopy, point, action, ends)
}

const fn fault_of(kind: Kind, point: &'static str, action: &'static str, ends: Ends) -> Row {
    Row {
        kind,
        strike: Strike::Fault(point, action),
        ends,
    }
}

const fn link(trouble: Trouble, at: &'static str, ends: Ends) -> Row {
    link_of(PreCopy, trouble, at, ends)
}

const fn link_of(kind: Kind, trouble: Trouble, at: &'static str, ends: Ends) -> Row {
    Row {
        kind,
        strike: Strike::Link(trouble, at),
        ends,
    }
}

use Trouble::{Corrupt, CorruptByte, Cut, Silence};

const TO: Trouble = Corrupt(Towards::Destination);
const BACK: Trouble = Corrupt(Towards::Source);

/// A byte in the middle of the pages of the first pass.
const IN_A_PAGE: u64 = 8 << 20;
/// A byte of Hello.
const IN_HELLO: u64 = 40;

/// All else.
pub const MORE: &[Row] = &[
    // No memory for the guest; later what is needed more is little, and either end is sound.
    fault("destination.connect", "oom", STAYS),
    fault("destination.negotiate", "oom", STAYS),
    fault("destination.memory", "oom", STAYS),
    fault("destination.pre_copy", "oom", &[End::Moves, End::Stays]),
    fault("destination.pause", "oom", &[End::Moves, End::Stays]),
    fault("destination.final_pages", "oom", &[End::Moves, End::Stays]),
    fault("destination.verify", "oom", &[End::Moves, End::Stays]),
    fault("destination.state", "oom", &[End::Moves, End::Stays]),
    fault("destination.ready", "oom", &[End::Moves, End::Resumed]),
    fault("destination.commit", "oom", &[End::Moves, End::Resumed]),
    fault("source.connect", "oom", &[End::Moves, End::Stays]),
    fault("source.pre_copy", "oom", &[End::Moves, End::Stays]),
    fault("source.state", "oom", &[End::Moves, End::Stays]),
    fault("destination.ran_mark", "disk_full", RESUMED),
    // The link, at each phase.
    link(Cut, "source.negotiate", STAYS),
    link(Silence, "source.negotiate", STAYS),
    link(TO, "source.negotiate", STAYS),
    link(Cut, "source.pre_copy", STAYS),
    link(Silence, "source.pre_copy", STAYS),
    link(TO, "source.pre_copy", STAYS),
    link(Cut, "source.pause", STAYS),
    link(Silence, "source.pause", STAYS),
    link(TO, "source.pause", STAYS),
    link(Cut, "source.final_pages", STAYS),
    link(Silence, "source.final_pages", STAYS),
    link(TO, "source.final_pages", STAYS),
    link(Cut, "source.verify", STAYS),
    link(Silence, "source.verify", STAYS),
    link(TO, "source.verify", STAYS),
    link(Cut, "source.state", STAYS),
    link(Silence, "source.state", STAYS),
    link(TO, "source.state", STAYS),
    // Ready is lost.
    link(Cut, "destination.state", STAYS),
    link(Silence, "destination.state", STAYS),
    link(BACK, "destination.state", STAYS),
    // Commit is lost: Ready has come, and the source has yet to read it. On a busy host Ready may be late, and is lost.
    link(Cut, "source.ready", &[End::Resumed, End::Stays]),
    link(Silence, "source.ready", &[End::Resumed, End::Stays]),
    link(TO, "source.ready", &[End::Resumed, End::Stays]),
    // Running is lost.
    link(Cut, "destination.running", RUNS_THERE),
    link(Silence, "destination.running", RUNS_THERE),
    link(BACK, "destination.running", RUNS_THERE),
    // Post-copy takes up again once the link is back.
    link_of(
        PostCopy,
        Cut,
        "destination.post_copy",
        &[End::Moves, End::RunsThere],
    ),
    link_of(
        PostCopy,
        Silence,
        "destination.post_copy",
        &[End::Moves, End::RunsThere],
    ),
    link_of(
        PostCopy,
        BACK,
        "destination.post_copy",
        &[End::Moves, End::RunsThere],
    ),
    link_of(PostCopy, Cut, "source.state", STAYS),
    // Nothing lets a paused guest run: neither a failure, nor the way out of doubt.
    fault_of(Paused, "destination.state", "kill", STAYS),
    fault_of(Paused, "destination.commit", "kill", RESUMED),
    link_of(Paused, Cut, "destination.running", RUNS_THERE),
    link_of(Tls, TO, "source.pre_copy", STAYS),
    link_of(Tls, Cut, "source.state", STAYS),
    link_of(Tls, Silence, "destination.running", RUNS_THERE),
    Row {
        kind: PreCopy,
        strike: Strike::LogFull(Side::Source),
        ends: MOVES,
    },
    Row {
        kind: PostCopy,
        strike: Strike::LogFull(Side::Destination),
        ends: MOVES,
    },
    Row {
        kind: PreCopy,
        strike: Strike::LinkFromStart(CorruptByte(IN_HELLO)),
        ends: STAYS,
    },
    Row {
        kind: PreCopy,
        strike: Strike::LinkFromStart(CorruptByte(IN_A_PAGE)),
        ends: MOVES,
    },
    Row {
        kind: Tls,
        strike: Strike::LinkFromStart(CorruptByte(IN_A_PAGE)),
        ends: STAYS,
    },
];

/// What a point says of one action.
type EndOf = fn(&Point) -> Ends;

/// All rows, those that wait longest first.
pub fn rows() -> Vec<Row> {
    let mut rows = vec![];
    let actions: [(&'static str, EndOf); 4] = [
        ("hang", |point| point.hang),
        ("kill", |point| point.kill),
        ("error", |point| point.error),
        ("delay:200", |_| MOVES),
    ];
    for (action, end) in actions {
        let points = POINTS.iter().filter(|point| !end(point).is_empty());
        rows.extend(points.map(|point| Row {
            kind: point.kind,
            strike: Strike::Fault(point.name, action),
            ends: end(point),
        }));
    }
    rows.extend(MORE);
    rows
}
