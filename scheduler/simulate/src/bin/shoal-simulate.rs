//! Runs scenarios and writes their tables, pictures and figures: what `cargo xtask simulate` calls.
//!
//! `shoal-simulate --out FOLDER [--quick] [--traces FOLDER] FILE…`; with `--quick`, one run of an hour at most each.
//! `--traces`: every `planetlab-*.csv.gz` there, spread and packed, besides the files.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use shoal_simulate::{Comparison, Mode, Scenario, compare, load, plot, text};

/// A packed day of another trace is the experiment of the paper, as in `scenarios/`.
const PACK: &str = include_str!("../../scenarios/pack-20110303.txt");
const SPREAD: &str = include_str!("../../scenarios/planetlab-20110303.txt");
/// The day that both are about.
const DAY: &str = "20110303";

struct Arguments {
    out: PathBuf,
    quick: bool,
    traces: Option<PathBuf>,
    files: Vec<PathBuf>,
}

fn main() -> ExitCode {
    match arguments().and_then(|arguments| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Result<Arguments, String> {
    let mut arguments = Arguments {
        out: PathBuf::new(),
        quick: false,
        traces: None,
        files: Vec::new(),
    };
    let mut words = std::env::args_os().skip(1);
    while let Some(word) = words.next() {
        let mut path = |name: &str| {
            words
                .next()
                .map(PathBuf::from)
                .ok_or(format!("{name}: a path must follow"))
        };
        match word.to_str() {
            Some("--out") => arguments.out = path("--out")?,
            Some("--traces") => arguments.traces = Some(path("--traces")?),
            Some("--quick") => arguments.quick = true,
            Some(option) if option.starts_with('-') => {
                return Err(format!("{option} is none of --out, --traces, --quick"));
            }
            _ => arguments.files.push(PathBuf::from(word)),
        }
    }
    if arguments.out.as_os_str().is_empty() {
        return Err("--out FOLDER is missing".to_owned());
    }
    Ok(arguments)
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let mut scenarios = Vec::new();
    for file in &arguments.files {
        scenarios.push(load(file).map_err(|error| format!("{}: {error}", file.display()))?);
    }
    if let Some(folder) = &arguments.traces {
        scenarios.extend(traced(folder)?);
    }
    fs::create_dir_all(&arguments.out).map_err(|error| format!("{}: {error}", arguments.out.display()))?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut comparisons: Vec<Comparison> = Vec::new();
    let mut tables = String::new();
    for mut scenario in scenarios {
        if arguments.quick {
            scenario.runs = 1;
            scenario.duration = scenario.duration.min(3600.0);
        }
        let started = Instant::now();
        let comparison = compare(&scenario, threads);
        let table = comparison.table();
        println!("{table}({:.1} s)\n", started.elapsed().as_secs_f64());
        tables.push_str(&table);
        tables.push('\n');
        write(
            &arguments.out,
            &format!("{}.svg", scenario.name),
            &plot::scenario(&comparison),
        )?;
        comparisons.push(comparison);
    }
    let json = serde_json::to_string_pretty(&comparisons).map_err(|error| error.to_string())?;
    write(&arguments.out, "results.json", &json)?;
    write(&arguments.out, "tables.txt", &tables)?;
    write(&arguments.out, "summary.svg", &plot::summary(&comparisons))?;
    let verdicts = comparisons.iter().flat_map(|comparison| &comparison.verdicts);
    let (met, missed): (Vec<_>, Vec<_>) = verdicts.partition(|verdict| verdict.met);
    println!(
        "{} goals met, {} missed; written to {}",
        met.len(),
        missed.len(),
        arguments.out.display()
    );
    Ok(())
}

fn write(folder: &Path, name: &str, content: &str) -> Result<(), String> {
    let path = folder.join(name);
    fs::write(&path, content).map_err(|error| format!("{}: {error}", path.display()))
}

/// Both experiments for every trace in a folder. There are as many nodes as the trace uses to three quarters, where it is
/// about spreading.
fn traced(folder: &Path) -> Result<Vec<Scenario>, String> {
    let whole = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder).map_err(whole)? {
        let path = entry.map_err(whole)?.path();
        let name = path
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        if name.starts_with("planetlab-") && name.ends_with(".csv.gz") {
            files.push(path);
        }
    }
    files.sort();
    let mut scenarios = Vec::new();
    for file in files {
        let data = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        let name = file
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let day = name.trim_start_matches("planetlab-").trim_end_matches(".csv.gz");
        for (kind, template) in [("planetlab", SPREAD), ("pack", PACK)] {
            let scenario = text::parse(template, &format!("{kind}-{day}"), &|_| Ok(data.clone()));
            let mut scenario = scenario.map_err(|error| format!("{}: {error}", file.display()))?;
            if scenario.mode == Mode::Spread {
                fit(&mut scenario);
            }
            scenarios.push(scenario);
        }
    }
    if scenarios.is_empty() {
        return Err(format!(
            "{}: holds no planetlab-*.csv.gz like planetlab-{DAY}.csv.gz",
            folder.display()
        ));
    }
    Ok(scenarios)
}

fn fit(scenario: &mut Scenario) {
    let used: f64 = shoal_simulate::engine::vm_specs(scenario, scenario.seed)
        .iter()
        .map(|vm| vm.mean_cpu(scenario.duration))
        .sum();
    let Some(first) = scenario.nodes.first().cloned() else {
        return;
    };
    let mut number = 0;
    let mut capacity = 0.0;
    scenario.nodes.clear();
    while capacity < used / 0.75 {
        number += 1;
        let mut node = first.clone();
        node.name = shoal_plan::NodeName::new(&format!("node{number:04}"));
        capacity += node.capacity();
        scenario.nodes.push(node);
    }
}
