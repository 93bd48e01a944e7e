//! GetMigrationDefaults.

use shoal_proto::cluster::MigrationDefaults;

use crate::policy;
use crate::scheduler::Scheduler;

pub fn call(scheduler: &Scheduler) -> MigrationDefaults {
    policy::whole(&scheduler.defaults.set())
}
