//! The owner of a VM whose memory is at two hosts: at the destination it runs and fetches, at the source it serves.

use std::sync::{MutexGuard, PoisonError};

use shoal_proto::vm::VmState;

use super::{Control, State, answer};
use crate::migration::postcopy::destination::{Event, PostCopy};
use crate::migration::source::Serving;
use crate::vm::Vm;

impl Control {
    pub(super) fn fetched(&self) -> MutexGuard<'_, Option<PostCopy>> {
        self.fetching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_serving(&self) -> bool {
        self.status.borrow().state() == VmState::PostCopy
    }

    /// Stops the vCPUs of a VM that ends, also those that wait for memory.
    pub(super) fn halt(&self, vm: &Vm, why: &str) {
        let fetching = self.fetched().take();
        vm.pause_after(|| {
            if let Some(fetching) = fetching {
                fetching.stop(why);
            }
        });
        self.status.send_modify(|status| status.link_lost = false);
    }

    /// At the destination.
    pub(super) fn fetching(&mut self, event: Event) {
        let State::Running(_) = self.state else { return };
        let mut publish = |link_lost, message: String| {
            // At once with the message: whoever sees the one sees the other.
            self.status.send_modify(|status| {
                status.link_lost = link_lost;
                status.status_message.clone_from(&message);
            });
            self.publish(VmState::Running, message);
        };
        match event {
            Event::LinkLost(why) => publish(
                true,
                format!("waits for memory that is still at its source, which cannot be reached: {why}"),
            ),
            Event::Recovered => publish(false, String::new()),
            Event::Complete => {
                self.fetched().take();
                self.status.send_modify(|status| status.link_lost = false);
                self.publish(VmState::Running, "");
            }
            Event::Lost(why) => {
                if let State::Running(vm) = std::mem::replace(&mut self.state, State::Ended) {
                    self.halt(&vm, "its memory is lost");
                    self.end(*vm, VmState::Failed, &format!("memory lost: {why}"));
                }
            }
        }
    }

    /// At the source.
    pub(super) fn serving(&mut self, serving: Serving) {
        let State::Migrating(_) = self.state else { return };
        match serving {
            Serving::Connected => {
                self.publish(
                    VmState::PostCopy,
                    "runs at its destination, which fetches memory from here",
                );
                // Asked for before the destination ran it. To stop it here now would only lose it.
                for reply in std::mem::take(&mut self.stops) {
                    answer(reply, Ok(self.status.borrow().clone()));
                }
            }
            Serving::LinkLost(why) if self.is_serving() => self.publish(
                VmState::PostCopy,
                format!("holds memory of the VM, and its destination cannot be reached: {why}"),
            ),
            // Still in doubt.
            Serving::LinkLost(_) => {}
            Serving::PauseGivenUp => self.publish(
                VmState::Migrating,
                "the guest goes on here: its pause did not end in time, as a step of the migration hangs",
            ),
            Serving::InDoubt(progress) => {
                let reason = progress.report.as_ref().map(|report| report.reason.clone());
                self.publish(VmState::InDoubt, reason.unwrap_or_default());
                self.progress.send_replace(Some(*progress));
            }
        }
    }
}
