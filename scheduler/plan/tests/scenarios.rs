//! Clusters as text and the plans they must give: `tests/scenarios/NAME.txt` and `NAME.plan`.
//! `SHOAL_WRITE_PLANS=1 cargo test -p shoal-plan --test scenarios` writes the plans anew; then read the difference.

use std::fs;
use std::path::Path;

use shoal_plan::{place_launches, round, text};

#[test]
fn every_scenario_gives_its_plan() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let entries = fs::read_dir(&folder).expect("the folder of scenarios");
    let mut scenarios: Vec<_> = entries
        .map(|entry| entry.expect("a folder entry").path())
        .collect();
    scenarios.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    scenarios.sort();
    assert!(!scenarios.is_empty());
    for path in scenarios {
        let name = path.display();
        let written = fs::read_to_string(&path).expect("a scenario");
        let scenario = text::parse(&written).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut plan = text::print_plan(&round(&scenario.snapshot, &scenario.policy));
        let requests: Vec<_> = scenario
            .launches
            .iter()
            .map(|(_, request)| request.clone())
            .collect();
        let placements = place_launches(&scenario.snapshot, &scenario.policy, &requests);
        plan.push_str(&text::print_placements(&scenario.launches, &placements));
        plan.push_str(&text::print_preemptions(
            &scenario.snapshot,
            &scenario.policy,
            &scenario.launches,
        ));
        let plan_path = path.with_extension("plan");
        if std::env::var_os("SHOAL_WRITE_PLANS").is_some() {
            fs::write(&plan_path, &plan).expect("to write the plan");
        }
        let expected = fs::read_to_string(&plan_path).expect("the scenario's plan");
        assert_eq!(plan, expected, "{name}");
    }
}
