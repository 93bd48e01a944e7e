//! The owner of a VM that is to come in.

use shoal_proto::MigrationId;
use shoal_proto::vm::VmState;

use super::{Arrived, Command, Control, ControlError, IncomingRequest, State, spawn};
use crate::build;
use crate::migration::destination::{self, Arbiter, DestinationError, Door, Fetching, Incoming, Received};
use crate::migration::transport::{Address, Listener};

impl Control {
    pub(super) fn prepare_incoming(&mut self, request: IncomingRequest) -> Result<Address, ControlError> {
        let State::Empty = self.state else {
            return Err(self.wrong_state("one VMM takes one VM, once"));
        };
        let listen_error = |source| ControlError::Listen {
            address: request.listen.clone(),
            source,
        };
        let listener = Listener::bind(&request.listen).map_err(listen_error)?;
        let address = listener.local_address().clone();
        let migration_id = request.prepared.migration_id;
        let spec = request.prepared.spec.clone();
        let arbiter = Arbiter::default();
        let incoming = Incoming {
            prepared: request.prepared,
            commit_timeout: request.commit_timeout,
            accept_timeout: request.accept_timeout,
            ran_mark: self.config.ran_mark.clone(),
            identity: request.identity,
        };
        let door = Door::open(listener, &incoming).map_err(ControlError::Thread)?;
        let (kvm, hooks, commands) = (build::open_kvm()?, self.hooks(), self.commands.clone());
        let for_thread = arbiter.clone();
        spawn("incoming", move || {
            let result = destination::receive(&door, &kvm, &incoming, &for_thread, hooks);
            let (result, fetching) = match result {
                Ok(Received { vm, paused, fetching }) => {
                    let arrived = Arrived {
                        vm,
                        fetching: fetching.as_ref().map(Fetching::post_copy),
                        paused,
                    };
                    (Ok(arrived), fetching)
                }
                Err(error) => (Err(error), None),
            };
            let _ = commands.send(Command::IncomingEnded(Box::new(result)));
            if let Some(fetching) = fetching {
                fetching.run(&door, |event| {
                    let _ = commands.send(Command::Fetching(event));
                });
            }
        })?;
        self.describe(&spec);
        self.status
            .send_modify(|status| status.incoming_migration_id = migration_id.to_string());
        self.state = State::Incoming(migration_id, arbiter);
        self.spec = Some(spec);
        self.publish(VmState::Incoming, format!("waits for migration {migration_id}"));
        Ok(address)
    }

    pub(super) fn abort_incoming(&mut self, id: MigrationId) -> Result<bool, ControlError> {
        if let State::Incoming(own, arbiter) = &self.state
            && *own == id
        {
            let committed = arbiter.abort();
            if !committed {
                self.state = State::Ended;
                self.publish(VmState::Failed, "the incoming migration was ended on request");
            }
            return Ok(committed);
        }
        let status = self.status.borrow();
        if status.incoming_migration_id != id.to_string() {
            return Err(ControlError::UnknownMigration(id));
        }
        // It ended already: failed before Commit, or became a VM that ran, and may have failed since.
        Ok(status.state() != VmState::Failed || self.came_in)
    }

    pub(super) fn incoming_ended(&mut self, result: Result<Arrived, DestinationError>) {
        match result {
            Ok(Arrived { vm, paused: true, .. }) => {
                self.came_in = true;
                self.describe_memory(&vm);
                self.held = true;
                self.state = State::Paused(Box::new(vm));
                self.publish(VmState::Paused, "paused, as it was at its source");
            }
            Ok(Arrived { vm, fetching, .. }) => {
                *self.fetched() = fetching;
                self.came_in = true;
                self.describe_memory(&vm);
                self.state = State::Running(Box::new(vm));
                let arriving = self.fetched().is_some();
                let message = if arriving { "its memory still arrives" } else { "" };
                self.publish(VmState::Running, message);
                self.take_guest_end();
            }
            Err(error) => {
                if let State::Incoming(..) = self.state {
                    self.state = State::Ended;
                    self.publish(VmState::Failed, format!("incoming migration: {error}"));
                }
            }
        }
        for reply in std::mem::take(&mut self.stops) {
            self.stop(reply);
        }
    }
}
