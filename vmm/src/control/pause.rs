//! Pause and resume in place: the VM stays as it is in this process, and its vCPUs do not run.
//!
//! Nothing is done to the guest's clocks. KVM's kvmclock and the TSC go on while no vCPU runs, so that afterwards the guest's
//! monotonic time is ahead by the pause and its real time is right: the same as after a migration. vCPUs tell it of the pause when they run on.
//! So it is when it migrates meanwhile: it stays paused, wherever it is afterwards.

use shoal_proto::Epoch;
use shoal_proto::vm::{VmState, VmStatus};

use super::{Control, ControlError, State};

impl Control {
    /// Stops the vCPUs. Done already: good.
    pub(super) fn pause(&mut self, asked: Epoch) -> Result<VmStatus, ControlError> {
        self.check_epoch(asked)?;
        if let State::Paused(_) = self.state {
            return Ok(self.status.borrow().clone());
        }
        if self.fetched().is_some() {
            return Err(ControlError::WrongState {
                state: "running while its memory still arrives",
                needs: "it can be paused once all of its memory is here",
            });
        }
        self.abandon_sample();
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Running(vm) => {
                vm.pause();
                if vm.guest_end().is_some() {
                    self.state = State::Running(vm);
                    self.take_guest_end();
                    return Err(self.wrong_state("only a running VM is paused"));
                }
                self.held = true;
                self.state = State::Paused(vm);
                self.publish(VmState::Paused, "paused on request");
                Ok(self.status.borrow().clone())
            }
            other => {
                self.state = other;
                Err(self.wrong_state("only a running VM is paused"))
            }
        }
    }

    /// Refuses another epoch than the VM's.
    pub(super) fn check_epoch(&self, asked: Epoch) -> Result<(), ControlError> {
        let has = self.spec.as_ref().map_or(Epoch(0), |spec| spec.epoch);
        if asked == has {
            Ok(())
        } else {
            Err(ControlError::Epoch { asked, has })
        }
    }
}
