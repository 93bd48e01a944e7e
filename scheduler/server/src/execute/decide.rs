//! How an open migration is brought to its end: one pure function over what the two nodes say. docs/operations.md and
//! the section "The commit" of docs/migration.md say the same in words.

use shoal_proto::{MigrationId, node, vm};

/// The VM at its source, at the owner's epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The agent does not answer.
    Silent,
    /// The agent answers: there is no such VM, or its VMM is dead.
    Gone,
    /// The guest runs and no migration is under way.
    Running {
        /// This migration certainly sends no Commit any more: it has ended here, or its start was refused.
        over: bool,
    },
    /// This migration is under way.
    Migrating,
    /// Commit was sent and not answered.
    InDoubt,
    /// The destination told the source that it runs.
    Migrated,
    /// The guest ended before Commit.
    Exited,
}

/// The VM at its destination, at the new epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// The agent does not answer.
    Silent,
    /// The agent answers: there is no such VM, or its VMM died before it ran.
    Gone,
    /// It is there and has not run.
    Waiting,
    /// It has run there: Commit came.
    Ran,
}

/// What follows once the destination has confirmed that it never runs the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The source runs it.
    Stays,
    /// The source is in doubt and may resume.
    Resume,
    /// The guest ended at the source.
    Exited,
    /// There is no copy left.
    Lost,
    /// The source is the only candidate, and silent.
    Unknown,
}

/// Why nothing can be done yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// Either node may run the VM, or none; the text is for the user.
    InDoubt(&'static str),
    /// An answer will tell; nobody need worry yet.
    ForAnswer,
}

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The destination owns the VM: record it, destroy the source.
    Complete,
    /// Follow the migration at the source.
    Watch,
    /// Have the destination abort. It may answer that Commit came first; then complete. Else destroy it there.
    Abandon(Then),
    /// Close as failed without the destination's word, which cannot change anything.
    Close(Then),
    /// Ask again later.
    Wait(Waiting),
}

/// Decides. `patient` is false when a start whose answer was lost can no longer be under way.
pub fn decide(source: Source, destination: Destination, patient: bool) -> Step {
    use Destination as D;
    use Source as S;
    match (source, destination) {
        (_, D::Ran) | (S::Migrated, _) => Step::Complete,
        (S::Migrating, _) => Step::Watch,

        (S::Running { .. }, D::Waiting | D::Gone) => Step::Abandon(Then::Stays),
        (S::Running { over: true }, D::Silent) => Step::Close(Then::Stays),
        (S::Running { over: false }, D::Silent) if patient => Step::Wait(Waiting::ForAnswer),
        (S::Running { over: false }, D::Silent) => Step::Close(Then::Stays),

        (S::Exited, D::Waiting | D::Gone) => Step::Abandon(Then::Exited),
        (S::Exited, D::Silent) => Step::Close(Then::Exited),

        (S::InDoubt, D::Waiting | D::Gone) => Step::Abandon(Then::Resume),
        (S::InDoubt, D::Silent) => Step::Wait(Waiting::InDoubt(
            "Commit was sent; the source is paused and the destination's node does not answer",
        )),

        (S::Gone, D::Waiting | D::Gone) => Step::Abandon(Then::Lost),
        (S::Gone, D::Silent) => Step::Wait(Waiting::InDoubt(
            "the source is gone and the destination's node does not answer",
        )),

        (S::Silent, D::Gone) => Step::Abandon(Then::Unknown),
        (S::Silent, D::Waiting) => Step::Wait(Waiting::ForAnswer),
        (S::Silent, D::Silent) => Step::Wait(Waiting::InDoubt("neither node answers")),
    }
}

/// What an answer about the source says. `start_refused`: this migration was never started there.
pub fn source_view(facts: Option<&node::VmFacts>, migration: MigrationId, start_refused: bool) -> Source {
    let Some((facts, status)) = facts.and_then(|facts| Some((facts, facts.status.as_ref()?))) else {
        return Source::Gone;
    };
    let over = start_refused || status.outgoing_migration_id == migration.to_string();
    match (status.state(), facts.vmm_alive) {
        (vm::VmState::Exited, _) => Source::Exited,
        (vm::VmState::Migrated, _) => Source::Migrated,
        (_, false) | (vm::VmState::Failed, _) => Source::Gone,
        (vm::VmState::Running, true) => Source::Running { over },
        (vm::VmState::Migrating, true) => Source::Migrating,
        (vm::VmState::InDoubt, true) => Source::InDoubt,
        (vm::VmState::Unspecified | vm::VmState::Empty | vm::VmState::Incoming, true) => Source::Silent,
    }
}

