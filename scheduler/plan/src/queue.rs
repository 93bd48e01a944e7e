//! VMs that wait for room: in which order, which start now, and who is stopped for them.
//!
//! Users take turns: the next VM is one of the user who has the fewest running for its weight. A user is the value of the
//! label `user`. Of one user's VMs the one of the highest priority is first, then the one that came first. A later VM may
//! start before an earlier one that does not fit, until that has waited for the policy's patience: then all nodes that it may go to
//! are kept for it.
//!
//! For one that fits nowhere others may be stopped ([`crate::preempt`]), whoever is before it: that takes no room from these. The
//! room is its own from then on: it is looked at before all others.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::cluster::Cluster;
use crate::labels::Labels;
use crate::model::{ClusterSnapshot, VmId};
use crate::newcomer::Newcomer;
use crate::place::{
    LaunchRequest, PlaceError, Placement, asked, best_node, place, place_in_turn, place_where_room_was_made,
};
use crate::policy::Policy;
use crate::preempt::{Held, Preemption, Victims, awaited, describe_awaited};

/// So many are looked at in a round.
const TRIES: usize = 200;
/// For so many it is looked in a round who could be stopped for them.
const PREEMPTION_TRIES: usize = 16;
/// For so many others are stopped in a round.
const PREEMPTIONS: usize = 4;

/// The label that names the user.
pub const USER: &str = "user";

/// A VM that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Unique; room that is held for it is found by this.
    pub id: VmId,
    /// Its name, for the reasons people read.
    pub name: String,
    /// What it needs, and its priority.
    pub request: LaunchRequest,
    /// For how long.
    pub since: Duration,
}

/// What becomes of one that waits.
#[derive(Debug, Clone, PartialEq)]
pub enum Turn {
    /// It can start now.
    Start(Placement),
    /// It can start once these have been stopped.
    Preempt(Preemption),
    /// Those that give way to it have not all ended yet.
    Awaits {
        /// Who, where.
        reason: String,
    },
    /// It fits nowhere.
    Refused(PlaceError),
    /// As many as are looked at in a round are before it.
    Later,
    /// One before it has waited too long, and may go wherever it could start.
    Behind {
        /// That one's name.
        name: String,
    },
}

/// All that wait, in their order, with what becomes of each: first the number in `waiting`, which is in the order of
/// arrival.
#[must_use]
pub fn take_turns(snapshot: &ClusterSnapshot, policy: &Policy, waiting: &[Waiting]) -> Vec<(usize, Turn)> {
    let rules = waiting.iter().filter_map(|vm| vm.request.rules.as_deref());
    let mut cluster = Cluster::without_holds(snapshot, policy, rules);
    let (held, others): (Vec<usize>, Vec<usize>) = order(snapshot, policy, waiting)
        .into_iter()
        .partition(|&number| held_for(&cluster, snapshot, &waiting[number]).is_some());
    let mut turns = Vec::with_capacity(waiting.len());
    turns.extend(take_held(&mut cluster, snapshot, waiting, held));
    let mut room = RoomMaking::default();
    let mut first: Option<&Waiting> = None;
    for (tried, number) in others.into_iter().enumerate() {
        let vm = &waiting[number];
        let turn = if tried < TRIES {
            turn(&mut cluster, vm, first, &mut room)
        } else {
            Turn::Later
        };
        let waits = matches!(turn, Turn::Refused(_) | Turn::Behind { .. });
        if waits && vm.since >= policy.queue_patience {
            keep_nodes(&mut cluster, &vm.request);
            first = first.or(Some(vm));
        }
        turns.push((number, turn));
    }
    turns
}

/// What becomes of one, if `first` is the first of those that have waited too long.
fn turn<'a>(
    cluster: &mut Cluster<'a>,
    vm: &'a Waiting,
    first: Option<&Waiting>,
    room: &mut RoomMaking,
) -> Turn {
    let behind = |first: &Waiting| Turn::Behind {
        name: first.name.clone(),
    };
    let all_kept = first.filter(|_| cluster.nodes.iter().all(|node| node.kept));
    let waits = match all_kept {
        Some(first) => behind(first),
        None => match place_in_turn(cluster, &vm.request) {
            Ok(placement) => return Turn::Start(placement),
            Err(error) => first.map_or(Turn::Refused(error), behind),
        },
    };
    if first.is_some_and(|first| vm.request.priority <= first.request.priority) {
        return waits;
    }
    room.make(cluster, vm).map_or(waits, Turn::Preempt)
}

