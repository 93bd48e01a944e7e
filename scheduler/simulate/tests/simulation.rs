//! Whole simulations: the same input gives the same result, a small one gives the table that was looked at, and every
//! scenario of the folder can be read and does what it is for.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use shoal_simulate::trace::{TraceForm, parse_trace};
use shoal_simulate::{Comparison, PolicyKind, Scenario, compare, load, plot, recording, run, text};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn scenario(name: &str) -> Scenario {
    load(&folder("scenarios").join(format!("{name}.txt"))).expect("a good scenario")
}

fn parse(text: &str) -> Result<Scenario, text::SimulationError> {
    text::parse(text, "test", &|_| Ok(b"vm0,1,2,3\nvm1,100,0,50\n".to_vec()))
}

#[test]
fn the_same_seed_gives_the_same_result_on_any_number_of_threads() {
    let mut scenario = scenario("herd");
    (scenario.runs, scenario.duration) = (2, 900.0);
    let first = compare(&scenario, 1);
    assert_eq!(first, compare(&scenario, 3));
    assert_eq!(first.table(), compare(&scenario, 2).table());
    scenario.seed += 1;
    assert_ne!(first, compare(&scenario, 2));
}

/// `SHOAL_WRITE_TABLES=1` writes the table anew; then read the difference.
#[test]
fn a_small_simulation_gives_its_table() {
    let comparison = compare(&load(&folder("tests/golden/small.txt")).expect("good"), 2);
    let path = folder("tests/golden/small.table");
    if std::env::var_os("SHOAL_WRITE_TABLES").is_some() {
        fs::write(&path, comparison.table()).expect("to write");
    }
    assert_eq!(comparison.table(), fs::read_to_string(&path).expect("the table"));
}

#[test]
fn every_scenario_is_read_and_runs() {
    let mut count = 0;
    for entry in fs::read_dir(folder("scenarios")).expect("the folder") {
        let path = entry.expect("an entry").path();
        let mut scenario = load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        scenario.runs = 1;
        scenario.duration = scenario
            .duration
            .min(if scenario.interval > 60.0 { 3600.0 } else { 200.0 });
        let comparison = compare(&scenario, 2);
        assert_eq!(comparison.outcomes.len(), scenario.policies.len());
        for outcome in &comparison.outcomes {
            assert!(
                outcome.slowdown_mean >= 1.0 && outcome.slowdown_mean.is_finite(),
                "{outcome:?}"
            );
            // Nobody is lost: what has arrived has ended or is there.
            assert!(outcome.ended + outcome.left <= comparison.vms as f64);
        }
        count += 1;
    }
    assert!(count >= 10, "{count} scenarios");
}

fn goals(comparison: &Comparison) {
    for verdict in &comparison.verdicts {
        assert!(
            verdict.met,
            "{}: {}: {}",
            comparison.scenario, verdict.goal, verdict.figures
        );
    }
    assert!(!comparison.verdicts.is_empty());
}

#[test]
fn a_hot_node_is_relieved_best() {
    let mut scenario = scenario("hot-node");
    scenario.runs = 2;
    let comparison = compare(&scenario, 2);
    assert_eq!(comparison.verdicts.len(), 5);
    goals(&comparison);
}

#[test]
fn leaks_kill_no_vm() {
    let mut scenario = scenario("leak");
    scenario.runs = 10;
    (scenario.judged, scenario.policies) = (
        0,
        vec![PolicyKind::None, PolicyKind::OpenMosix, PolicyKind::Shoal],
    );
    let mut comparison = compare(&scenario, 2);
    // Other tenants' memory comes and goes in a moment, and with it VMs that are ushered.
    comparison
        .verdicts
        .retain(|verdict| verdict.goal != "no moves of equals");
    goals(&comparison);
    assert!(comparison.outcomes[0].oom > 0.0, "or the scenario is too easy");
}

