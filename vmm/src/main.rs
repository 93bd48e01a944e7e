//! `shoal-vmm`: one process, one microVM. Normally started by the agent, which passes it a listening Unix socket as
//! standard input; can be run by hand as well.

use std::os::fd::FromRawFd as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;
use shoal_cpuid::Table;
use shoal_proto::vm::vmm_server::VmmServer;
use shoal_proto::vm::{MemoryBacking, VmState, VmStatus};
use shoal_proto::{Epoch, VmId};
use shoal_vmm::api::{self, Api};
use shoal_vmm::arch::selftest::{self, KvmKind};
use shoal_vmm::arch::{boot, cpuid};
use shoal_vmm::build::open_kvm;
use shoal_vmm::control::{self, ControlConfig};
use shoal_vmm::fault;
use shoal_vmm::ran_mark::RanMark;
use shoal_vmm::spec::VmSpec;
use shoal_vmm::vm::Platform;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;

const USAGE: &str = "\
usage: shoal-vmm --api-fd N                     serve the VMM API on an inherited listening Unix socket
       shoal-vmm --api-socket PATH              serve it on a new one
       shoal-vmm --kernel PATH [--initrd PATH] [--cmdline TEXT] [--memory SIZE] [--cpus N]
                 [--api-socket PATH]
                                                boot a VM with its console on standard output; exits with the
                                                status that the workload reports
       shoal-vmm check-image --kernel PATH [--initrd PATH]
                                                say whether an image can be booted; needs no KVM
       shoal-vmm --self-test                    say, as one line of JSON, how this host's KVM runs guests: kvm is
                                                software or hardware, ring3_kernel whether kernels that run in
                                                ring 3 can run here, reason why
       shoal-vmm --allow-faults ...             obey SHOAL_FAULT=POINT=ACTION[,...], which makes migrations fail: for
                                                tests of Shoal itself
       shoal-vmm --version                      print its version
       shoal-vmm print-cpuid                    print the CPUID table that guests get here, as one line of hex
       shoal-vmm print-msrs                     print the MSRs that are saved and restored here, as one line of hex numbers
The API is proto/vm.proto. Logs go to standard error; SHOAL_LOG=debug shows more.";

const LOG_LEVEL: &str = "SHOAL_LOG";
const RAN_MARK: &str = "ran";
const FAILED: u8 = 1;
const USAGE_ERROR: u8 = 2;

#[derive(Default)]
struct Options {
    check_image: bool,
    print_cpuid: bool,
    print_msrs: bool,
    self_test: bool,
    allow_faults: bool,
    api_fd: Option<i32>,
    api_socket: Option<PathBuf>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: String,
    memory_bytes: u64,
    cpus: u32,
}

/// What was asked for.
enum Asked {
    Run(Options),
    Say(String),
}

fn parse() -> Result<Asked, lexopt::Error> {
    let mut options = Options {
        memory_bytes: 128 << 20,
        cpus: 1,
        ..Default::default()
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Value(word) if word == "check-image" => options.check_image = true,
            Value(word) if word == "print-cpuid" => options.print_cpuid = true,
            Value(word) if word == "print-msrs" => options.print_msrs = true,
            Long("self-test") => options.self_test = true,
            Long("allow-faults") => options.allow_faults = true,
            Long("api-fd") => options.api_fd = Some(parser.value()?.parse()?),
            Long("api-socket") => options.api_socket = Some(parser.value()?.into()),
            Long("kernel") => options.kernel = Some(parser.value()?.into()),
            Long("initrd") => options.initrd = Some(parser.value()?.into()),
            Long("cmdline") => options.cmdline = parser.value()?.string()?,
            Long("memory") => options.memory_bytes = parser.value()?.parse::<bytesize::ByteSize>()?.as_u64(),
            Long("cpus") => options.cpus = parser.value()?.parse()?,
            Short('h') | Long("help") => return Ok(Asked::Say(USAGE.to_owned())),
            Short('V') | Long("version") => {
                return Ok(Asked::Say(format!("shoal-vmm {}", env!("CARGO_PKG_VERSION"))));
            }
            other => return Err(other.unexpected()),
        }
    }
    Ok(Asked::Run(options))
}

