//! `shoal run IMAGE`

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use shoal_proto::cluster::{GetVmRequest, RemoveVmRequest, RunVmRequest, StreamLogsRequest, Vm, VmPhase};
use tonic::Code;

use crate::client::{Client, Context, until_interrupted};
use crate::error::CliError;
use crate::format::parse_size;
use crate::ring3;
use crate::rule_args::RuleArgs;
use crate::view::{VmView, vm_state};

/// How often it is looked whether it is a VM's turn.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Which image.
    pub image: String,
    /// A name for it; otherwise one is made.
    #[arg(long)]
    pub name: Option<String>,
    /// How many vCPUs; otherwise as the image says.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: Option<u32>,
    /// How much memory, such as 256MiB; otherwise as the image says.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// On this node and no other: it is locked there until `shoal unlock`; otherwise where it fits best.
    #[arg(long)]
    pub node: Option<String>,
    /// Start on this node if it fits there, otherwise where it fits best; it may be moved later.
    #[arg(long, value_name = "NODE", conflicts_with = "node")]
    pub prefer_node: Option<String>,
    /// The lower, the sooner it gives way to others; 5 unless said.
    #[arg(long, value_name = "0..9", value_parser = clap::value_parser!(u32).range(0..=9))]
    pub priority: Option<u32>,
    /// Start it as a job: one vCPU for each CPU of a node (policy queue_slots); while there is no such slot, or others wait, it waits.
    /// With --detach the command returns meanwhile; without it says on stderr why it waits, and Ctrl-C leaves the VM in the queue
    /// (`shoal queue` shows it, `shoal rm` takes it out).
    #[arg(long)]
    pub queue: bool,
    /// It may be stopped for one of higher priority that fits nowhere; then it waits in the queue, and begins anew.
    #[arg(long)]
    pub preemptible: bool,
    #[command(flatten)]
    rules: RuleArgs,
    /// Return when it runs, instead of showing its console until it ends and exiting with the workload's status. Ctrl-C ends the
    /// showing, not the VM. With `-o json` the console goes to stderr: stdout has the VM as one JSON value.
    #[arg(long, short)]
    pub detach: bool,
    /// Remove the VM and its log when it has ended.
    #[arg(long, conflicts_with = "detach")]
    pub rm: bool,
    /// For the workload: a bare kernel's command line, or the command that Linux runs.
    #[arg(last = true)]
    pub args: Vec<String>,
}