/// What an answer about the destination says.
pub fn destination_view(facts: Option<&node::VmFacts>) -> Destination {
    match facts {
        None => Destination::Gone,
        Some(facts) if facts.ran_here => Destination::Ran,
        Some(facts) if !facts.vmm_alive => Destination::Gone,
        Some(facts) => match facts
            .status
            .as_ref()
            .map_or(vm::VmState::Empty, vm::VmStatus::state)
        {
            vm::VmState::Failed => Destination::Gone,
            vm::VmState::Unspecified | vm::VmState::Empty | vm::VmState::Incoming => Destination::Waiting,
            _ => Destination::Ran,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: [Source; 8] = [
        Source::Silent,
        Source::Gone,
        Source::Running { over: true },
        Source::Running { over: false },
        Source::Migrating,
        Source::InDoubt,
        Source::Migrated,
        Source::Exited,
    ];
    const DESTINATIONS: [Destination; 4] = [
        Destination::Silent,
        Destination::Gone,
        Destination::Waiting,
        Destination::Ran,
    ];

    #[test]
    fn the_whole_table() {
        use Destination as D;
        use Source as S;
        let in_doubt = |step: Step| matches!(step, Step::Wait(Waiting::InDoubt(_)));
        for (source, destination) in SOURCES
            .iter()
            .flat_map(|s| DESTINATIONS.iter().map(move |d| (*s, *d)))
        {
            let step = decide(source, destination, true);
            let expected = match (source, destination) {
                (_, D::Ran) | (S::Migrated, _) => step == Step::Complete,
                (S::Migrating, _) => step == Step::Watch,
                (S::Running { .. }, D::Gone | D::Waiting) => step == Step::Abandon(Then::Stays),
                (S::Running { over: true }, D::Silent) => step == Step::Close(Then::Stays),
                (S::Running { over: false }, D::Silent) => step == Step::Wait(Waiting::ForAnswer),
                (S::Exited, D::Gone | D::Waiting) => step == Step::Abandon(Then::Exited),
                (S::Exited, D::Silent) => step == Step::Close(Then::Exited),
                (S::InDoubt, D::Gone | D::Waiting) => step == Step::Abandon(Then::Resume),
                (S::Gone, D::Gone | D::Waiting) => step == Step::Abandon(Then::Lost),
                (S::InDoubt | S::Gone | S::Silent, D::Silent) => in_doubt(step),
                (S::Silent, D::Gone) => step == Step::Abandon(Then::Unknown),
                (S::Silent, D::Waiting) => step == Step::Wait(Waiting::ForAnswer),
            };
            assert!(expected, "{source:?} {destination:?}: {step:?}");
        }
        assert_eq!(
            decide(S::Running { over: false }, D::Silent, false),
            Step::Close(Then::Stays)
        );
    }

    /// The invariant behind the table: as long as the destination may still run, the source is neither resumed nor
    /// given up, and a destination that ran is never abandoned.
    #[test]
    fn nothing_is_resumed_or_lost_without_the_destinations_word() {
        for source in SOURCES {
            for patient in [true, false] {
                let silent = decide(source, Destination::Silent, patient);
                assert!(
                    !matches!(silent, Step::Close(Then::Resume | Then::Lost | Then::Unknown)),
                    "{source:?}"
                );
                assert_eq!(decide(source, Destination::Ran, patient), Step::Complete);
            }
        }
    }

    fn facts(state: vm::VmState, vmm_alive: bool, ran_here: bool) -> node::VmFacts {
        let status = vm::VmStatus {
            state: state.into(),
            ..Default::default()
        };
        node::VmFacts {
            status: Some(status),
            vmm_alive,
            ran_here,
            ..Default::default()
        }
    }

    #[test]
    fn dead_vmms_are_judged_by_what_they_did() {
        let id = MigrationId::new();
        assert_eq!(
            destination_view(Some(&facts(vm::VmState::Incoming, false, true))),
            Destination::Ran
        );
        assert_eq!(
            destination_view(Some(&facts(vm::VmState::Incoming, false, false))),
            Destination::Gone
        );
        assert_eq!(
            destination_view(Some(&facts(vm::VmState::Incoming, true, false))),
            Destination::Waiting
        );
        assert_eq!(destination_view(None), Destination::Gone);
        assert_eq!(
            source_view(Some(&facts(vm::VmState::Migrating, false, true)), id, false),
            Source::Gone
        );
        assert_eq!(
            source_view(Some(&facts(vm::VmState::Exited, false, true)), id, false),
            Source::Exited
        );
        assert_eq!(source_view(None, id, false), Source::Gone);
    }

    #[test]
    fn a_running_source_is_done_only_with_its_own_migration() {
        let id = MigrationId::new();
        let mut running = facts(vm::VmState::Running, true, true);
        assert_eq!(
            source_view(Some(&running), id, false),
            Source::Running { over: false }
        );
        assert_eq!(
            source_view(Some(&running), id, true),
            Source::Running { over: true }
        );
        if let Some(status) = &mut running.status {
            status.outgoing_migration_id = id.to_string();
        }
        assert_eq!(
            source_view(Some(&running), id, false),
            Source::Running { over: true }
        );
    }
}
