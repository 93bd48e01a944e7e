use super::*;

const SOURCES: [Source; 9] = [
    Source::Silent,
    Source::Gone,
    Source::Running { over: true },
    Source::Running { over: false },
    Source::Migrating,
    Source::InDoubt,
    Source::PostCopy,
    Source::Migrated,
    Source::Exited,
];
const DESTINATIONS: [Destination; 7] = [
    Destination::Silent,
    Destination::Gone,
    Destination::Waiting,
    Destination::Ran,
    Destination::Fetching { lost: false },
    Destination::Fetching { lost: true },
    Destination::Ended,
];
const FIRST_LOOK: Known = Known {
    patient: true,
    owned: false,
    unwanted: false,
};

fn all_known() -> impl Iterator<Item = Known> {
    let flags = [true, false];
    let pairs = flags
        .into_iter()
        .flat_map(move |patient| flags.into_iter().map(move |owned| (patient, owned)));
    pairs.flat_map(move |(patient, owned)| {
        flags.into_iter().map(move |unwanted| Known {
            patient,
            owned,
            unwanted,
        })
    })
}

fn table() -> impl Iterator<Item = (Source, Destination)> {
    SOURCES
        .iter()
        .flat_map(|s| DESTINATIONS.iter().map(move |d| (*s, *d)))
}

