//! A migration whose source or destination was declared lost.

use shoal_proto::NodeName;

use super::Settlement;
use crate::execute::decide::{Destination, Source};

impl Settlement {
    pub(super) fn is_lost(&self, node: &NodeName) -> bool {
        self.scheduler.nodes.is_lost(node)
    }

    /// A node that was declared lost, and does not answer, has nothing: so its operator has said. The epoch that it may have
    /// had is fenced.
    pub(super) fn with_operators_word(
        &self,
        source: Source,
        destination: Destination,
    ) -> (Source, Destination) {
        let intent = &self.open.intent;
        let destination = match destination {
            Destination::Silent if self.is_lost(&intent.to) => Destination::Gone,
            said => said,
        };
        let source = match (source, destination) {
            // Whatever was said, it is there: the VM fetches memory from it.
            (Source::Silent, Destination::Fetching { lost: false }) => Source::Silent,
            (Source::Silent, _) if self.is_lost(&intent.from) => Source::Gone,
            (said, _) => said,
        };
        (source, destination)
    }
}
