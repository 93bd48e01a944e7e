//! What the planner decides for a cluster in a file: `cargo run -p shoal-plan --example replay -- FILE`.

use std::process::ExitCode;

use shoal_plan::{place_launches, round, text};

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: replay FILE (a cluster as text, see docs/planning.md)");
        return ExitCode::from(2);
    };
    let scenario = std::fs::read_to_string(&path)
        .map_err(|error| error.to_string())
        .and_then(|text| text::parse(&text).map_err(|error| error.to_string()));
    match scenario {
        Ok(scenario) => {
            let plan = round(&scenario.snapshot, &scenario.policy);
            let requests: Vec<_> = scenario
                .launches
                .iter()
                .map(|(_, request)| request.clone())
                .collect();
            let placements = place_launches(&scenario.snapshot, &scenario.policy, &requests);
            print!(
                "{}{}{}",
                text::print_plan(&plan),
                text::print_placements(&scenario.launches, &placements),
                text::print_preemptions(&scenario.snapshot, &scenario.policy, &scenario.launches)
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}
