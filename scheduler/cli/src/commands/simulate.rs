//! `shoal simulate`

use std::fs;
use std::path::PathBuf;

use clap::Args;
use shoal_simulate::recording::{self, Replayed};
use shoal_simulate::{Comparison, PolicyKind, compare, load, plot};

use crate::client::Context;
use crate::error::CliError;
use crate::page::Page;

/// Arguments of `simulate`.
#[derive(Debug, Args)]
pub struct SimulateArgs {
    /// Nodes, workload and policies as text, which docs/simulation.md explains, or a recording of `shoal record`.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Only this policy; may be repeated.
    #[arg(long = "policy", value_name = "NAME", value_parser = policy)]
    pub policies: Vec<PolicyKind>,
    /// Seed of the first run, instead of the file's.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Runs that the figures are the mean of, instead of the file's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: Option<u32>,
    /// Draw the result into this file, as SVG.
    #[arg(long, value_name = "PATH")]
    pub plot: Option<PathBuf>,
}

fn policy(text: &str) -> Result<PolicyKind, String> {
    PolicyKind::parse(text).ok_or_else(|| {
        let names: Vec<&str> = PolicyKind::ALL.iter().map(|kind| kind.name()).collect();
        format!("it is none of {}", names.join(", "))
    })
}

/// Simulates and shows the table. Needs no cluster.
pub fn run(context: &Context, args: &SimulateArgs) -> Result<(), CliError> {
    let failed = |error: String| CliError::Failed(format!("{}: {error}", args.file.display()));
    let data = fs::read(&args.file).map_err(|source| CliError::File {
        path: args.file.clone(),
        what: "cannot read".to_owned(),
        source,
    })?;
    if recording::is_recording(&data) {
        return replay(context, args, &data);
    }
    let mut scenario = load(&args.file).map_err(|error| failed(error.to_string()))?;
    if !args.policies.is_empty() {
        scenario.policies.clear();
        for kind in &args.policies {
            if !scenario.policies.contains(kind) {
                scenario.policies.push(*kind);
            }
        }
    }
    scenario.seed = args.seed.unwrap_or(scenario.seed);
    scenario.runs = args.runs.unwrap_or(scenario.runs);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let comparison = compare(&scenario, threads);
    if let Some(path) = &args.plot {
        fs::write(path, plot::scenario(&comparison)).map_err(|source| CliError::File {
            path: path.clone(),
            what: "cannot write the plot".to_owned(),
            source,
        })?;
    }
    context.output.show(&comparison, |comparison: &Comparison| {
        comparison.table().lines().collect::<Page>()
    })
}

/// Says what the planner would have done on a recorded cluster.
fn replay(context: &Context, args: &SimulateArgs, data: &[u8]) -> Result<(), CliError> {
    if !args.policies.is_empty() || args.seed.is_some() || args.runs.is_some() || args.plot.is_some() {
        return Err(CliError::Usage(format!(
            "{} is a recording: it is replayed as it is; --policy, --seed, --runs and --plot are for scenarios",
            args.file.display()
        )));
    }
    let moments = recording::read(data)
        .map_err(|error| CliError::Failed(format!("{}: {error}", args.file.display())))?;
    let replayed = recording::replay(&moments, None);
    context.output.show(&replayed, |replayed: &Replayed| {
        let mut page = Page::default();
        for would in &replayed.would {
            let seconds = would.at_ms as f64 / 1e3;
            let to = if would.to.is_empty() {
                String::new()
            } else {
                format!(" to {}", would.to)
            };
            page.line(format!(
                "{seconds:7.1} s  {}  {} from {}{to}",
                would.kind, would.vm, would.from
            ));
            page.line(format!("           {}", would.reason));
        }
        page.line(replayed.summary());
        page
    })
}
