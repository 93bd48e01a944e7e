//! One migration as a process in time: setup, pre-copy passes that shrink geometrically while the guest dirties less than the
//! link carries, the last pass with the VM stopped, and the switch. The bandwidth may change at any moment.

use crate::model::MigrationModel;

/// A pass that leaves more than this part of the one before does not shrink.
const SHRINKS: f64 = 0.95;
/// So many passes that do not shrink, and the VM is stopped.
const STALLED_PASSES: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Setup,
    Pass(u32),
    /// The VM is stopped and its last pages are sent.
    Stopped,
    /// Everything is there.
    Switch,
}

#[derive(Debug, Clone)]
pub(crate) struct Migration {
    pub vm: usize,
    pub from: usize,
    pub to: usize,
    pub phase: Phase,
    /// Bytes per second now.
    pub rate: f64,
    /// Bytes of this pass not yet sent; seconds in setup and switch.
    pub left: f64,
    /// Bytes of this pass.
    pass_bytes: f64,
    pass_started: f64,
    stalled: u32,
    pub sent: f64,
    pub started_at: f64,
    pub stopped_at: f64,
    /// Until when `left` is true.
    pub until: f64,
    pub generation: u64,
}

/// What comes after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// The next pass.
    Continue,
    /// The VM is stopped now.
    Stop,
    /// The VM runs on the other node now.
    Done,
}

/// What the guest does meanwhile.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guest {
    pub resident: f64,
    /// Bytes per second.
    pub dirty_rate: f64,
    pub working_set: f64,
    pub growth: f64,
}

impl Migration {
    pub fn new(vm: usize, from: usize, to: usize, now: f64, model: &MigrationModel) -> Self {
        Self {
            vm,
            from,
            to,
            phase: Phase::Setup,
            rate: 0.0,
            left: model.setup,
            pass_bytes: 0.0,
            pass_started: now,
            stalled: 0,
            sent: 0.0,
            started_at: now,
            stopped_at: 0.0,
            until: now,
            generation: 0,
        }
    }

    /// Whether it uses the links.
    pub fn sends(&self) -> bool {
        matches!(self.phase, Phase::Pass(_) | Phase::Stopped)
    }

    /// Bytes that the destination holds of a VM of this size.
    pub fn arrived(&self, resident: f64) -> f64 {
        match self.phase {
            Phase::Setup => 0.0,
            Phase::Pass(1) => (self.pass_bytes - self.left).min(resident),
            _ => resident,
        }
    }

    pub fn advance(&mut self, now: f64) {
        let seconds = (now - self.until).max(0.0);
        self.until = now;
        if self.sends() {
            let bytes = (self.rate * seconds).min(self.left);
            self.left -= bytes;
            self.sent += bytes;
        } else {
            self.left = (self.left - seconds).max(0.0);
        }
    }

    /// When this step will end, at the rate of now.
    pub fn ends(&self) -> f64 {
        if self.sends() {
            self.until + self.left / self.rate.max(1.0)
        } else {
            self.until + self.left
        }
    }

    /// The step has ended.
    pub fn step(&mut self, now: f64, guest: Guest, model: &MigrationModel) -> Next {
        match self.phase {
            Phase::Setup => {
                self.start(Phase::Pass(1), guest.resident, now);
                Next::Continue
            }
            Phase::Pass(pass) => {
                let seconds = now - self.pass_started;
                let dirtied =
                    (guest.dirty_rate * seconds).min(guest.working_set) + guest.growth.max(0.0) * seconds;
                if dirtied > self.pass_bytes * SHRINKS {
                    self.stalled += 1;
                }
                let short = dirtied <= self.rate * model.max_downtime;
                if short || pass >= model.passes || self.stalled >= STALLED_PASSES {
                    self.start(Phase::Stopped, dirtied, now);
                    self.stopped_at = now;
                    Next::Stop
                } else {
                    self.start(Phase::Pass(pass + 1), dirtied, now);
                    Next::Continue
                }
            }
            Phase::Stopped => {
                self.start(Phase::Switch, model.switch, now);
                Next::Continue
            }
            Phase::Switch => Next::Done,
        }
    }

    fn start(&mut self, phase: Phase, left: f64, now: f64) {
        self.phase = phase;
        (self.left, self.pass_bytes) = (left, left);
        (self.pass_started, self.until) = (now, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs one alone on a link; answers seconds, bytes and downtime.
    fn alone(guest: Guest, model: &MigrationModel) -> (f64, f64, f64) {
        let mut migration = Migration::new(0, 0, 1, 0.0, model);
        let mut now = 0.0;
        loop {
            migration.rate = model.link;
            now = migration.ends().max(now);
            migration.advance(now);
            if migration.step(now, guest, model) == Next::Done {
                return (now, migration.sent, now - migration.stopped_at);
            }
        }
    }

    #[test]
    fn passes_shrink_geometrically() {
        let model = MigrationModel {
            link: 100e6,
            max_downtime: 0.05,
            ..MigrationModel::default()
        };
        let guest = Guest {
            resident: 1e9,
            dirty_rate: 20e6,
            working_set: 5e8,
            growth: 0.0,
        };
        // 10 s, 2 s, 0.4 s, 0.08 s sent; 0.016 s would fit the downtime: 1.6 MB.
        let (seconds, bytes, downtime) = alone(guest, &model);
        assert!((bytes - 1.2496e9).abs() < 1e4, "{bytes}");
        assert!((seconds - (0.5 + 12.496 + 0.02)).abs() < 1e-3, "{seconds}");
        assert!((downtime - 0.036).abs() < 1e-3, "{downtime}");
    }

    #[test]
    fn a_guest_that_dirties_faster_than_the_link_is_stopped_in_the_end() {
        let model = MigrationModel::default();
        let guest = Guest {
            resident: 1e9,
            dirty_rate: 500e6,
            working_set: 2.5e8,
            growth: 0.0,
        };
        let (_, bytes, downtime) = alone(guest, &model);
        assert!((downtime - (2.0 + model.switch)).abs() < 1e-6, "{downtime}");
        assert!((bytes - 2e9).abs() < 1.0, "{bytes}");
    }

    #[test]
    fn an_empty_vm_takes_the_setup_and_the_switch() {
        let guest = Guest {
            resident: 0.0,
            dirty_rate: 0.0,
            working_set: 0.0,
            growth: 0.0,
        };
        let (seconds, bytes, _) = alone(guest, &MigrationModel::default());
        assert!((seconds - 0.52).abs() < 1e-9 && bytes == 0.0);
    }
}
