//! What can be typed.

use std::ffi::OsString;

use clap::{Args, Parser, Subcommand};

use crate::commands;
use crate::output::{Format, Output};

const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:7470";

/// Many small machines used as one big one: every workload in its own microVM, moved live between hosts.
#[derive(Debug, Parser)]
#[command(
    name = "shoal",
    version,
    about,
    propagate_version = true,
    infer_long_args = false
)]
pub struct Cli {
    /// Options that every command takes.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
pub struct GlobalArgs {
    /// Where the schedulers answer, each as HOST:PORT or http://HOST:PORT; the one that leads is found among them.
    #[arg(
        long,
        visible_alias = "endpoint",
        global = true,
        env = "SHOAL_ENDPOINT",
        default_value = DEFAULT_ENDPOINT,
        value_delimiter = ',',
        value_name = "URL[,URL...]"
    )]
    pub scheduler: Vec<String>,
    /// Tables for people (wide: with more columns of nodes and VMs) or JSON for scripts.
    #[arg(short, long = "output", global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
}

impl GlobalArgs {
    /// Where the schedulers answer, as URLs.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        let has_port = |text: &str| {
            let port = text.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
            matches!(port, Some(Ok(_)))
        };
        let url = |text: &String| {
            if has_port(text) && !text.contains("://") {
                format!("http://{text}")
            } else {
                text.clone()
            }
        };
        let said = self.scheduler.iter().filter(|said| !said.trim().is_empty());
        let said: Vec<String> = said.map(url).collect();
        // A variable that is set to nothing is not set.
        if said.is_empty() {
            return vec![DEFAULT_ENDPOINT.to_owned()];
        }
        said
    }

    /// Somebody said where, on the command line or in the environment.
    #[must_use]
    pub fn says_where(&self) -> bool {
        let variable = std::env::var("SHOAL_ENDPOINT").unwrap_or_default();
        !variable.trim().is_empty() || self.endpoints() != [DEFAULT_ENDPOINT]
    }

    /// Where and how results are written.
    #[must_use]
    pub fn output(&self) -> Output {
        Output::new(self.output)
    }
}

/// Every command; each has its own file under `commands/`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a whole cluster on this machine: a scheduler and N nodes, each with a budget.
    Up(commands::up::UpArgs),
    /// Stop the cluster that `up` started, and its VMs.
    Down(commands::down::DownArgs),
    /// The scheduler daemon, for real hosts.
    Scheduler(commands::scheduler::SchedulerArgs),
    /// Show the schedulers, and which of them leads.
    Schedulers(commands::schedulers::SchedulersArgs),
    /// Write all that the cluster's store holds to a file.
    Backup(commands::backup::BackupArgs),
    /// Put a backup into a store that no scheduler uses.
    Restore(commands::restore::RestoreArgs),
    /// The node daemon, for real hosts.
    Agent(commands::agent::AgentArgs),
    /// Import and list images.
    #[command(subcommand)]
    Image(commands::image::ImageCommand),
    /// Run a workload in a new microVM.
    Run(commands::run::RunArgs),
    /// List the VMs that have not ended.
    #[command(visible_alias = "vms")]
    Ps(commands::ps::PsArgs),
    /// List nodes.
    Nodes(commands::nodes::NodesArgs),
    /// Show all that is known of a VM.
    Inspect(commands::inspect::InspectArgs),
    /// Show a VM's console.
    Logs(commands::logs::LogsArgs),
    /// Move a running VM to another node.
    Migrate(Box<commands::migrate::MigrateArgs>),
    /// List migrations, show, cancel or change one, set their defaults.
    Migrations(commands::migrations::MigrationsArgs),
    /// Power a VM off.
    Stop(commands::stop::StopArgs),
    /// Remove VMs that have ended.
    Rm(commands::rm::RmArgs),
    /// Move every VM off a node and keep new ones away.
    Drain(commands::drain::DrainArgs),
    /// Move every VM of a node to a new VMM on that node, as after an update of it.
    Upgrade(commands::upgrade::UpgradeArgs),
    /// Let a drained node take VMs again.
    Uncordon(commands::uncordon::UncordonArgs),
    /// Change labels, taints and reserves of a node, declare it lost, or remove it.
    #[command(subcommand)]
    Node(commands::node::NodeCommand),
    /// Show the VMs that wait for room.
    Queue(commands::queue::QueueArgs),
    /// Say why a VM is where it is, and why it does or does not move.
    Explain(commands::explain::ExplainArgs),
    /// Move every VM off a node, which goes on to take VMs.
    Expel(commands::move_vms::MoveVmsArgs),
    /// Move the VMs that were started on a node back to it.
    Bring(commands::move_vms::MoveVmsArgs),
    /// Keep a VM on its node.
    Lock(commands::lock::LockArgs),
    /// Let a VM be moved again.
    Unlock(commands::lock::LockArgs),
    /// Stop the vCPUs of VMs until they are resumed; they keep their memory, and are moved as they are.
    Suspend(commands::suspend::SuspendArgs),
    /// Let suspended VMs run on.
    Resume(commands::suspend::ResumeArgs),
    /// Show or change the policy that plans are made with.
    #[command(subcommand)]
    Policy(commands::policy::PolicyCommand),
    /// Balance the cluster now, or show what would be done.
    Rebalance(commands::rebalance::RebalanceArgs),
    /// End a migration in doubt by an operator's decision.
    Resolve(commands::resolve::ResolveArgs),
    /// Show what the cluster did, and why.
    Events(commands::events::EventsArgs),
    /// Write what plans are made from, once a second, to a file that `simulate` replays.
    Record(commands::record::RecordArgs),
    /// Compare placement and migration policies on a simulated cluster, or say what would be done on a recorded one.
    Simulate(commands::simulate::SimulateArgs),
    /// CPU features of nodes and of new VMs.
    #[command(subcommand)]
    Cpu(commands::cpu::CpuCommand),
    /// Make and show the certificates that nodes need to migrate VMs over TLS.
    #[command(subcommand)]
    Certs(commands::certs::CertsCommand),
    /// Write a completion script for a shell.
    Completions(commands::completions::CompletionsArgs),
}