#[test]
fn packing_keeps_its_promise_on_a_part_of_the_trace() {
    let mut scenario = scenario("pack-20110303");
    scenario.duration = 4.0 * 3600.0;
    let comparison = compare(&scenario, 2);
    goals(&comparison);
    let named = |name: &str| {
        comparison
            .outcomes
            .iter()
            .find(|outcome| outcome.policy == name)
            .expect("there")
    };
    let (ours, theirs, none) = (named("shoal"), named("lr-mmt"), named("none"));
    // It begins more slowly, since it waits for samples; over the day the energy is the same.
    assert!(
        ours.energy < none.energy / 4.0 && ours.energy < theirs.energy * 1.05,
        "{ours:?}"
    );
    assert!(ours.migrations < theirs.migrations / 2.0);
}

#[test]
fn a_cluster_kept_for_replay_can_be_simulated() {
    let text = "shoal-simulation 1\nsimulation duration=60s\npolicy max_migrations=4\n\
                node node1 cpus=2 memory=1GiB available=384MiB\nnode node2 cpus=2 memory=1GiB\n\
                vm a node=node1 cpus=1 memory=512MiB resident=320MiB cpu=0.6 growth=4MiB\n\
                vm b node=node1 cpus=1 memory=512MiB resident=320MiB cpu=0.6 growth=4MiB";
    let scenario = parse(text).expect("good");
    let outcome = run(&scenario, PolicyKind::Shoal, 1);
    assert_eq!(
        (outcome.migrations, outcome.oom, outcome.left),
        (1.0, 0.0, 2.0),
        "{outcome:?}"
    );
}

/// Real clusters that were recorded, beside what the planner would do there. `SHOAL_WRITE_TABLES=1` writes that anew.
#[test]
fn recorded_noise_moves_what_it_should_and_no_more() {
    let Ok(entries) = fs::read_dir(folder("recordings")) else {
        return;
    };
    for entry in entries {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "gz") {
            continue;
        }
        let name = path.display();
        let data = fs::read(&path).expect("a recording");
        let moments = recording::read(&data).unwrap_or_else(|error| panic!("{name}: {error}"));
        let summary = format!("{}\n", recording::replay(&moments, None).summary());
        let expected = path.with_extension("expected");
        if std::env::var_os("SHOAL_WRITE_TABLES").is_some() {
            fs::write(&expected, &summary).expect("to write");
        }
        assert_eq!(
            summary,
            fs::read_to_string(&expected).expect("what is expected"),
            "{name}"
        );
    }
}

#[test]
fn those_of_low_priority_give_way_and_begin_anew() {
    let text = "shoal-simulation 1\nsimulation duration=600s judged=0\nnoise off\npolicies none shoal\npolicy overcommit=1\n\
                nodes n count=2 cpus=4 memory=4GiB\n\
                workload heavy-tail vms=24 memory=1GiB work=60s alpha=3 window=10s priority=2 preemptible=yes\n\
                workload heavy-tail vms=4 memory=1GiB work=60s alpha=3 window=100s priority=8";
    let comparison = compare(&parse(text).expect("good"), 2);
    let [none, shoal] = comparison.outcomes.as_slice() else {
        panic!("two policies")
    };
    assert_eq!(
        (none.preempted, none.ended, shoal.ended),
        (0.0, 28.0, 28.0),
        "{shoal:?}"
    );
    assert!((1.0..=8.0).contains(&shoal.preempted), "{shoal:?}");
}

#[test]
fn a_node_that_fills_up_where_nothing_fits_suspends_and_kills_nothing() {
    let text = "shoal-simulation 1\nsimulation duration=300s judged=0\nnoise off\npolicies none shoal\npolicy overcommit=3\n\
                nodes n count=1 cpus=4 memory=4GiB\nmemory swap=0\n\
                workload leak vms=4 memory=2GiB resident=0.3 leak=10MiB part=1";
    let comparison = compare(&parse(text).expect("good"), 2);
    let [none, shoal] = comparison.outcomes.as_slice() else {
        panic!("two policies")
    };
    assert!(none.oom > 0.0 && none.suspended == 0.0, "{none:?}");
    assert!(shoal.oom == 0.0 && shoal.suspended > 0.0, "{shoal:?}");
}

