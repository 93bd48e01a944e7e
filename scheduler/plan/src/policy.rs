//! The constants of every decision, in one place. docs/planning.md explains each.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::labels::Labels;
use crate::model::BytesPerSecond;

/// A policy value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("policy {field}: must be {expected}")]
pub struct PolicyError {
    /// Name of the field.
    pub field: &'static str,
    /// What it should be.
    pub expected: &'static str,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$variant => $word,)* })
            }
        }

        impl FromStr for $name {
            type Err = ();

            fn from_str(text: &str) -> Result<Self, ()> {
                match text { $($word => Ok(Self::$variant),)* _ => Err(()) }
            }
        }
    };
}

words! {
    /// What is done with plans. What someone asks for is done in any case, drains included.
    Automation {
        /// Nothing.
        Manual = "manual",
        /// They are told.
        Advise = "advise",
        /// They are carried out.
        Automatic = "automatic",
    }
}

words! {
    /// What balancing aims for.
    Mode {
        /// Equal use of all nodes.
        Spread = "spread",
        /// As few nodes as possible.
        Pack = "pack",
    }
}

/// What the planner may do and what it aims for.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Declared memory of a node's VMs may be this many times its memory.
    pub overcommit: f64,
    /// Declared vCPUs of a node's VMs may be this many times its CPUs.
    pub cpu_overcommit: f64,
    /// vCPUs of VMs from the queue that a node takes for each of its CPUs; all that is declared or in use there counts.
    pub queue_slots: f64,
    /// Part of a node's memory that must not be passed; ushering starts before it would be.
    pub usher_threshold: f64,
    /// Part of a node's memory that ushering brings it down to, and that rebalancing fills it to.
    pub usher_target: f64,
    /// A node whose memory pressure (PSI some avg10, percent) reaches this sheds VMs and takes none.
    pub pressure_threshold: f64,
    /// How far ahead growth is extended at most.
    pub usher_horizon: Duration,
    /// From a change on a node to the start of a migration: one report and one round.
    pub detect: Duration,
    /// What a migration takes besides sending memory.
    pub migration_overhead: Duration,
    /// What one link carries, measured where possible.
    pub link_rate: BytesPerSecond,
    /// Migrations at once in the cluster.
    pub max_migrations: usize,
    /// Migrations at once out of one node.
    pub max_out_per_node: usize,
    /// Migrations at once into one node.
    pub max_in_per_node: usize,
    /// A VM that moved is not rebalanced again for this long.
    pub cool_down: Duration,
    /// One that has run for less is not moved for balance: it may still boot, and nobody knows yet what it will use.
    pub settle: Duration,
    /// A VM whose move ended is not ushered or drained again for this long.
    pub retry_after: Duration,
    /// The destination of a rebalance is charged this many times what the VM uses.
    pub stability: f64,
    /// The least a rebalance move must lower the score, its own cost taken off.
    pub min_gain: f64,
    /// What a migration costs while it runs, in score.
    pub cost_per_second: f64,
    /// What a VM's pause costs while it lasts, in score.
    pub cost_of_downtime: f64,
    /// The pause that migrations aim for.
    pub max_downtime: Duration,
    /// In this time a move for balance must gain more than it costs, at aggressiveness 3.
    pub payback: Duration,
    /// 1 to 5, as in DRS: 1 moves nothing for balance, 3 asks for `min_gain` and `payback`, 5 for a quarter of the gain.
    pub aggressiveness: u32,
    /// What is done with plans.
    pub automation: Automation,
    /// What balancing aims for.
    pub mode: Mode,
    /// Packing fills a node's CPUs up to this part.
    pub cpu_target: f64,
    /// One that has waited in the queue for so long is not overtaken any more.
    pub queue_patience: Duration,
    /// Weights of users in the queue, by the value of their label `user`; 1 for others.
    pub shares: Labels,
    /// Base of the opportunity cost `base ^ utilisation`.
    pub cost_base: f64,
    /// New VMs start, and VMs move for balance, only where the cluster still fits if any one node dies afterwards.
    pub n_plus_one: bool,
    /// A VM is suspended when its node runs out of memory and nothing fits anywhere or leaves in time, and resumed when there is room.
    pub suspend: bool,
    /// VMs that are marked so are stopped for one of higher priority that fits nowhere.
    pub preempt: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            overcommit: 1.5,
            cpu_overcommit: 4.0,
            queue_slots: 1.0,
            usher_threshold: 0.90,
            usher_target: 0.85,
            pressure_threshold: 20.0,
            usher_horizon: Duration::from_secs(60),
            detect: Duration::from_secs(2),
            migration_overhead: Duration::from_millis(500),
            link_rate: BytesPerSecond(125_000_000),
            max_migrations: 8,
            max_out_per_node: 2,
            max_in_per_node: 2,
            cool_down: Duration::from_secs(60),
            settle: Duration::from_secs(60),
            retry_after: Duration::from_secs(5),
            stability: 1.3,
            min_gain: 2.0,
            cost_per_second: 20.0,
            cost_of_downtime: 100.0,
            max_downtime: Duration::from_millis(50),
            payback: Duration::from_secs(600),
            aggressiveness: 3,
            automation: Automation::Automatic,
            mode: Mode::Spread,
            cpu_target: 0.8,
            queue_patience: Duration::from_secs(300),
            shares: Labels::default(),
            cost_base: 16.0,
            n_plus_one: false,
            suspend: true,
            preempt: true,
        }
    }
}