/// Whether `-o json` stands among arguments that cannot be read otherwise.
pub fn wants_json(args: impl IntoIterator<Item = OsString>) -> bool {
    let mut value_follows = false;
    let mut json = false;
    for arg in args {
        let Some(arg) = arg.to_str().filter(|&arg| arg != "--") else {
            break;
        };
        let value = if std::mem::take(&mut value_follows) {
            Some(arg)
        } else if matches!(arg, "-o" | "--output") {
            value_follows = true;
            None
        } else {
            let joined = arg.strip_prefix("--output=").or_else(|| arg.strip_prefix("-o"));
            joined.map(|value| value.trim_start_matches('='))
        };
        json |= value == Some("json");
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_line_that_cannot_be_read_says_whether_it_wants_json() {
        let wants = |line: &str| wants_json(line.split(' ').map(OsString::from));
        for line in [
            "-o json run",
            "frobnicate -ojson",
            "ps -o=json",
            "ps --output json x",
            "ps --output=json",
        ] {
            assert!(wants(line), "{line}");
        }
        for line in [
            "ps",
            "-o table",
            "run x -- -o json",
            "ps -o",
            "ps json",
            "ps -o wide json",
        ] {
            assert!(!wants(line), "{line}");
        }
    }

    #[test]
    fn schedulers_are_named_with_or_without_their_scheme() {
        let line = "shoal ps --scheduler 10.0.0.1:7470,http://b:1,ftp:x,[::1]:7470";
        let cli = Cli::try_parse_from(line.split(' ')).expect("well formed");
        assert_eq!(
            cli.global.endpoints(),
            ["http://10.0.0.1:7470", "http://b:1", "ftp:x", "http://[::1]:7470"]
        );
    }

    #[test]
    fn an_empty_endpoint_is_none() {
        for empty in ["--scheduler=", "--scheduler=,", "--scheduler= "] {
            let cli = Cli::try_parse_from(["shoal", "ps", empty]).expect("well formed");
            assert_eq!(cli.global.endpoints(), [DEFAULT_ENDPOINT], "{empty}");
        }
    }

    #[test]
    fn what_the_readme_shows_can_be_typed() {
        for line in [
            "shoal up --nodes 3 --node-memory 1GiB --node-cpus 1 --state-dir d --listen 127.0.0.1:1 --detach",
            "shoal image import images/probe --name p",
            "shoal run linux --name a --cpus 1 --memory 64MiB --node node1 --detach -- sh -c true",
            "shoal migrate a --to node2 --max-downtime 50ms --timeout 2m -o json",
            "shoal migrate a --bandwidth 100MiB/s --on-stall post-copy --connections 4 --compress zstd --priority 9",
            "shoal migrate a --verify",
            "shoal migrate a --verify=sampled --to node1",
            "shoal migrations --vm a --node node1 --running --limit 10 -o json",
            "shoal migrations show 1234 --plot life.svg",
            "shoal migrations cancel a",
            "shoal migrations set a --bandwidth 10MiB --max-downtime 5ms --timeout 1m --on-stall force --priority 0",
            "shoal migrations defaults",
            "shoal migrations defaults set --on-stall throttle --link-bandwidth 1GiB --cluster-bandwidth 0 --reset",
            "shoal upgrade node1 --parallel 4",
            "shoal ps -o json",
            "shoal ps --all",
            "shoal rm a b --force",
            "shoal run probe --rm -- seconds=1",
            "shoal run linux --label app=web,user=ada --selector zone=a --selector disk!=slow --tolerate gpu",
            "shoal run linux --affinity app=db --anti-affinity app=web --priority 0",
            "shoal node label node1 zone=a disk-",
            "shoal node taint node1 gpu dedicated=ml",
            "shoal node reserve node1 --memory 1GiB --cpus 0.5",
            "shoal node lost node1",
            "shoal node lost node1 --yes -o json",
            "shoal node rm node1 node2",
            "shoal lock a",
            "shoal unlock a",
            "shoal suspend a b --reason lunch",
            "shoal resume a b",
            "shoal run linux --queue --label user=ada",
            "shoal run linux --queue --rm --node node1 --exclusive",
            "shoal run linux --queue --detach --prefer-node node1",
            "shoal queue -o json",
            "shoal explain a --nodes 5",
            "shoal expel node1",
            "shoal bring node1",
            "shoal rebalance --mode pack --dry-run",
            "shoal policy get",
            "shoal policy get overcommit -o json",
            "shoal policy set n_plus_one=on overcommit=2 automation=advise aggressiveness=4",
            "shoal policy reset overcommit",
            "shoal policy reset --all",
            "shoal logs -f a",
            "shoal rebalance --dry-run",
            "shoal simulate leak.txt --policy shoal --policy openmosix --seed 7 --runs 2 --plot leak.svg -o json",
            "shoal record noise.gz --for 5m",
            "shoal record noise.gz -o json",
            "shoal simulate noise.gz",
            "shoal resolve a --keep node1",
            "shoal cpu baseline",
            "shoal cpu baseline apply -o json",
            "shoal completions bash",
            "shoal certs init d --days 30",
            "shoal certs issue d node1 --out e --days 30",
            "shoal certs show d/ca.pem -o json",
            "shoal agent --migration-tls d/node1 --memory-backing shared",
            "shoal up --memory-backing anonymous",
            "shoal up --no-migration-tls",
            "shoal scheduler --store etcd://10.0.0.1:2379,10.0.0.2:2379/shoal --advertise 10.0.0.1:7470 --lease 3s",
            "shoal ps --scheduler 10.0.0.1:7470,10.0.0.2:7470",
            "shoal agent --scheduler http://10.0.0.1:7470,10.0.0.2:7470",
            "shoal schedulers -o json",
            "shoal backup all.shoal",
            "shoal backup all.shoal --store etcd://127.0.0.1:2379",
            "shoal restore all.shoal --state-dir d --force",
            "shoal restore all.shoal --store etcd://127.0.0.1:2379/shoal",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        for line in [
            "shoal",
            "shoal migrate",
            "shoal run",
            "shoal run x --memory lots",
            "shoal run x --rm --detach",
            "shoal run x --node node1 --prefer-node node2",
            "shoal rm",
            "shoal migrate a --max-downtime 0s",
            "shoal migrate a --on-stall hope",
            "shoal migrate a --priority 10",
            "shoal migrate a --connections 17",
            "shoal simulate",
            "shoal simulate leak.txt --policy best",
            "shoal record",
            "shoal record noise.gz --for ever",
            "shoal simulate leak.txt --runs 0",
            "shoal migrations --vm a show b",
            "shoal migrations set a --verify",
            "shoal node label node1",
            "shoal node reserve node1",
            "shoal node lost",
            "shoal node rm",
            "shoal policy set",
            "shoal policy set overcommit",
            "shoal policy reset",
            "shoal run linux --priority 10",
            "shoal rebalance --mode tidy",
            "shoal restore all.shoal --state-dir d --store etcd://127.0.0.1:2379",
            "shoal backup",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
