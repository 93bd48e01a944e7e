//! `shoal policy get|set|reset`

use clap::{Args, Subcommand};
use serde::Serialize;
use shoal_proto::cluster::{GetPolicyRequest, SchedulingPolicy, SetPolicyRequest};

use crate::client::Context;
use crate::error::CliError;
use crate::output::table;

/// What can be done with the policy.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Show it.
    Get(GetArgs),
    /// Change what is said, and leave the rest. It holds for what is planned from now on, also after a restart.
    Set(SetArgs),
    /// Go back to what the scheduler was started with.
    Reset(ResetArgs),
}

/// Arguments of `policy get`.
#[derive(Debug, Args)]
pub struct GetArgs {
    /// Only these fields.
    names: Vec<String>,
}

/// Arguments of `policy set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// Such as overcommit=2 or cool_down=30s; docs/planning.md has the list.
    #[arg(required = true, value_name = "NAME=VALUE", value_parser = parse_field)]
    fields: Vec<(String, String)>,
}

/// Arguments of `policy reset`.
#[derive(Debug, Args)]
pub struct ResetArgs {
    /// Which fields.
    #[arg(required_unless_present = "all")]
    names: Vec<String>,
    /// All of them.
    #[arg(long, conflicts_with = "names")]
    all: bool,
}

#[derive(Debug, Serialize)]
struct FieldView {
    name: String,
    value: String,
    default: String,
    set: bool,
}

/// Shows or changes the policy.
pub async fn run(context: &Context, command: PolicyCommand) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let (policy, names) = match command {
        PolicyCommand::Get(args) => (client.get_policy(GetPolicyRequest {}).await?, args.names),
        PolicyCommand::Set(args) => {
            let names = args.fields.iter().map(|(name, _)| name.clone()).collect();
            let request = SetPolicyRequest {
                values: args.fields.into_iter().collect(),
                reset: Vec::new(),
            };
            (client.set_policy(request).await?, names)
        }
        PolicyCommand::Reset(args) => {
            let reset = if args.all {
                let now = client.get_policy(GetPolicyRequest {}).await?.into_inner();
                let set = now.fields.into_iter().filter(|field| field.set);
                set.map(|field| field.name).collect()
            } else {
                args.names.clone()
            };
            let request = SetPolicyRequest {
                reset,
                ..SetPolicyRequest::default()
            };
            (client.set_policy(request).await?, args.names)
        }
    };
    let fields = fields(policy.into_inner(), &names)?;
    context.output.show(&fields, |fields| {
        let rows = fields.iter().map(|field| {
            let set = if field.set { "yes" } else { "" };
            [
                field.name.clone(),
                field.value.clone(),
                field.default.clone(),
                set.to_owned(),
            ]
        });
        table(["NAME", "VALUE", "DEFAULT", "SET"], rows)
    })
}

fn fields(policy: SchedulingPolicy, names: &[String]) -> Result<Vec<FieldView>, CliError> {
    let unknown = |name: &&String| !policy.fields.iter().any(|field| field.name == **name);
    if let Some(name) = names.iter().find(unknown) {
        return Err(CliError::Usage(format!("policy: {name}: no such field")));
    }
    let chosen = policy
        .fields
        .into_iter()
        .filter(|field| names.is_empty() || names.contains(&field.name));
    let views = chosen.map(|field| FieldView {
        name: field.name,
        value: field.value,
        default: field.default_value,
        set: field.set,
    });
    Ok(views.collect())
}

fn parse_field(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| format!("'{text}' is not NAME=VALUE"))
}