impl Policy {
    /// Checks every value. The functions that plan expect a policy that passes.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn check(&self) -> Result<(), PolicyError> {
        let hour = Duration::from_secs(3600);
        let checks = [
            ("overcommit", (1.0..=100.0).contains(&self.overcommit), "1 to 100"),
            (
                "cpu_overcommit",
                (0.1..=1000.0).contains(&self.cpu_overcommit),
                "0.1 to 1000",
            ),
            (
                "queue_slots",
                (0.1..=1000.0).contains(&self.queue_slots),
                "0.1 to 1000",
            ),
            (
                "usher_threshold",
                (0.1..=1.0).contains(&self.usher_threshold),
                "0.1 to 1",
            ),
            (
                "usher_target",
                (0.05..=self.usher_threshold).contains(&self.usher_target),
                "0.05 to usher_threshold",
            ),
            (
                "pressure_threshold",
                (0.0..=100.0).contains(&self.pressure_threshold),
                "0 to 100 (percent)",
            ),
            ("usher_horizon", self.usher_horizon <= hour, "at most 1 h"),
            ("detect", self.detect <= hour, "at most 1 h"),
            (
                "migration_overhead",
                self.migration_overhead <= hour,
                "at most 1 h",
            ),
            (
                "link_rate",
                self.link_rate.0 >= 1000,
                "at least 1000 bytes per second",
            ),
            ("cool_down", self.cool_down <= 24 * hour, "at most 24 h"),
            ("settle", self.settle <= 24 * hour, "at most 24 h"),
            ("retry_after", self.retry_after <= 24 * hour, "at most 24 h"),
            ("stability", (1.0..=10.0).contains(&self.stability), "1 to 10"),
            (
                "min_gain",
                self.min_gain.is_finite() && self.min_gain >= 1e-6,
                "at least 0.000001",
            ),
            (
                "cost_per_second",
                (0.0..=1e6).contains(&self.cost_per_second),
                "0 to 1000000",
            ),
            (
                "cost_of_downtime",
                (0.0..=1e6).contains(&self.cost_of_downtime),
                "0 to 1000000",
            ),
            ("max_downtime", self.max_downtime <= hour, "at most 1 h"),
            (
                "payback",
                (Duration::from_secs(1)..=24 * hour).contains(&self.payback),
                "1 s to 24 h",
            ),
            ("cpu_target", (0.05..=1.0).contains(&self.cpu_target), "0.05 to 1"),
            ("queue_patience", self.queue_patience <= 24 * hour, "at most 24 h"),
            (
                "shares",
                self.shares.iter().all(|share| is_weight(share.value())),
                "USER=WEIGHT, weights 1 to 1000000",
            ),
            ("aggressiveness", (1..=5).contains(&self.aggressiveness), "1 to 5"),
            (
                "cost_base",
                (1.1..=1e6).contains(&self.cost_base),
                "1.1 to 1000000",
            ),
        ];
        match checks.into_iter().find(|(_, good, _)| !good) {
            Some((field, _, expected)) => Err(PolicyError { field, expected }),
            None => Ok(()),
        }
    }
}

fn is_weight(text: &str) -> bool {
    text.parse()
        .is_ok_and(|weight: u32| (1..=1_000_000).contains(&weight))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_passes_and_bad_values_are_named() {
        assert_eq!(Policy::default().check(), Ok(()));
        for bad in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
            let error = Policy {
                overcommit: bad,
                ..Policy::default()
            }
            .check()
            .expect_err("out of range");
            assert_eq!(error.to_string(), "policy overcommit: must be 1 to 100");
        }
    }
}
