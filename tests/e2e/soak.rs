//! A short soak; `cargo xtask soak` is the long one.

use shoal_tests::machine::Machine;
use shoal_tests::soak::{self, Options, SEED, SHORT};

#[test]
fn a_guest_is_unharmed_by_many_moves_and_nothing_is_left_behind() {
    let Some(machine) = Machine::alone_with_kvm("many moves in a row") else {
        return;
    };
    let options = Options {
        migrations: SHORT,
        seed: SEED,
    };
    let summary = soak::run(machine, options);
    assert!(summary.counted("result completed") > SHORT / 2, "{summary}");
    for what in [
        "had TLS",
        "had post-copy",
        "had memory compared",
        "through a cluster",
    ] {
        assert!(summary.counted(what) > 0, "{what}: {summary}");
    }
}
