//! The owner of a VM that migrates away: the migration's thread has it meanwhile.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;

use shoal_proto::vm::{MigrationPolicy, MigrationProgress, MigrationResult, VmState, VmStatus};
use shoal_proto::{Epoch, MigrationId};

use super::{Command, Control, ControlError, Reply, State, answer, spawn};
use crate::build;
use crate::migration::controls::Controls;
use crate::migration::source::{self, Outgoing, SourceError};
use crate::vm::Vm;

const MIGRATES: &str = "only a VM that runs or is paused migrates";

impl Control {
    pub(super) fn start_migration(&mut self, request: Outgoing) -> Result<(), ControlError> {
        let (State::Running(_) | State::Paused(_)) = self.state else {
            return Err(self.wrong_state(MIGRATES));
        };
        let request = Outgoing {
            paused: self.held,
            ..request
        };
        if self.fetched().is_some() {
            return Err(ControlError::WrongState {
                state: "running while its memory still arrives",
                needs: "it can migrate again once all of its memory is here",
            });
        }
        let kvm = build::open_kvm()?;
        let Some(spec) = self.spec.clone() else {
            return Err(self.wrong_state(MIGRATES));
        };
        let controls = Arc::new(Controls::new(request.policy.clone()));
        // The thread first, then the VM: a host that has no thread to give must not cost the guest its life.
        let (hand_over, taken) = mpsc::channel::<Box<Vm>>();
        let (progress, commands, switch) = (
            self.progress.clone(),
            self.commands.clone(),
            Arc::clone(&controls),
        );
        let request_id = request.migration_id;
        let destination = request.destination.clone();
        spawn("migration", move || {
            let Ok(vm) = taken.recv() else { return };
            let tell = |serving| {
                let _ = commands.send(Command::Serving(serving));
            };
            let migrate = || source::migrate(&vm, &spec, &kvm, &request, &switch, progress, &tell);
            let last = catch_unwind(AssertUnwindSafe(migrate)).unwrap_or_else(|_| {
                let fault = "a fault in the VMM's migration thread; see its log";
                let result = if switch.commit_sent() {
                    MigrationResult::InDoubt
                } else {
                    if !request.paused {
                        vm.resume();
                    }
                    MigrationResult::Failed
                };
                source::broken_off(request.migration_id, result, fault)
            });
            let _ = commands.send(Command::OutgoingEnded(vm, Box::new(last)));
        })?;
        // It has the dirty log to itself.
        self.abandon_sample();
        let before = std::mem::replace(&mut self.state, State::Migrating(controls));
        let (State::Running(vm) | State::Paused(vm)) = before else {
            return Err(self.wrong_state(MIGRATES));
        };
        self.guest_gap.start_again();
        let id = request_id;
        self.status
            .send_modify(|status| status.outgoing_migration_id = id.to_string());
        self.progress.send_replace(Some(MigrationProgress {
            migration_id: id.to_string(),
            ..Default::default()
        }));
        self.publish(VmState::Migrating, format!("to {destination}"));
        // The thread waits for nothing else.
        let _ = hand_over.send(vm);
        Ok(())
    }

    pub(super) fn outgoing_ended(&mut self, vm: Box<Vm>, last: MigrationProgress) {
        let report = last.report.clone().unwrap_or_default();
        let mut to_free = None;
        match report.result() {
            MigrationResult::Completed => {
                self.state = State::Ended;
                match report.reason {
                    why if why == SourceError::ServingStopped.to_string() => {
                        self.publish(VmState::Exited, why);
                    }
                    why if why.is_empty() => self.publish(VmState::Migrated, "runs at its destination"),
                    why => self.publish(VmState::Migrated, why),
                }
                to_free = Some(vm);
            }
            MigrationResult::InDoubt => {
                self.state = State::InDoubt(vm);
                self.publish(VmState::InDoubt, report.reason);
            }
            _ if self.held => {
                self.state = State::Paused(vm);
                self.publish(VmState::Paused, format!("migration ended: {}", report.reason));
            }
            _ => {
                self.state = State::Running(vm);
                self.publish(VmState::Running, format!("migration ended: {}", report.reason));
                self.take_guest_end();
            }
        }
        self.progress.send_replace(Some(last));
        let epoch = self.spec.as_ref().map_or(Epoch(0), |spec| spec.epoch);
        for reply in std::mem::take(&mut self.resumes) {
            self.resume(epoch, reply);
        }
        for reply in std::mem::take(&mut self.stops) {
            self.stop(reply);
        }
        // Last: unmapping gigabytes takes a while, and nobody has to wait for it.
        drop(to_free);
    }

    pub(super) fn outgoing(&self, id: MigrationId) -> Result<&Controls, ControlError> {
        let same = self.status.borrow().outgoing_migration_id == id.to_string();
        match &self.state {
            State::Migrating(controls) if same => Ok(controls),
            _ => Err(ControlError::UnknownMigration(id)),
        }
    }

    pub(super) fn cancel_migration(&self, id: MigrationId) -> Result<(), ControlError> {
        if self.outgoing(id)?.cancel() {
            Ok(())
        } else {
            Err(ControlError::TooLate)
        }
    }

    pub(super) fn set_migration(
        &self,
        id: MigrationId,
        change: &MigrationPolicy,
    ) -> Result<MigrationPolicy, ControlError> {
        Ok(MigrationPolicy::from(&self.outgoing(id)?.change(change)?))
    }

    pub(super) fn resume(&mut self, asked: Epoch, reply: Reply<VmStatus>) {
        if let Err(error) = self.check_epoch(asked) {
            return answer(reply, Err(error));
        }
        if let State::Migrating(controls) = &self.state
            && self.status.borrow().state() == VmState::InDoubt
        {
            // Its thread goes on to look for the destination; it gives the VM back first.
            controls.stop_serving();
            self.resumes.push(reply);
            return;
        }
        let resumed = self.resume_stopped();
        answer(reply, resumed);
    }

    pub(super) fn resume_stopped(&mut self) -> Result<VmStatus, ControlError> {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::InDoubt(vm) if self.held => {
                self.state = State::Paused(vm);
                self.publish(
                    VmState::Paused,
                    "paused, as before: the destination never committed",
                );
                Ok(self.status.borrow().clone())
            }
            State::InDoubt(vm) => {
                vm.resume();
                self.state = State::Running(vm);
                self.publish(VmState::Running, "resumed: the destination never committed");
                Ok(self.status.borrow().clone())
            }
            State::Paused(vm) => {
                self.held = false;
                vm.resume();
                self.state = State::Running(vm);
                self.publish(VmState::Running, "resumed");
                Ok(self.status.borrow().clone())
            }
            other => {
                self.state = other;
                Err(self.wrong_state("only a VM that is paused or in doubt is resumed"))
            }
        }
    }
}
