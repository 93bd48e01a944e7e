//! The owner's part of [`crate::sample`]: whoever takes the VM away, a migration first of all, ends the window at once.

use shoal_proto::vm::MemorySample;

use super::{Control, ControlError, State};

impl Control {
    pub(super) fn begin_sample(&mut self) -> Result<(), ControlError> {
        if self.fetched().is_some() {
            return Err(self.wrong_state("its memory still arrives"));
        }
        let State::Running(vm) = &self.state else {
            return Err(self.wrong_state("only a running VM writes memory"));
        };
        Ok(self.sampler.begin(vm)?)
    }

    pub(super) fn end_sample(&mut self) -> Result<Option<MemorySample>, ControlError> {
        let State::Running(vm) = &self.state else {
            return Ok(None);
        };
        Ok(self.sampler.end(vm)?)
    }

    /// Before the VM is given away, or ends.
    pub(super) fn abandon_sample(&mut self) {
        if let State::Running(vm) = &self.state {
            self.sampler.abandon(vm);
        }
    }
}
