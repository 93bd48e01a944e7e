//! `shoal schedulers`

use clap::Args;
use serde::Serialize;
use shoal_proto::cluster::{ListSchedulersRequest, SchedulerInfo};

use crate::client::Context;
use crate::error::CliError;
use crate::format;
use crate::output::table;

/// Arguments of `schedulers`.
#[derive(Debug, Args)]
pub struct SchedulersArgs {}

#[derive(Debug, Serialize)]
struct SchedulerView {
    address: String,
    role: &'static str,
    /// Of its lead.
    term: Option<u64>,
    age_seconds: u64,
    leads_seconds: Option<u64>,
}

impl From<SchedulerInfo> for SchedulerView {
    fn from(info: SchedulerInfo) -> Self {
        Self {
            address: info.address,
            role: if info.leads { "leader" } else { "follower" },
            term: info.leads.then_some(info.term),
            age_seconds: format::seconds_since(info.started_unix_ms),
            leads_seconds: info
                .leads
                .then(|| format::seconds_since(info.leads_since_unix_ms)),
        }
    }
}

/// Lists the schedulers that live.
pub async fn run(context: &Context, _args: SchedulersArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let response = client.list_schedulers(ListSchedulersRequest {}).await?;
    let schedulers = response.into_inner().schedulers.into_iter();
    let schedulers: Vec<SchedulerView> = schedulers.map(SchedulerView::from).collect();
    context.output.show(&schedulers, |schedulers| {
        let dash = || "-".to_owned();
        let rows = schedulers.iter().map(|scheduler| {
            [
                scheduler.address.clone(),
                scheduler.role.to_owned(),
                scheduler.term.map_or_else(dash, |term| term.to_string()),
                scheduler.leads_seconds.map_or_else(dash, format::age),
                format::age(scheduler.age_seconds),
            ]
        });
        table(["ADDRESS", "ROLE", "TERM", "LEADS FOR", "AGE"], rows)
    })
}