/// Keeps all nodes that a VM may go to, by what it asks of them.
fn keep_nodes<'a>(cluster: &mut Cluster<'a>, request: &'a LaunchRequest) {
    let Ok(asked) = asked(cluster, request) else {
        return;
    };
    let newcomer = Newcomer::launch(cluster, request);
    for number in 0..cluster.nodes.len() {
        let may = asked.is_none_or(|asked| asked == number);
        let node = &mut cluster.nodes[number];
        node.kept |= may && newcomer.check_labels(node.view).is_ok();
    }
}

fn held_for<'a>(cluster: &Cluster<'_>, snapshot: &'a ClusterSnapshot, vm: &Waiting) -> Option<&'a Held> {
    let mut held = snapshot.held.iter().filter(|held| held.vm == vm.id);
    held.find(|held| awaited(cluster, held).is_some())
}

/// Those for which room is being made: each starts where that is, or wherever else there is room; otherwise it is kept for it.
fn take_held<'a>(
    cluster: &mut Cluster<'a>,
    snapshot: &ClusterSnapshot,
    waiting: &'a [Waiting],
    numbers: Vec<usize>,
) -> Vec<(usize, Turn)> {
    let mut turns = Vec::with_capacity(numbers.len());
    let mut still: Vec<(usize, String)> = Vec::new();
    for number in numbers {
        let vm = &waiting[number];
        let held = held_for(cluster, snapshot, vm);
        let Some(room) = held.and_then(|held| awaited(cluster, held)) else {
            continue;
        };
        match place_where_room_was_made(cluster, &vm.request, room.node) {
            Some(placement) => turns.push((number, Turn::Start(placement))),
            None => {
                let newcomer = Newcomer::launch(cluster, &vm.request);
                cluster.hold(&newcomer, room.node, &room.ending);
                still.push((number, describe_awaited(cluster, &room)));
            }
        }
    }
    for (number, reason) in still {
        let turn = match place(cluster, &waiting[number].request) {
            Ok(placement) => Turn::Start(placement),
            Err(_) => Turn::Awaits { reason },
        };
        turns.push((number, turn));
    }
    turns
}

/// What has been decided in a round about who is stopped.
#[derive(Debug, Default)]
struct RoomMaking {
    tried: usize,
    made: usize,
    victims: Option<Victims>,
}

impl RoomMaking {
    /// Who is stopped for a VM that fits nowhere; the room is kept for it.
    fn make<'a>(&mut self, cluster: &mut Cluster<'a>, vm: &'a Waiting) -> Option<Preemption> {
        if !cluster.policy.preempt || self.tried == PREEMPTION_TRIES || self.made == PREEMPTIONS {
            return None;
        }
        let request = &vm.request;
        let asked = asked(cluster, request).ok()?;
        let mut newcomer = Newcomer::launch(cluster, request);
        let victims = self.victims.get_or_insert_with(|| Victims::new(cluster));
        if victims.is_empty() || best_node(cluster, &newcomer, asked).is_some() {
            return None;
        }
        self.tried += 1;
        let choice = victims.choose(cluster, &mut newcomer, request.priority, asked)?;
        self.made += 1;
        victims.take(&choice);
        let preemption = choice.describe(cluster, &newcomer, &vm.name, request.priority);
        cluster.hold(&newcomer, choice.node, &choice.victims);
        Some(preemption)
    }
}

fn order(snapshot: &ClusterSnapshot, policy: &Policy, waiting: &[Waiting]) -> Vec<usize> {
    let mut of_user: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (number, vm) in waiting.iter().enumerate() {
        of_user.entry(user(&vm.request.labels)).or_default().push(number);
    }
    let mut running: HashMap<&str, u32> = HashMap::new();
    for vm in &snapshot.vms {
        *running.entry(user(&vm.labels)).or_default() += 1;
    }
    let mut turns: Vec<(f64, usize)> = Vec::with_capacity(waiting.len());
    for (user, mut vms) in of_user {
        vms.sort_by_key(|&number| (std::cmp::Reverse(waiting[number].request.priority), number));
        let weight = f64::from(weight(policy, user));
        let have = running.get(user).copied().unwrap_or(0);
        let shares = (u64::from(have) + 1..).map(|count| count as f64 / weight);
        turns.extend(shares.zip(vms));
    }
    turns.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    turns.into_iter().map(|(_, number)| number).collect()
}

/// Who has no label has the empty name.
fn user(labels: &Labels) -> &str {
    labels.get(USER).unwrap_or("")
}

fn weight(policy: &Policy, user: &str) -> u32 {
    let weight = policy.shares.get(user).and_then(|weight| weight.parse().ok());
    weight.unwrap_or(1).clamp(1, 1_000_000)
}