fn main() -> ExitCode {
    // A level, not a filter language: that would cost every VM its compiled expressions.
    let level = std::env::var(LOG_LEVEL)
        .ok()
        .and_then(|level| level.parse().ok())
        .unwrap_or(tracing::Level::INFO);
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // A line that cannot be written is lost. To complain of it on stderr, which is where it went, would panic.
        .log_internal_errors(false)
        .init();
    let options = match parse() {
        Ok(Asked::Run(options)) => options,
        Ok(Asked::Say(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(USAGE_ERROR, &format!("{error}\n{USAGE}")),
    };
    if let Err(error) = fault::arm_from_environment(options.allow_faults) {
        return fail(USAGE_ERROR, &error.to_string());
    }
    let result = if options.check_image {
        check_image(&options)
    } else if options.print_cpuid {
        print_cpuid()
    } else if options.print_msrs {
        print_msrs()
    } else if options.self_test {
        self_test()
    } else {
        run(options)
    };
    result.unwrap_or_else(|error| fail(FAILED, &error.to_string()))
}

fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("shoal-vmm: {message}");
    ExitCode::from(code)
}

type AnyError = Box<dyn std::error::Error>;

fn check_image(options: &Options) -> Result<ExitCode, AnyError> {
    let kernel = options
        .kernel
        .as_deref()
        .ok_or("check-image needs --kernel PATH")?;
    boot::check_image(kernel, options.initrd.as_deref())?;
    Ok(ExitCode::SUCCESS)
}

fn print_cpuid() -> Result<ExitCode, AnyError> {
    let table = cpuid::supported(&open_kvm()?, 1, 0)?;
    let hex: String = cpuid::to_table(&table)
        .to_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    println!("{hex}");
    Ok(ExitCode::SUCCESS)
}

fn print_msrs() -> Result<ExitCode, AnyError> {
    let msrs = Platform::of_host(&open_kvm()?, 1)?.msr_indices;
    let words: Vec<String> = msrs.iter().map(|msr| format!("{msr:x}")).collect();
    println!("{}", words.join(" "));
    Ok(ExitCode::SUCCESS)
}

fn self_test() -> Result<ExitCode, AnyError> {
    let found = selftest::run(&open_kvm()?)?;
    let reason = match (&found.ring3_kernel, found.syscall_ring) {
        (Ok(()), ring) => format!("all checks passed; SYSCALL arrives in ring {}", ring.unwrap_or(0)),
        (Err(reason), _) => reason.clone(),
    };
    let answer = serde_json::json!({
        "kvm": match found.kind {
            KvmKind::Hardware => "hardware",
            KvmKind::Software => "software",
        },
        "ring3_kernel": found.ring3_kernel.is_ok(),
        "reason": reason,
    });
    println!("{answer}");
    Ok(ExitCode::SUCCESS)
}

fn listener(options: &Options) -> Result<Option<UnixListener>, AnyError> {
    let listener = match (options.api_fd, &options.api_socket) {
        // SAFETY: whoever started this process says that it passed an open listening socket under this number and has
        // given it away; nothing else here uses it. Another kind of descriptor fails at the first accept.
        (Some(fd), _) => unsafe { UnixListener::from_raw_fd(fd) },
        (None, Some(path)) => {
            UnixListener::bind(path).map_err(|error| format!("--api-socket {}: {error}", path.display()))?
        }
        (None, None) => return Ok(None),
    };
    listener.set_nonblocking(true)?;
    Ok(Some(listener))
}

fn run(options: Options) -> Result<ExitCode, AnyError> {
    let listener = listener(&options)?;
    let spec = options.kernel.map(|kernel| VmSpec {
        vm_id: VmId::new(),
        name: "by-hand".into(),
        epoch: Epoch(1),
        cpus: options.cpus,
        memory_bytes: options.memory_bytes,
        kernel,
        initrd: options.initrd,
        cmdline: options.cmdline,
        memory_backing: MemoryBacking::Auto,
        cpu_baseline: Table::default(),
        console_offset: 0,
    });
    if listener.is_none() && spec.is_none() {
        return Ok(fail(USAGE_ERROR, &format!("nothing to do\n{USAGE}")));
    }
    let config = ControlConfig {
        ran_mark: RanMark::at(options.api_fd.map(|_| RAN_MARK.into())),
        mirror_console: spec.is_some(),
    };
    let control = control::start(config)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async move {
            let by_hand = spec.is_some();
            if let Some(spec) = spec {
                spec.check()?;
                api::boot(&control, spec).await?;
            }
            let (quit, quit_asked) = watch::channel(false);
            let serve = async {
                let Some(listener) = listener else {
                    return std::future::pending().await;
                };
                let incoming = UnixListenerStream::new(tokio::net::UnixListener::from_std(listener)?);
                let service = VmmServer::new(Api::new(control.clone(), quit));
                let server = tonic::transport::Server::builder().add_service(service);
                server
                    .serve_with_incoming_shutdown(incoming, api::quit_requested(quit_asked.clone()))
                    .await?;
                Ok::<_, AnyError>(ExitCode::SUCCESS)
            };
            let mut status = control.status();
            let ended = async {
                let over = |state| matches!(state, VmState::Exited | VmState::Failed | VmState::Migrated);
                let last = status
                    .wait_for(|status| by_hand && over(status.state()))
                    .await?
                    .clone();
                Ok(ExitCode::from(by_hand_status(&last)))
            };
            tokio::select! {
                result = serve => result,
                result = ended => result,
                () = api::quit_requested(quit_asked.clone()) => Ok(ExitCode::SUCCESS),
            }
        })
}

/// The exit status of a VMM that was started by hand, when its VM is over. A VM that reported none was no success.
fn by_hand_status(last: &VmStatus) -> u8 {
    match (last.state(), last.exit_status) {
        (VmState::Migrated, _) => 0,
        (VmState::Exited, Some(status)) => u8::try_from(status).unwrap_or(u8::MAX),
        (VmState::Exited, None) => {
            tracing::error!(how = %last.status_message, "the VM ended without an exit status");
            FAILED
        }
        _ => {
            tracing::error!(reason = %last.status_message, "the VM failed");
            FAILED
        }
    }
}
