//! What was decided in a run and has taken effect, so that the run can be repeated without one of its moves; and which moves
//! came to nothing because equals changed places.

use std::collections::VecDeque;

use shoal_plan::ActionKind;

use crate::world::{Vm, alike};

/// Something that changes where VMs are, or whether they run. Nodes and VMs by number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Decision {
    Start { vm: usize, node: usize },
    Move(Chosen),
    Suspend { vm: usize, growth: f64 },
    Resume(usize),
    Preempt(usize),
}

/// A move that a policy chose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Chosen {
    pub vm: usize,
    pub to: usize,
    /// What for, where the policy says.
    pub kind: Option<ActionKind>,
    /// What the policy expects of it: CPU seconds of the fastest node in ten minutes.
    pub predicted: Option<f64>,
}

/// A decision that took effect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Done {
    pub time: f64,
    /// Reports before it.
    pub reports: u64,
    /// Where a VM that moves came from.
    pub from: usize,
    pub what: Decision,
}

/// All of a run.
#[derive(Debug, Clone, Default)]
pub(super) struct Log {
    pub done: Vec<Done>,
    /// Until each report.
    pub harm: Vec<Harm>,
}

/// What moves are to avoid.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Harm {
    /// Work that VMs wanted and did not get: what slowdown is made of. A job that ends sooner has lost less.
    pub lost: f64,
    /// Node-seconds above the memory threshold.
    pub above: f64,
}

/// Moves in opposite directions that begin within so many seconds are looked at together.
const TOGETHER_SECONDS: f64 = 60.0;

/// Moves that have just begun.
#[derive(Debug, Clone, Default)]
pub(super) struct Recent(VecDeque<(f64, usize, usize, usize)>);

impl Recent {
    /// A move begins. True if it and an earlier one leave two nodes with what they held: the same VM comes back, or one that is
    /// just like it. Each counts for one pair.
    pub fn begins(&mut self, now: f64, vm: usize, from: usize, to: usize, vms: &[Vm<'_>]) -> bool {
        while self
            .0
            .front()
            .is_some_and(|&(at, ..)| at < now - TOGETHER_SECONDS)
        {
            self.0.pop_front();
        }
        let opposite = |&(_, other, came, went): &(f64, usize, usize, usize)| {
            (came, went) == (to, from) && (other == vm || alike(&vms[other], &vms[vm]))
        };
        match self.0.iter().position(opposite) {
            Some(at) => {
                self.0.remove(at);
                true
            }
            None => {
                self.0.push_back((now, vm, from, to));
                false
            }
        }
    }
}
