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
    /// The guest runs, or is paused as it was before, and no migration is under way.
    Running {
        /// This migration certainly sends no Commit any more: it has ended here, or its start was refused.
        over: bool,
    },
    /// This migration is under way.
    Migrating,
    /// Commit was sent and not answered.
    InDoubt,
    /// The destination told the source that it runs, and still fetches memory from it.
    PostCopy,
    /// The destination told the source that it runs, and has all of its memory.
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
    /// It is there and has not run, or does not answer: asked to abort, it says whether it has, or is ended first.
    Waiting,
    /// It runs there, or is paused as it was at the source: Commit came. Nothing is missing, as far as it says.
    Ran,
    /// It runs there, and memory that only the source has is missing.
    Fetching {
        /// It has no connection to the source.
        lost: bool,
    },
    /// It has run there, and has ended or died since.
    Ended,
}

/// What else a step depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The two have not been saying the same for long: what is on its way may still arrive.
    pub patient: bool,
    /// The destination is on record as the owner.
    pub owned: bool,
    /// It was certainly never started, or is to be cancelled: nothing that the source might still send is waited for.
    pub unwanted: bool,
}

/// What follows once the destination has confirmed that it never runs the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The source runs it, or has it paused if it was.
    Stays,
    /// The source is in doubt and may resume, to be what it was.
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
    /// Record that the destination owns the VM, and follow the source, which has memory that is still needed.
    Follow,
    /// The memory that is missing is gone for good: the VM is lost at the destination.
    Lose,
    /// Have the destination abort. It may answer that Commit came first; then complete. Else destroy it there.
    Abandon(Then),
    /// Close as failed without the destination's word, which cannot change anything.
    Close(Then),
    /// Ask again later.
    Wait(Waiting),
}

/// Decides.
pub fn decide(source: Source, destination: Destination, known: Known) -> Step {
    use Destination as D;
    use Source as S;
    let Known {
        patient,
        owned,
        unwanted,
    } = known;
    match (source, destination) {
        (_, D::Ended) | (S::Migrated, _) => Step::Complete,

        // The source's connection may still hold what it sent before it ended.
        (S::Gone, D::Fetching { lost }) if lost || !patient => Step::Lose,
        (S::Gone, D::Fetching { .. }) => Step::Wait(Waiting::ForAnswer),
        (S::Running { .. } | S::Exited, D::Fetching { .. }) => Step::Complete,
        (_, D::Fetching { .. }) => Step::Follow,

        // The source says when nothing is missing any more; only if that word was lost, the destination's holds.
        (S::PostCopy, D::Ran) if patient => Step::Follow,
        // It will soon have heard that, and then says whether it is still needed.
        (S::Migrating, D::Ran) if patient => Step::Watch,
        (_, D::Ran) | (S::PostCopy, D::Gone) => Step::Complete,
        (S::PostCopy, D::Silent | D::Waiting) => Step::Follow,
        (S::Migrating, _) => Step::Watch,

        (_, D::Gone) if owned => Step::Complete,
        (_, D::Silent | D::Waiting) if owned => Step::Wait(Waiting::ForAnswer),

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
        (S::Silent, D::Waiting) if unwanted => Step::Abandon(Then::Unknown),
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
        (vm::VmState::Running | vm::VmState::Paused, true) => Source::Running { over },
        (vm::VmState::Migrating, true) => Source::Migrating,
        (vm::VmState::PostCopy, true) => Source::PostCopy,
        (vm::VmState::InDoubt, true) => Source::InDoubt,
        (vm::VmState::Unspecified | vm::VmState::Empty | vm::VmState::Incoming, true) => Source::Silent,
    }
}

/// What an answer about the destination says. The mark that it ran may be newer than the state beside it: then it is
/// asked again, as one that waits.
pub fn destination_view(facts: Option<&node::VmFacts>) -> Destination {
    let Some(facts) = facts else {
        return Destination::Gone;
    };
    let status = facts.status.clone().unwrap_or_default();
    let state = status.state();
    let ran = facts.ran_here;
    match state {
        _ if !facts.vmm_alive && ran => Destination::Ended,
        _ if !facts.vmm_alive => Destination::Gone,
        vm::VmState::Failed if !ran => Destination::Gone,
        vm::VmState::Failed | vm::VmState::Exited => Destination::Ended,
        vm::VmState::Unspecified | vm::VmState::Empty | vm::VmState::Incoming => Destination::Waiting,
        _ if status.missing_bytes > 0 || status.link_lost => Destination::Fetching {
            lost: status.link_lost,
        },
        _ => Destination::Ran,
    }
}

#[cfg(test)]
mod tests;