#[test]
fn moves_are_judged_by_what_would_be_without_them() {
    // All start on one node of two: about half of them must leave, and what leaves is worth it.
    let text = "shoal-simulation 1\nsimulation duration=1200s judged=100\nnoise off\npolicies none shoal random\n\
                nodes n count=2 cpus=4 memory=64GiB\n\
                workload steady vms=8 memory=1GiB idle=0.8 busy=0.9 node=n0001";
    let comparison = compare(&parse(text).expect("good"), 2);
    let [none, shoal, _] = comparison.outcomes.as_slice() else {
        panic!("three policies")
    };
    assert_eq!((none.judged, none.needless_part()), (0.0, None));
    assert_eq!(
        (shoal.judged, shoal.needless, shoal.equals),
        (shoal.begun, 0.0, 0.0),
        "{shoal:?}"
    );
    // Without one of the moves, one VM too many shares four CPUs for ten minutes.
    let each = shoal.realised / shoal.judged;
    assert!((50.0..600.0).contains(&each), "{shoal:?}");
}

#[test]
fn pictures_are_whole() {
    let mut scenario = scenario("leak");
    (scenario.runs, scenario.duration) = (1, 120.0);
    let comparison = compare(&scenario, 2);
    for svg in [
        plot::scenario(&comparison),
        plot::summary(std::slice::from_ref(&comparison)),
        plot::summary(&[]),
    ] {
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}

#[test]
fn errors_name_the_line_and_the_field() {
    for (text, problem) in [
        ("", "line 0: the first line must be 'shoal-simulation 1'"),
        (
            "shoal-cluster 1",
            "line 1: 'shoal-cluster 1' is not the first line 'shoal-simulation 1'",
        ),
        ("shoal-simulation 1", "line 0: there is no node"),
        (
            "shoal-simulation 1\nnodes n cpus=1 memory=1GiB",
            "line 0: there is no workload, trace or vm",
        ),
        (
            "shoal-simulation 1\nnodes n cpus=1",
            "line 2: nodes n: cpus and memory (1MiB at least) are needed",
        ),
        (
            "shoal-simulation 1\nnodes n count=1000000",
            "line 2: nodes: count: '1000000' is not a whole number of 1 to 10000",
        ),
        (
            "shoal-simulation 1\nnodes n power=g6",
            "line 2: nodes: power: 'g6' is not g4 or g5",
        ),
        (
            "shoal-simulation 1\n\nsimulation duration=1year",
            "line 3: simulation: duration: '1year' is not a duration like 90s or 500ms, of 1 s to 2678400 s",
        ),
        (
            "shoal-simulation 1\nsimulation runs=0",
            "line 2: simulation: runs: '0' is not a whole number of 1 to 100",
        ),
        (
            "shoal-simulation 1\nsimulation mode=fast",
            "line 2: simulation: mode: 'fast' is not spread or pack",
        ),
        (
            "shoal-simulation 1\nsimulation name=../x",
            "line 2: simulation: name: '../x' is not 1 to 64 letters, digits, - _ .",
        ),
        (
            "shoal-simulation 1\nsimulation colour=red",
            "line 2: simulation: colour: is no field of it",
        ),
        (
            "shoal-simulation 1\nsimulation seed=1 seed=2",
            "line 2: simulation: seed: is there twice",
        ),
        (
            "shoal-simulation 1\npolicies shoal shoal",
            "line 2: policies: shoal is there twice",
        ),
        (
            "shoal-simulation 1\nworkload magic vms=1",
            "line 2: workload: 'magic' is none of heavy-tail, diurnal, leak, herd, steady",
        ),
        (
            "shoal-simulation 1\nworkload leak part=2",
            "line 2: workload: part: '2' is not a number of 0 to 1",
        ),
        (
            "shoal-simulation 1\nsimulation duration=86400s\nworkload diurnal vms=100000 period=1s",
            "line 3: workload: period or bursts: too short for so many VMs and so long a simulation",
        ),
        (
            "shoal-simulation 1\nworkload leak preemptible=maybe",
            "line 2: workload: preemptible: 'maybe' is not yes or no",
        ),
        (
            "shoal-simulation 1\nnoise queue=long",
            "line 2: noise: queue: 'long' is not instant or mean",
        ),
        (
            "shoal-simulation 1\nnoise off boot=2h",
            "line 2: noise: boot: '2h' is not a duration like 90s or 500ms, of 0 s to 3600 s",
        ),
        (
            "shoal-simulation 1\ntrace x form=excel",
            "line 2: trace: form: 'excel' is not shoal or planetlab",
        ),
        (
            "shoal-simulation 1\ntrace x",
            "line 2: trace x: line 1: 'vm0,1,2,3' is not the first line 'shoal-trace 1 interval=…'",
        ),
        (
            "shoal-simulation 1\nmigration link=10",
            "line 2: migration: link: must be at least 1000 bytes per second",
        ),
        (
            "shoal-simulation 1\nvm a node=b cpus=1 memory=1GiB",
            "line 0: vm a: node: b is not in the text",
        ),
        (
            "shoal-simulation 1\nnodes n cpus=1 memory=1GiB\nworkload leak node=m",
            "line 0: workload: node: 'm' is not in the text",
        ),
        (
            "shoal-simulation 1\nnodes n cpus=1 memory=1GiB\ntrace a form=planetlab\ntrace b form=planetlab",
            "line 0: VM 'vm0' is there twice",
        ),
        (
            "shoal-simulation 1\npolicy overcommit=0.5",
            "line 0: policy overcommit: must be 1 to 100",
        ),
        (
            "shoal-simulation 1\nfrobnicate",
            "line 2: 'frobnicate' is none of simulation, policies, policy, nodes, node, workload, trace, vm, migration, memory, noise",
        ),
    ] {
        assert_eq!(parse(text).expect_err(text).to_string(), problem);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn hostile_text_is_an_error_and_never_a_panic(
        lines in prop::collection::vec(
            "(simulation|nodes n|node n|workload (leak|herd|diurnal|heavy-tail)|trace t|vm v|migration|memory|noise( off)?|policies|policy) \
             ((vms|cpus|memory|count|period|window|alpha|work|leak|dirty|link|duration|interval|node|form|delay|boot|tenants|judged|x)=\
             (0|1|7|-1|1e9|NaN|1GiB|16777216TiB|3s|0s|n|planetlab|é|999999999999999999999)? ?){0,5}",
            0..8,
        )
    ) {
        let text = format!("shoal-simulation 1\n{}", lines.join("\n"));
        if let Ok(mut scenario) = parse(&text)
            && scenario.nodes.len() < 20
            && shoal_simulate::engine::vm_specs(&scenario, 1).len() < 300
        {
            // What is accepted can be run.
            scenario.duration = scenario.duration.min(20.0);
            scenario.runs = 1;
            let comparison = compare(&scenario, 1);
            prop_assert!(!comparison.table().contains("NaN"));
        }
    }

    #[test]
    fn hostile_traces_are_errors_and_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "[a-z0-9,.:\nGiBsé-]{0,200}") {
        for form in [TraceForm::PlanetLab, TraceForm::Shoal] {
            let _ = parse_trace(&bytes, form);
            let _ = parse_trace(text.as_bytes(), form);
            let own = format!("shoal-trace 1 interval=1s\n{text}");
            let _ = parse_trace(own.as_bytes(), TraceForm::Shoal);
        }
    }
}
