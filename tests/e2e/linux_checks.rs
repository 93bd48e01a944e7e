//! What a Linux guest must do right, tried from within by the program `checks`, and while the guest is moved.

use shoal_tests::guest::tail;
use shoal_tests::machine::{Machine, say};
use shoal_tests::soak::linux::{IMAGE, Kind, Stress, start_cluster};
use shoal_tests::soak::summary::Summary;

#[test]
fn a_linux_guest_passes_every_check_from_within() {
    let Some(machine) = Machine::with_kvm("the checks in a Linux guest") else {
        return;
    };
    let cluster = start_cluster(machine);
    let output = cluster.shoal.output(&["run", IMAGE, "--", "checks"]);
    let console = String::from_utf8_lossy(&output.stdout);
    let failed: Vec<&str> = console.lines().filter(|line| line.starts_with("FAIL ")).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let skipped: Vec<&str> = console
        .lines()
        .filter(|line| line.starts_with("check ") && line.contains(" skipped: "))
        .collect();
    assert!(skipped.is_empty(), "{skipped:#?}");
    assert!(console.contains(" ok, 0 skipped, 0 failed"), "{}", tail(&console));
    assert_eq!(output.status.code(), Some(0), "{}", tail(&console));
}

/// A fault in the code that takes events: the kernel must not go on, and nobody is to guess why.
#[test]
fn a_ring_3_kernel_that_is_broken_from_within_ends_its_vm_and_says_why() {
    let Some(machine) = Machine::with_kvm("a ring-3 kernel that is broken") else {
        return;
    };
    let cluster = start_cluster(machine);
    let run = ["run", IMAGE, "--name", "broken", "--", "checks", "break-entry"];
    let output = cluster.shoal.output(&run);
    let said = String::from_utf8_lossy(&output.stderr);
    let vm = cluster.shoal.json(&["inspect", "broken"]);
    if vm["kernel"] != "ring3" {
        say("SKIPPED a ring-3 kernel that is broken: this host runs the plain kernel");
        assert_eq!(output.status.code(), Some(3), "{said}");
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(vm["state"], "failed", "{vm}");
    for text in [&*said, &vm.to_string(), &cluster.logs("broken")] {
        assert!(text.contains("a fault within the entry code"), "{text}");
    }
}

#[test]
fn a_linux_guest_under_stress_is_moved_by_every_policy_and_loses_nothing() {
    let Some(machine) = Machine::with_kvm("moves of a Linux guest amid stress") else {
        return;
    };
    let cluster = start_cluster(machine);
    let stress = Stress::start(&cluster, 1);
    let mut summary = Summary::default();
    for kind in Kind::ALL {
        assert!(stress.go(kind, &mut summary), "{kind:?}: {summary}");
    }
    let last = stress.end();
    assert!(last.rounds > 0, "{last:?}");
}
