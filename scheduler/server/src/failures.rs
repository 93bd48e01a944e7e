//! What has failed at nodes lately: starts there, and moves there from one other node. A lasting fault of one destination (a
//! full disk, a firewall, an expired certificate) is not tried again and again while another has room: the planner goes past
//! it, for longer each time, until something succeeds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shoal_plan::Failing;
use shoal_proto::NodeName;

use crate::limits;

/// After the first failure; twice as long after each more.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(10 * 60);
/// What failed so long ago is forgotten.
const KEPT: Duration = Duration::from_secs(60 * 60);

#[derive(Debug)]
struct Streak {
    count: u32,
    last: Instant,
    why: String,
}

impl Streak {
    /// Until it is tried again.
    fn left(&self) -> Option<Duration> {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.count.saturating_sub(1).min(16));
        let left = pause.min(LONGEST_PAUSE).checked_sub(self.last.elapsed())?;
        (!left.is_zero()).then_some(left)
    }
}

/// By where from; a start comes from nowhere.
type Ways = HashMap<Option<NodeName>, Streak>;

/// All of it, by where to. A scheduler that begins anew has seen nothing fail.
#[derive(Debug, Default)]
pub struct Failures(Mutex<HashMap<NodeName, Ways>>);

impl Failures {
    /// Something failed on the way to a node, which is its fault, or that of the way.
    pub fn note(&self, to: &NodeName, from: Option<&NodeName>, why: &str) {
        let mut all = self.lock();
        all.retain(|_, ways| {
            ways.retain(|_, streak| streak.last.elapsed() < KEPT);
            !ways.is_empty()
        });
        let ways = all.entry(to.clone()).or_default();
        let count = ways.get(&from.cloned()).map_or(0, |streak| streak.count);
        let streak = Streak {
            count: count.saturating_add(1),
            last: Instant::now(),
            why: limits::shorten(why),
        };
        ways.insert(from.cloned(), streak);
    }

    /// Something succeeded.
    pub fn clear(&self, to: &NodeName, from: Option<&NodeName>) {
        if let Some(ways) = self.lock().get_mut(to) {
            ways.remove(&None);
            ways.remove(&from.cloned());
        }
    }

    /// A node was removed.
    pub fn forget(&self, node: &NodeName) {
        let mut all = self.lock();
        all.remove(node);
        for ways in all.values_mut() {
            ways.remove(&Some(node.clone()));
        }
    }

    /// What is not tried at a node now, in words, for the planner and for people.
    pub fn of(&self, to: &NodeName) -> Failing {
        let all = self.lock();
        let words = |(from, streak): (&Option<NodeName>, &Streak)| {
            let left = streak.left()?.as_secs() + 1;
            let (count, why) = (streak.count, &streak.why);
            let way = match from {
                None => String::new(),
                Some(from) => format!(" from {from}"),
            };
            let act = if from.is_some() { "move" } else { "start" };
            let last = match count {
                1 => format!("last {act}"),
                _ => format!("last {count} {act}s"),
            };
            let words = format!("the {last} there{way} failed; tried again in {left} s: {why}");
            let from = from.as_ref().map(|from| shoal_plan::NodeName::new(from.as_str()));
            Some((from, Arc::from(words)))
        };
        let mut failing: Vec<_> = all.get(to).into_iter().flatten().filter_map(words).collect();
        failing.sort();
        failing.into()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeName, Ways>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeName {
        text.parse().expect("a name")
    }

    fn left(failures: &Failures, to: &NodeName, from: Option<&NodeName>) -> Duration {
        let all = failures.lock();
        all[to][&from.cloned()].left().expect("not now")
    }

    #[test]
    fn pauses_grow_until_something_succeeds() {
        let failures = Failures::default();
        let (to, from) = (name("node2"), name("node1"));
        assert!(failures.of(&to).is_empty());
        let mut before = Duration::ZERO;
        for _ in 0..4 {
            failures.note(&to, Some(&from), "no route");
            let left = left(&failures, &to, Some(&from));
            assert!(left > before && left <= LONGEST_PAUSE, "{left:?}");
            before = left;
        }
        failures.note(&to, None, "disk full");
        let said = failures.of(&to);
        assert_eq!(said.len(), 2);
        assert!(said[0].1.starts_with("the last start there failed"), "{said:?}");
        assert!(
            said[1].1.starts_with("the last 4 moves there from node1 failed"),
            "{said:?}"
        );
        assert!(failures.of(&from).is_empty());
        failures.clear(&to, Some(&from));
        assert!(failures.of(&to).is_empty());
        for _ in 0..40 {
            failures.note(&to, None, "disk full");
        }
        assert!(left(&failures, &to, None) <= LONGEST_PAUSE);
    }
}
