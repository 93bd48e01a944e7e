//! One file per command. Each has its arguments and a `run` that does it.

pub mod agent;
pub mod backup;
pub mod certs;
pub mod completions;
pub mod cpu;
pub mod down;
pub mod drain;
pub mod events;
pub mod explain;
#[cfg(test)]
mod hostile;
pub mod image;
pub mod inspect;
pub mod lock;
pub mod logs;
pub mod migrate;
pub mod migrations;
pub mod move_vms;
mod moving;
pub mod node;
pub mod nodes;
pub mod policy;
pub mod ps;
pub mod queue;
pub mod rebalance;
pub mod record;
pub mod resolve;
pub mod restore;
pub mod rm;
pub mod run;
pub mod scheduler;
pub mod schedulers;
pub mod simulate;
pub mod stop;
pub mod suspend;
pub mod uncordon;
pub mod up;
pub mod upgrade;

use std::process::ExitCode;

use shoal_proto::cluster::move_vms_request::Direction;
use tokio::runtime::Builder;

use crate::args::{Cli, Command};
use crate::client::Context;
use crate::error::CliError;

/// Does what was typed; answers the exit code.
pub fn run(cli: Cli) -> Result<ExitCode, CliError> {
    let daemon = matches!(cli.command, Command::Scheduler(_) | Command::Agent(_));
    let mut builder = if daemon {
        Builder::new_multi_thread()
    } else {
        Builder::new_current_thread()
    };
    let runtime = builder
        .enable_all()
        .build()
        .map_err(|error| CliError::Failed(format!("cannot start the async runtime: {error}")))?;
    let code = runtime.block_on(run_command(&Context::new(&cli.global), cli.command));
    // A thread that still reads a file or the terminal must not keep a command that is done from ending.
    runtime.shutdown_background();
    code
}

async fn run_command(context: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Run(args) => return run::run(context, args).await,
        Command::Up(args) => return up::run(context, args).await,
        Command::Down(args) => down::run(context, args).await,
        Command::Scheduler(args) => scheduler::run(args).await,
        Command::Schedulers(args) => schedulers::run(context, args).await,
        Command::Backup(args) => backup::run(context, args).await,
        Command::Restore(args) => restore::run(context, args).await,
        Command::Agent(args) => agent::run(context, args).await,
        Command::Image(command) => image::run(context, command).await,
        Command::Ps(args) => ps::run(context, args).await,
        Command::Nodes(args) => nodes::run(context, args).await,
        Command::Inspect(args) => inspect::run(context, args).await,
        Command::Logs(args) => logs::run(context, args).await,
        Command::Migrate(args) => migrate::run(context, *args).await,
        Command::Migrations(args) => migrations::run(context, args).await,
        Command::Stop(args) => stop::run(context, args).await,
        Command::Rm(args) => rm::run(context, args).await,
        Command::Drain(args) => drain::run(context, args).await,
        Command::Upgrade(args) => upgrade::run(context, args).await,
        Command::Uncordon(args) => uncordon::run(context, args).await,
        Command::Node(command) => node::run(context, command).await,
        Command::Queue(args) => queue::run(context, args).await,
        Command::Explain(args) => explain::run(context, args).await,
        Command::Expel(args) => move_vms::run(context, args, Direction::Expel).await,
        Command::Bring(args) => move_vms::run(context, args, Direction::Bring).await,
        Command::Lock(args) => lock::run(context, args, true).await,
        Command::Unlock(args) => lock::run(context, args, false).await,
        Command::Suspend(args) => suspend::suspend(context, args).await,
        Command::Resume(args) => suspend::resume(context, args).await,
        Command::Policy(command) => policy::run(context, command).await,
        Command::Rebalance(args) => rebalance::run(context, args).await,
        Command::Resolve(args) => resolve::run(context, args).await,
        Command::Events(args) => events::run(context, args).await,
        Command::Record(args) => record::run(context, args).await,
        Command::Simulate(args) => simulate::run(context, &args),
        Command::Cpu(command) => cpu::run(context, command).await,
        Command::Certs(command) => certs::run(context, command),
        Command::Completions(args) => completions::run(context, &args),
    }?;
    Ok(ExitCode::SUCCESS)
}
