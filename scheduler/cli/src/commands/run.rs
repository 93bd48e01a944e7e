//! `shoal run IMAGE`

use std::process::ExitCode;

use clap::Args;
use shoal_proto::cluster::{GetVmRequest, RemoveVmRequest, RunVmRequest, StreamLogsRequest, Vm, VmPhase};

use crate::client::{Client, Context, until_interrupted};
use crate::error::CliError;
use crate::format::parse_size;
use crate::ring3;
use crate::rule_args::RuleArgs;
use crate::view::{VmView, vm_state};

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
    /// On this node; otherwise where it fits best.
    #[arg(long)]
    pub node: Option<String>,
    /// The lower, the sooner it gives way to others; 5 unless said.
    #[arg(long, value_name = "0..9", value_parser = clap::value_parser!(u32).range(0..=9))]
    pub priority: Option<u32>,
    /// Wait if it fits nowhere, or others wait; `shoal queue` shows who waits and why.
    #[arg(long)]
    pub queue: bool,
    /// It may be stopped for one of higher priority that fits nowhere; then it waits in the queue, and begins anew.
    #[arg(long)]
    pub preemptible: bool,
    #[command(flatten)]
    rules: RuleArgs,
    /// Return when it runs, instead of showing its console until it ends. With `-o json` the console goes to stderr: stdout has the VM
    /// as one JSON value.
    #[arg(long, short)]
    pub detach: bool,
    /// Remove the VM and its log when it has ended.
    #[arg(long, conflicts_with_all = ["detach", "queue"])]
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
    let vm = client.run_vm(request(args)).await?.into_inner();
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
        rules: Some(args.rules.rules()),
        priority: args.priority,
        queue: args.queue,
        preemptible: args.preemptible,
        labels: args.rules.labels,
        args: args.args,
    }
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
