//! VMs that wait for room: in which order, and which start now.
//!
//! Users take turns: the next VM is one of the user who has the fewest running for its weight. A user is the value of the
//! label `user`. Of one user's VMs the one of the highest priority is first, then the one that came first. A later VM may
//! start before an earlier one that does not fit, until that has waited for the policy's patience: then it is next.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::cluster::Cluster;
use crate::labels::Labels;
use crate::model::ClusterSnapshot;
use crate::place::{LaunchRequest, PlaceError, Placement, place};
use crate::policy::Policy;

/// So many are looked at in a round.
const TRIES: usize = 200;

/// The label that names the user.
pub const USER: &str = "user";

/// A VM that waits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Its name, for the reasons people read.
    pub name: String,
    /// What it needs.
    pub request: LaunchRequest,
    /// 0 to 9.
    pub priority: u32,
    /// For how long.
    pub since: Duration,
}

/// What becomes of one that waits.
#[derive(Debug, Clone, PartialEq)]
pub enum Turn {
    /// It can start now.
    Start(Placement),
    /// It fits nowhere.
    Refused(PlaceError),
    /// As many as are looked at in a round are before it.
    Later,
    /// One before it has waited too long.
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
    let mut cluster = Cluster::with_rules(snapshot, policy, rules);
    let mut first: Option<&Waiting> = None;
    let mut turns = Vec::with_capacity(waiting.len());
    for (tried, number) in order(snapshot, policy, waiting).into_iter().enumerate() {
        let vm = &waiting[number];
        let turn = match first {
            _ if tried >= TRIES => Turn::Later,
            Some(first) => Turn::Behind {
                name: first.name.clone(),
            },
            None => match place(&mut cluster, &vm.request) {
                Ok(placement) => Turn::Start(placement),
                Err(error) => {
                    if vm.since >= policy.queue_patience {
                        first = Some(vm);
                    }
                    Turn::Refused(error)
                }
            },
        };
        turns.push((number, turn));
    }
    turns
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
        vms.sort_by_key(|&number| (std::cmp::Reverse(waiting[number].priority), number));
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
