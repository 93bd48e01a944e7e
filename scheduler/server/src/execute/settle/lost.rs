//! A migration whose source or destination was declared lost.

use shoal_proto::NodeName;

use super::Settlement;
use crate::agent::AgentError;
use crate::execute::decide::{Destination, Source};
use crate::execute::migrate::AttemptError;
use crate::nodes::Liveness;

impl Settlement {
    pub(super) fn is_lost(&self, node: &NodeName) -> bool {
        self.scheduler.nodes.is_lost(node)
    }

    /// Whether it may begin.
    ///
    /// # Errors
    /// One of its nodes was declared lost.
    pub fn check_nodes(&self) -> Result<(), AttemptError> {
        let intent = &self.open.intent;
        let lost = [&intent.from, &intent.to]
            .into_iter()
            .find(|node| self.is_lost(node));
        lost.map_or(Ok(()), |node| Err(AttemptError::Lost(node.clone())))
    }

    /// Whether anything is to be heard from the source.
    ///
    /// # Errors
    /// It was declared lost and does not report, or what it sends to has been given up with the VM.
    pub(super) fn check_watched(&self) -> Result<(), AgentError> {
        let intent = &self.open.intent;
        let node = self.scheduler.nodes.get(&intent.from);
        let is_off = node.is_some_and(|node| node.is_lost() && node.liveness() != Liveness::Live);
        let lost = if is_off {
            &intent.from
        } else if self.owned() && self.is_lost(&intent.to) {
            &intent.to
        } else {
            return Ok(());
        };
        Err(AgentError::NoAnswer {
            node: lost.clone(),
            what: "it was declared lost".to_owned(),
            vmm_is_silent: false,
            unsent: false,
        })
    }

    /// A node that was declared lost has nothing: so its operator has said. What a destination says that is back is not asked for
    /// either, as each epoch that it may have had is fenced. A source that is back is believed.
    pub(super) fn with_operators_word(
        &self,
        source: Source,
        destination: Destination,
    ) -> (Source, Destination) {
        let intent = &self.open.intent;
        let (source_lost, destination_lost) = (self.is_lost(&intent.from), self.is_lost(&intent.to));
        let destination = match source {
            _ if !destination_lost => destination,
            // Only it can say whether the VM is still its own, or was already lost with the destination.
            Source::Silent if !source_lost && !self.owned() => Destination::Silent,
            _ => Destination::Gone,
        };
        let source = match (source, destination) {
            // Whatever was said, it is there: the VM fetches memory from it.
            (Source::Silent, Destination::Fetching { lost: false }) => Source::Silent,
            (Source::Silent, _) if source_lost => Source::Gone,
            (said, _) => said,
        };
        (source, destination)
    }
}
