//! What the parts of an agent share of its connection to the scheduler: the present session, and what has changed.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use shoal_proto::node::AgentReport;
use tokio::sync::{Notify, mpsc, watch};

use crate::key::VmKey;

/// The way into the report stream while there is one.
pub(crate) type Session = Option<mpsc::Sender<AgentReport>>;

/// Shared by the reporter (which owns the stream), the supervisors and the console pumps.
#[derive(Debug, Default)]
pub(crate) struct Uplink {
    session: watch::Sender<Session>,
    changed: Mutex<HashSet<VmKey>>,
    wake: Notify,
}

impl Uplink {
    /// The present session, and a notice when it is replaced.
    pub(crate) fn sessions(&self) -> watch::Receiver<Session> {
        self.session.subscribe()
    }

    pub(crate) fn open(&self, reports: mpsc::Sender<AgentReport>) {
        // The first heartbeat of a session holds every VM.
        self.take_changed();
        self.session.send_replace(Some(reports));
    }

    pub(crate) fn close(&self) {
        self.session.send_replace(None);
    }

    /// Has the VM reported at once. Several changes before it is reported are reported as one.
    pub(crate) fn vm_changed(&self, key: VmKey) {
        self.changed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key);
        self.wake.notify_one();
    }

    /// Waits for changed VMs, and takes them.
    pub(crate) async fn next_changed(&self) -> HashSet<VmKey> {
        loop {
            let changed = self.take_changed();
            if !changed.is_empty() {
                return changed;
            }
            self.wake.notified().await;
        }
    }

    fn take_changed(&self) -> HashSet<VmKey> {
        std::mem::take(&mut *self.changed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_proto::{Epoch, VmId};

    #[tokio::test]
    async fn changes_are_joined_and_taken_once() {
        let uplink = Uplink::default();
        let key = VmKey {
            id: VmId::new(),
            epoch: Epoch(1),
        };
        uplink.vm_changed(key);
        uplink.vm_changed(key);
        assert_eq!(uplink.next_changed().await, HashSet::from([key]));
        assert!(uplink.take_changed().is_empty());
    }
}