/// Runs a workload. Without `--detach` shows its console and answers its exit status; then with `-o json` the console
/// goes to stderr and the VM to stdout.
pub async fn run(context: &Context, args: RunArgs) -> Result<ExitCode, CliError> {
    let mut client = context.client().await?;
    let (detach, remove) = (args.detach, args.rm);
    let mut vm = client.run_vm(request(args)).await?.into_inner();
    if vm.phase() == VmPhase::Pending && !detach {
        vm = wait_for_turn(context, &client, vm).await?;
    }
    if vm.phase() == VmPhase::Pending {
        context.output.show(&VmView::from(&vm), |vm| {
            format!("{} waits for room: {}", vm.name, vm.message)
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    if vm.ring3_kernel && !context.output.is_json() && ring3::first_time() {
        context.output.note(&format!(
            "note: {} has no hardware virtualization, so image {} boots its ring-3 kernel there. Programs in such a\n      \
             guest can take over its kernel: users, permissions and seccomp protect nothing inside it.\n      \
             The VM itself stays isolated. See docs/security.md. (Said once; `shoal inspect` always says it.)",
            vm.node, vm.image
        ));
    }
    if detach {
        context.output.show(&VmView::from(&vm), |vm| {
            format!("{} runs on {}", vm.name, vm.node)
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    if vm.phase() == VmPhase::Failed && is_gone(&mut client, &vm).await? {
        return finish(context, &vm);
    }
    let name = &vm.name;
    let goes_on = || format!("{name} goes on: `shoal logs -f {name}` shows it, `shoal stop {name}` ends it");
    let ended = until_interrupted(follow(context, &mut client, &vm), goes_on).await;
    let ended = ended.map_err(|error| error.while_watching(goes_on));
    if matches!(&ended, Err(error) if error.is_broken_pipe()) {
        context
            .output
            .note(&format!("nobody reads the console; {}", goes_on()));
    }
    let ended = ended?;
    if remove {
        let request = RemoveVmRequest {
            vm: ended.id.clone(),
            force: false,
        };
        client.remove_vm(request).await?;
    }
    finish(context, &ended)
}

fn request(args: RunArgs) -> RunVmRequest {
    RunVmRequest {
        image: args.image,
        name: args.name.unwrap_or_default(),
        cpus: args.cpus.unwrap_or_default(),
        memory_set: args.memory.is_some(),
        memory_bytes: args.memory.unwrap_or_default(),
        node: args.node.unwrap_or_default(),
        prefer_node: args.prefer_node.unwrap_or_default(),
        rules: Some(args.rules.rules()),
        priority: args.priority,
        queue: args.queue,
        preemptible: args.preemptible,
        labels: args.rules.labels,
        args: args.args,
    }
}

/// Waits until a VM of the queue is started, or has ended; says its place and why it waits whenever either changes.
async fn wait_for_turn(context: &Context, client: &Client, vm: Vm) -> Result<Vm, CliError> {
    let name = vm.name.clone();
    let goes_on =
        || format!("{name} goes on waiting: `shoal queue` shows it, `shoal rm {name}` takes it out");
    let waited = until_interrupted(watch_queue(context, client, vm), goes_on).await;
    waited.map_err(|error| error.while_watching(goes_on))
}

async fn watch_queue(context: &Context, client: &Client, mut vm: Vm) -> Result<Vm, CliError> {
    let of_it = GetVmRequest { vm: vm.id.clone() };
    let mut waits = client.clone();
    let ends = waits.wait_vm(of_it.clone());
    tokio::pin!(ends);
    let mut client = client.clone();
    let mut said = String::new();
    while vm.phase() == VmPhase::Pending {
        let words = without_figures(&vm.message);
        if words != said {
            context.output.note(&format!("{} waits, {}", vm.name, vm.message));
            said = words;
        }
        tokio::select! {
            // As when it is taken out of the queue.
            ended = &mut ends => return Ok(ended?.into_inner()),
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        vm = match client.get_vm(of_it.clone()).await {
            Ok(found) => found.into_inner(),
            Err(status) if status.code() == Code::NotFound => return Ok(ends.await?.into_inner()),
            Err(status) => return Err(status.into()),
        };
    }
    Ok(vm)
}

/// Whether nothing is left of one that waited and has failed: it never ran, and has no console.
async fn is_gone(client: &mut Client, vm: &Vm) -> Result<bool, CliError> {
    match client.get_vm(GetVmRequest { vm: vm.id.clone() }).await {
        Err(status) if status.code() == Code::NotFound => Ok(true),
        found => Ok(found.map(|_| false)?),
    }
}

/// Why a VM waits, but for the figures of other use and load, which change all the time. Its place is the first one and stays.
fn without_figures(message: &str) -> String {
    let (place, why) = message.split_once(':').unwrap_or((message, ""));
    let words = why.chars().filter(|c| !c.is_ascii_digit() && *c != '.');
    place.chars().chain(words).collect()
}

async fn follow(context: &Context, client: &mut Client, vm: &Vm) -> Result<Vm, CliError> {
    let request = StreamLogsRequest {
        vm: vm.id.clone(),
        follow: true,
        from_offset: 0,
    };
    let mut stream = client.stream_logs(request).await?.into_inner();
    while let Some(chunk) = stream.message().await? {
        if context.output.is_json() {
            context.output.raw_to_stderr(&chunk.data);
        } else {
            context.output.raw(&chunk.data)?;
        }
    }
    Ok(client
        .wait_vm(GetVmRequest { vm: vm.id.clone() })
        .await?
        .into_inner())
}

fn finish(context: &Context, vm: &Vm) -> Result<ExitCode, CliError> {
    if context.output.is_json() {
        context.output.show(&VmView::from(vm), |_| String::new())?;
    }
    if let (VmPhase::Exited, Some(status)) = (vm.phase(), vm.exit_status) {
        // A status is one byte on the guest's side; what does not fit must not look like success.
        return Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)));
    }
    context.output.note(&format!("error: {}", no_status(vm)));
    Ok(ExitCode::FAILURE)
}

/// How a VM ended that says nothing of its workload.
fn no_status(vm: &Vm) -> String {
    let Vm { name, message, .. } = vm;
    match (vm.phase(), message.as_str()) {
        (VmPhase::Exited, "") => format!("{name} ended without an exit status"),
        (VmPhase::Exited, how) => format!("{name} ended without an exit status: {how}"),
        (phase, why) => format!("{name} is {}: {why}", vm_state(phase)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_told_again_when_its_place_or_its_reason_changes() {
        let told = |message: &str| without_figures(message);
        let at =
            "place 2 in the queue: nothing fits: node1: 2 vCPUs declared there, load 1.93, and 1 vCPUs more";
        assert_eq!(told(at), told(&at.replace("1.93", "2.01")));
        assert_ne!(told(at), told(&at.replace("place 2", "place 1")));
        assert_ne!(
            told(at),
            told(&at.replace("nothing fits", "others are before it"))
        );
        assert_ne!(told("place 1 in the queue"), told("place 2 in the queue"));
    }
}