#[test]
fn the_whole_table() {
    use Destination as D;
    use Source as S;
    let in_doubt = |step: Step| matches!(step, Step::Wait(Waiting::InDoubt(_)));
    for (source, destination) in table() {
        let step = decide(source, destination, FIRST_LOOK);
        let expected = match (source, destination) {
            (_, D::Ended) | (S::Migrated, _) => step == Step::Complete,
            (S::PostCopy, D::Ran | D::Silent | D::Waiting) => step == Step::Follow,
            (S::Migrating, D::Ran) => step == Step::Watch,
            (_, D::Ran) | (S::PostCopy, D::Gone) => step == Step::Complete,
            (S::Gone, D::Fetching { lost: true }) => step == Step::Lose,
            (S::Gone, D::Fetching { lost: false }) => step == Step::Wait(Waiting::ForAnswer),
            (S::Running { .. } | S::Exited, D::Fetching { .. }) => step == Step::Complete,
            (_, D::Fetching { .. }) => step == Step::Follow,
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
}

#[test]
fn patience_ends() {
    let late = Known {
        patient: false,
        owned: false,
        unwanted: false,
    };
    let running = Source::Running { over: false };
    assert_eq!(
        decide(running, Destination::Silent, late),
        Step::Close(Then::Stays)
    );
    // The source's connection held nothing more, or the destination never noticed that it is gone.
    let fetching = Destination::Fetching { lost: false };
    assert_eq!(decide(Source::Gone, fetching, late), Step::Lose);
    // The destination has said for long that nothing is missing.
    for source in [Source::PostCopy, Source::Migrating] {
        assert_eq!(decide(source, Destination::Ran, late), Step::Complete);
    }
}

/// The destination's word alone ends one that nobody waits for; before, it ended when the destination gave up by itself.
#[test]
fn one_that_was_never_started_or_is_cancelled_does_not_wait_for_a_silent_source() {
    for known in all_known().filter(|known| known.unwanted && !known.owned) {
        let step = decide(Source::Silent, Destination::Waiting, known);
        assert_eq!(step, Step::Abandon(Then::Unknown));
        let unheard = decide(Source::Silent, Destination::Silent, known);
        assert!(matches!(unheard, Step::Wait(_)), "{unheard:?}");
    }
}

/// The invariant behind the table: as long as the destination may still run, the source is neither resumed nor
/// given up, and a destination that ran is never abandoned.
#[test]
fn nothing_is_resumed_or_lost_without_the_destinations_word() {
    use Destination as D;
    for (source, known) in SOURCES
        .into_iter()
        .flat_map(|source| all_known().map(move |known| (source, known)))
    {
        let silent = decide(source, D::Silent, known);
        assert!(
            !matches!(silent, Step::Close(Then::Resume | Then::Lost | Then::Unknown)),
            "{source:?}"
        );
        for ran in [
            D::Ran,
            D::Ended,
            D::Fetching { lost: true },
            D::Fetching { lost: false },
        ] {
            let step = decide(source, ran, known);
            assert!(
                !matches!(step, Step::Abandon(_) | Step::Close(_)),
                "{source:?} {ran:?}: {step:?}"
            );
        }
    }
}

/// The invariant of post-copy: a source whose memory is still needed is not destroyed, whatever the scheduler knows.
/// Only Complete and Abandon destroy.
#[test]
fn memory_that_is_still_needed_is_never_destroyed() {
    use Source as S;
    let may_hold_it = [S::PostCopy, S::InDoubt, S::Migrating, S::Silent];
    for (source, known) in may_hold_it
        .into_iter()
        .flat_map(|source| all_known().map(move |known| (source, known)))
    {
        for lost in [true, false] {
            let step = decide(source, Destination::Fetching { lost }, known);
            assert_eq!(step, Step::Follow, "{source:?} {known:?}");
        }
        let silent = decide(source, Destination::Silent, known);
        assert!(!matches!(silent, Step::Complete | Step::Abandon(_)), "{source:?}");
    }
}

/// Once the destination is the owner on record, nothing gives the VM back.
#[test]
fn an_owner_on_record_stays_the_owner() {
    for (source, destination) in table() {
        for owned in all_known().filter(|known| known.owned) {
            let step = decide(source, destination, owned);
            assert!(
                !matches!(
                    step,
                    Step::Abandon(_) | Step::Close(_) | Step::Wait(Waiting::InDoubt(_))
                ),
                "{source:?} {destination:?}: {step:?}"
            );
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
    use vm::VmState::{Exited, Failed, Incoming, Migrating, Paused, Running};
    for (state, alive, ran, expected) in [
        (Incoming, false, true, Destination::Ended),
        (Incoming, false, false, Destination::Gone),
        (Incoming, true, false, Destination::Waiting),
        // The mark was set after the state was asked for.
        (Incoming, true, true, Destination::Waiting),
        (Failed, true, false, Destination::Gone),
        (Failed, true, true, Destination::Ended),
        (Exited, true, true, Destination::Ended),
        (Running, true, true, Destination::Ran),
        // It runs, so it ran, whether or not the disk took the mark.
        (Running, true, false, Destination::Ran),
        // It came paused: Commit was accepted there, so it is the one, though no vCPU has run.
        (Paused, true, true, Destination::Ran),
        (Paused, false, true, Destination::Ended),
    ] {
        let view = destination_view(Some(&facts(state, alive, ran)));
        assert_eq!(view, expected, "{state:?} {alive} {ran}");
    }
    assert_eq!(destination_view(None), Destination::Gone);
    assert_eq!(
        source_view(Some(&facts(Migrating, false, true)), id, false),
        Source::Gone
    );
    assert_eq!(
        source_view(Some(&facts(Exited, false, true)), id, false),
        Source::Exited
    );
    assert_eq!(source_view(None, id, false), Source::Gone);
}

#[test]
fn a_destination_says_whether_it_misses_memory() {
    let mut running = facts(vm::VmState::Running, true, true);
    let status = running.status.as_mut().expect("a status");
    status.missing_bytes = 4096;
    assert_eq!(
        destination_view(Some(&running)),
        Destination::Fetching { lost: false }
    );
    let status = running.status.as_mut().expect("a status");
    status.link_lost = true;
    assert_eq!(
        destination_view(Some(&running)),
        Destination::Fetching { lost: true }
    );
    running.vmm_alive = false;
    assert_eq!(destination_view(Some(&running)), Destination::Ended);
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
