//! Runs cases: in turns, so that what else happens on the machine hits all alike.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::runtime::Runtime;

use crate::case::Case;
use crate::figures::{CaseReport, Pair, Run, Side};
use crate::memory::{self, Warm};
use crate::place::Place;
use crate::{cloud_hypervisor, qemu, shoal, table};

/// For anything that a guest of 1 GiB does.
const PATIENCE: Duration = Duration::from_secs(60);
/// For each GiB more.
const PATIENCE_PER_GIB: Duration = Duration::from_secs(15);
/// What else runs here needs memory, too.
const SPARE_MEMORY: u64 = 1 << 30;

/// Who takes part, and how.
#[derive(Debug)]
pub struct Runner<'a> {
    /// Drives Shoal.
    pub runtime: &'a Runtime,
    /// Around all migrations.
    pub place: &'a Place,
    /// For all sides.
    pub max_downtime: Duration,
    /// Leave free memory as it is.
    pub cold: bool,
    /// Whether QEMU takes part.
    pub qemu: bool,
    /// Whether Cloud Hypervisor does.
    pub cloud_hypervisor: bool,
    /// What was done, of what there is to do.
    pub progress: Progress,
}

/// One migration by one VMM.
type Migrate<'a> = dyn Fn(Option<Warm>) -> Result<Run> + 'a;

impl Runner<'_> {
    /// How many migrations one run of a case is.
    pub fn sides(&self, case: &Case) -> u32 {
        1 + u32::from(self.qemu && case.qemu) + u32::from(self.cloud_hypervisor && case.cloud_hypervisor)
    }

    /// Why a case cannot be run here now; `None` if it can.
    ///
    /// # Errors
    /// If the machine does not say how much memory it has.
    pub fn obstacle(case: &Case) -> Result<Option<String>> {
        // The source and, before it is there, what warms the memory of the destination.
        let needed = case.filled + case.memory + case.memory / 8 + SPARE_MEMORY;
        let available = memory::available()?;
        Ok((available < needed).then(|| {
            format!(
                "it needs {} MiB and {} MiB are available",
                needed >> 20,
                available >> 20
            )
        }))
    }

    /// All runs of a case.
    pub fn case(&mut self, case: &Case, runs: u32) -> CaseReport {
        let patience = PATIENCE + PATIENCE_PER_GIB * u32::try_from(case.memory >> 30).unwrap_or(u32::MAX);
        let (runtime, place, max_downtime) = (self.runtime, self.place, self.max_downtime);
        let by_shoal = |warm| runtime.block_on(shoal::run(case, place, max_downtime, patience, warm));
        let by_qemu = |warm| qemu::run(case, place, max_downtime, patience, warm);
        let by_cloud_hypervisor = |warm| cloud_hypervisor::run(case, place, max_downtime, patience, warm);
        let mut sides: Vec<(&str, &Migrate<'_>, Vec<Result<Run>>)> = vec![("Shoal", &by_shoal, Vec::new())];
        if self.qemu && case.qemu {
            sides.push(("QEMU", &by_qemu, Vec::new()));
        }
        if self.cloud_hypervisor && case.cloud_hypervisor {
            sides.push(("Cloud Hypervisor", &by_cloud_hypervisor, Vec::new()));
        }
        for run in 1..=runs {
            for (who, migrate, outcomes) in &mut sides {
                let outcome = self.once(case, *migrate);
                self.progress
                    .tell(&format!("{}, {who}, run {run} of {runs}", case.name), &outcome);
                outcomes.push(outcome);
            }
        }
        let mut sides = sides
            .into_iter()
            .map(|(who, _, outcomes)| (who, Side::of(outcomes)));
        let mut side = |wanted: &str| sides.find(|(who, _)| *who == wanted).map(|(_, side)| side);
        CaseReport {
            name: case.name,
            title: case.title,
            group: case.group,
            cmdline: case.cmdline,
            filled: case.filled,
            sides: Pair {
                shoal: side("Shoal").unwrap_or_default(),
                qemu: (self.qemu && case.qemu).then(|| side("QEMU").unwrap_or_default()),
            },
            cloud_hypervisor: side("Cloud Hypervisor"),
        }
    }

    fn once(&self, case: &Case, migrate: &Migrate<'_>) -> Result<Run> {
        // A hand-over copies nothing.
        let warm = !(self.cold || case.settings.handover);
        let warm = warm.then(|| Warm::up(case.memory)).transpose()?;
        // The harness panics where a test would; the other cases still have something to tell.
        match catch_unwind(AssertUnwindSafe(|| migrate(warm))) {
            Ok(outcome) => outcome,
            Err(_) => bail!("panicked, as said above"),
        }
    }
}

/// Says what was done and how long the rest may take.
#[derive(Debug)]
pub struct Progress {
    start: Instant,
    done: u32,
    all: u32,
}

impl Progress {
    /// Of so many migrations.
    pub fn new(all: u32) -> Self {
        Self {
            start: Instant::now(),
            done: 0,
            all,
        }
    }

    /// Some will not take place.
    pub fn skip(&mut self, migrations: u32) {
        self.all = self.all.saturating_sub(migrations);
    }

    fn tell(&mut self, what: &str, outcome: &Result<Run>) {
        self.done += 1;
        let left = self.start.elapsed() / self.done * self.all.saturating_sub(self.done);
        let outcome = match outcome {
            Ok(run) => table::brief(&run.figures),
            Err(_) => "FAILED".into(),
        };
        println!(
            "  [{}/{}] {what}: {outcome}; about {} min left",
            self.done,
            self.all,
            left.as_secs().div_ceil(60)
        );
    }
}
