//! Pause and resume in place, and what becomes of a VM that is paused when it migrates: real guests, and destinations that
//! are real, older than this, or leave in the middle.

use std::path::PathBuf;
use std::time::Instant;

use shoal_proto::VmId;
use shoal_proto::vm::{MigrationResult, OnStall, Verify};

use super::*;
use crate::migration::policy::Policy;
use crate::migration::transport::{Listener, Transport};
use crate::migration::wire::{Connection, Empty, FrameKind, Hello, HelloAck, Role, Step, WireError};

/// Writes to a page and to the serial port for ever: `inc qword [0x200000]; mov dx, 0x3f8; out dx, al` and back.
const TALKER: [u8; 15] = [
    0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf1,
];
/// The same on two CPUs: the first writes `A`s, the other `B`s, from real mode.
const TALKER_OF_TWO: [u8; 52] = [
    // mov rax, imm64; mov edi, 0x8000; mov [rdi], rax. The number is the second's code: mov al, 'B'; mov dx, 0x3f8; out dx, al; jmp
    // back to out
    0x48, 0xb8, 0xb0, 0x42, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd, 0xbf, 0x00, 0x80, 0x00, 0x00, 0x48, 0x89,
    0x07,
    // mov ebx, 0xfee00300, the local APIC's command register; INIT, then "start at 0x8000", to all but this CPU
    0xbb, 0x00, 0x03, 0xe0, 0xfe, 0xc7, 0x03, 0x00, 0x45, 0x0c, 0x00, 0xc7, 0x03, 0x08, 0x46, 0x0c, 0x00,
    // mov al, 'A'; mov dx, 0x3f8; inc qword [0x200000]; out dx, al and back to inc
    0xb0, 0x41, 0x66, 0xba, 0xf8, 0x03, 0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xee, 0xeb, 0xf5,
];
const CODE_AT: u64 = 0x10_0000;
const MEMORY: u64 = 8 << 20;
const TOKEN: &str = "a secret";
const PATIENCE: Duration = Duration::from_secs(60);

/// An ELF file for x86-64 with one segment, which is the code.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Executable, x86-64, version 1; the entry; the program headers, and no section headers.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([CODE_AT, 64, 0].map(u64::to_le_bytes).concat());
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // To be loaded; read, write, execute; its offset, addresses, sizes and alignment.
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let length = code.len() as u64;
    file.extend(
        [HEADERS, CODE_AT, CODE_AT, length, length, 8]
            .map(u64::to_le_bytes)
            .concat(),
    );
    file.extend(code);
    file
}

/// One VMM's owner, in this process.
struct Owner {
    handle: ControlHandle,
    runtime: tokio::runtime::Runtime,
}

impl Owner {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread();
        Self {
            handle: start(ControlConfig::default()).expect("a thread"),
            runtime: { runtime }.build().expect("a runtime"),
        }
    }

    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ControlError> {
        self.runtime.block_on(self.handle.ask(command))
    }

    fn state(&self) -> VmState {
        self.handle.status().borrow().state()
    }

    fn written(&self) -> u64 {
        self.handle.console().end()
    }

    fn pause(&self, epoch: u64) -> Result<VmStatus, ControlError> {
        self.ask(|reply| Command::Pause(Epoch(epoch), reply))
    }

    fn resume(&self, epoch: u64) -> Result<VmStatus, ControlError> {
        self.ask(|reply| Command::Resume(Epoch(epoch), reply))
    }

    fn until_it_runs(&self) {
        let before = self.written();
        until("the guest to run", || self.written() > before);
    }

    /// The report of the migration under way, at its end.
    fn report(&self) -> shoal_proto::vm::MigrationReport {
        let progress = self.handle.progress();
        let report = || progress.borrow().as_ref().and_then(|last| last.report.clone());
        until("the migration to end", || report().is_some());
        report().expect("it has ended")
    }
}

/// Waits for what must come.
fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !happened() {
        assert!(Instant::now() < deadline, "waited a minute for {what}");
        std::thread::yield_now();
    }
}

/// A VM at epoch 1 that talks, and the directory of its kernel. `None` where a test may do without KVM.
fn talker(backing: MemoryBacking) -> Option<(Owner, VmSpec, tempfile::TempDir)> {
    let booted = guest(&TALKER, 1, backing)?;
    booted.0.until_it_runs();
    Some(booted)
}

/// The same with a guest that is no more than `code`, in ring 0 of each CPU.
fn guest(code: &[u8], cpus: u32, backing: MemoryBacking) -> Option<(Owner, VmSpec, tempfile::TempDir)> {
    if let Err(error) = build::open_kvm() {
        assert!(std::env::var_os("SHOAL_SKIP_KVM").is_some(), "{error}");
        eprintln!("skipped without KVM: {error}");
        return None;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let kernel = directory.path().join("talker");
    std::fs::write(&kernel, elf(code)).expect("written");
    let spec = VmSpec {
        vm_id: VmId::new(),
        name: "talker".to_owned(),
        epoch: Epoch(1),
        cpus,
        memory_bytes: MEMORY,
        kernel,
        initrd: None,
        cmdline: String::new(),
        memory_backing: backing,
        cpu_baseline: shoal_cpuid::Table::default(),
        console_offset: 0,
    };
    let owner = Owner::start();
    let booted = owner.ask(|reply| Command::Boot(Box::new(spec.clone()), reply));
    assert_eq!(booted.expect("booted").state(), VmState::Running);
    Some((owner, spec, directory))
}

fn outgoing(id: MigrationId, destination: Address, policy: Policy) -> Outgoing {
    Outgoing {
        migration_id: id,
        token: TOKEN.to_owned(),
        destination,
        destination_epoch: Epoch(2),
        policy,
        identity: None,
        paused: false,
    }
}

fn migrate(from: &Owner, id: MigrationId, to: Address, policy: Policy) -> Result<(), ControlError> {
    from.ask(|reply| Command::StartMigration(Box::new(outgoing(id, to, policy)), reply))
}

/// Makes it the destination, at epoch 2. Answers where it listens.
fn prepare(
    destination: &Owner,
    spec: VmSpec,
    id: MigrationId,
    listen: Address,
) -> Result<Address, ControlError> {
    let incoming = IncomingRequest {
        prepared: Prepared {
            spec: VmSpec {
                epoch: Epoch(2),
                kernel: PathBuf::new(),
                ..spec
            },
            migration_id: id,
            token: TOKEN.to_owned(),
        },
        listen,
        commit_timeout: PATIENCE,
        accept_timeout: PATIENCE,
        identity: None,
    };
    destination.ask(|reply| Command::PrepareIncoming(Box::new(incoming), reply))
}

fn anywhere() -> Address {
    Address::Tcp(([127, 0, 0, 1], 0).into())
}

/// `mov dx, 0x6f8; mov esi, text; mov ecx, length; rep outsb`, then `then`, then the text.
fn last_words(text: &str, then: &[u8]) -> Vec<u8> {
    const BEFORE: u64 = 16;
    let length = u32::try_from(text.len()).expect("short");
    let at = u32::try_from(CODE_AT + BEFORE + then.len() as u64).expect("low");
    let mut code = vec![0x66, 0xba, 0xf8, 0x06, 0xbe];
    code.extend(at.to_le_bytes());
    code.push(0xb9);
    code.extend(length.to_le_bytes());
    code.extend([0xf3, 0x6e]);
    assert_eq!(code.len() as u64, BEFORE);
    code.extend(then);
    code.extend(text.as_bytes());
    code
}

/// How a guest that is `code` has failed. `None` where a test may do without KVM.
fn failure(code: &[u8]) -> Option<String> {
    let (owner, ..) = guest(code, 1, MemoryBacking::Anonymous)?;
    until("the guest to end", || owner.state() != VmState::Running);
    assert_eq!(owner.state(), VmState::Failed);
    Some(owner.handle.status().borrow().status_message.clone())
}

#[test]
fn a_guest_that_says_why_it_fails_has_failed() {
    const JUMP_TO_ITSELF: [u8; 2] = [0xeb, 0xfe];
    const TRIPLE_FAULT: [u8; 2] = [0x0f, 0x0b];
    let Some(failed) = failure(&last_words("no\x1broot\nand more", &JUMP_TO_ITSELF)) else {
        return;
    };
    assert_eq!(failed, "the guest says: no\\x1broot");
    let failed = failure(&last_words("it begins", &TRIPLE_FAULT)).expect("KVM is here");
    assert_eq!(failed, "the guest says: it begins");
}

/// Where KVM has hardware virtualization there is nothing that it cannot emulate in these few bytes.
#[test]
fn what_software_kvm_cannot_emulate_ends_the_vm_and_is_named() {
    const POPCNT: [u8; 4] = [0xf3, 0x0f, 0xb8, 0xc3];
    if !build::open_kvm().is_ok_and(|kvm| crate::arch::selftest::is_software_kvm(&kvm)) {
        return;
    }
    let failed = failure(&POPCNT).expect("KVM is here");
    let named = "KVM could not emulate popcnt ([f3, 0f, b8, c3]) at 0x100000 in ring 0; the guest needs";
    assert!(failed.starts_with(named), "{failed}");
}

#[test]
fn a_paused_vm_stands_still_until_it_is_resumed() {
    let Some((vm, ..)) = talker(MemoryBacking::Anonymous) else {
        return;
    };
    assert!(matches!(vm.pause(2), Err(ControlError::Epoch { .. })));
    vm.until_it_runs();
    assert_eq!(vm.pause(1).expect("paused").state(), VmState::Paused);
    let at = vm.written();
    assert_eq!(vm.pause(1).expect("it is so already").state(), VmState::Paused);
    let input = vm.ask(|reply| Command::ConsoleInput(b"x".to_vec(), reply));
    assert!(matches!(input, Err(ControlError::WrongState { .. })));
    let sample = vm.ask(Command::BeginSample);
    assert!(matches!(sample, Err(ControlError::WrongState { .. })));
    assert!(matches!(vm.resume(2), Err(ControlError::Epoch { .. })));
    assert_eq!((vm.state(), vm.written()), (VmState::Paused, at));

    assert_eq!(vm.resume(1).expect("resumed").state(), VmState::Running);
    vm.until_it_runs();
    assert!(matches!(vm.resume(1), Err(ControlError::WrongState { .. })));
    vm.pause(1).expect("paused again");
    let stopped = vm.ask(Command::Stop).expect("stopped");
    assert_eq!(stopped.state(), VmState::Exited);
    assert!(matches!(vm.pause(1), Err(ControlError::WrongState { .. })));
}

/// Over TCP by every policy that treats a guest that runs in its own way, and within a host without a copy.
#[test]
fn a_paused_vm_migrates_and_is_paused_there() {
    let policy = |on_stall, verify| Policy {
        on_stall,
        verify,
        // Less than any link has: a guest that ran would be stalled, throttled or run there first.
        max_downtime: Duration::from_nanos(1),
        ..Policy::default()
    };
    let socket = tempfile::tempdir().expect("a temporary directory");
    let unix = Address::Unix(socket.path().join("migration.sock"));
    for (backing, to, policy) in [
        (
            MemoryBacking::Anonymous,
            anywhere(),
            policy(OnStall::Cancel, Verify::Full),
        ),
        (
            MemoryBacking::Anonymous,
            anywhere(),
            policy(OnStall::PostCopy, Verify::Off),
        ),
        (
            MemoryBacking::Anonymous,
            anywhere(),
            policy(OnStall::Force, Verify::Off),
        ),
        (
            MemoryBacking::Shared,
            unix,
            policy(OnStall::Throttle, Verify::Off),
        ),
    ] {
        let Some((source, spec, _kernel)) = talker(backing) else {
            return;
        };
        let handed_over = matches!(to, Address::Unix(_));
        let (destination, id) = (Owner::start(), MigrationId::new());
        let address = prepare(&destination, spec, id, to);
        source.pause(1).expect("paused");
        let at = source.written();
        migrate(&source, id, address.expect("it listens"), policy).expect("started");
        let report = source.report();
        assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
        assert_eq!((report.paused, report.downtime_us), (true, 0), "{report:?}");
        assert_eq!((report.handed_over, report.post_copy), (handed_over, false));
        let came = |state| state != VmState::Incoming;
        until("the destination to say so", || came(destination.state()));
        assert_eq!(
            (source.state(), destination.state()),
            (VmState::Migrated, VmState::Paused)
        );
        assert!(source.resume(1).is_err() && destination.resume(1).is_err());
        assert_eq!(
            destination.written(),
            at,
            "it came with its console, and is silent"
        );

        // Away once more, so that what came paused is known to be so.
        let nobody = Listener::bind(&anywhere())
            .expect("a port")
            .local_address()
            .clone();
        let onward = Outgoing {
            destination_epoch: Epoch(3),
            ..outgoing(MigrationId::new(), nobody, Policy::default())
        };
        let started = destination.ask(|reply| Command::StartMigration(Box::new(onward), reply));
        started.expect("started");
        assert_eq!(destination.report().result(), MigrationResult::Failed);
        assert_eq!(
            (destination.state(), destination.written()),
            (VmState::Paused, at)
        );
        destination.resume(2).expect("resumed");
        destination.until_it_runs();
    }
}

/// The second CPU is in real mode, waits for nothing and uses no memory but its code.
#[test]
fn both_cpus_of_a_vm_run_before_and_after_it_migrates() {
    let Some((source, spec, _kernel)) = guest(&TALKER_OF_TWO, 2, MemoryBacking::Anonymous) else {
        return;
    };
    let both_talk = |owner: &Owner| {
        let from = owner.written();
        until("both CPUs to write", || {
            let new = owner.handle.console().read(from, 1 << 20).data;
            new.contains(&b'A') && new.contains(&b'B')
        });
    };
    both_talk(&source);
    let (destination, id) = (Owner::start(), MigrationId::new());
    let address = prepare(&destination, spec, id, anywhere()).expect("it listens");
    migrate(&source, id, address, Policy::default()).expect("started");
    let report = source.report();
    assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
    until("the VM to run there", || destination.state() == VmState::Running);
    both_talk(&destination);
}

/// What the destination of a migration sees of Hello, and the connection.
struct Met {
    hello: Hello,
    control: Connection<Transport>,
}

impl Met {
    fn accept(listener: &Listener) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let (transport, _) = listener.accept(None, deadline).expect("a source");
        transport.set_timeouts(Some(PATIENCE)).expect("a socket");
        let mut control = Connection::new(transport);
        assert_eq!(
            control.receive_preamble().expect("a preamble").role,
            Role::Control
        );
        let hello = control.expect(FrameKind::Hello, "Hello").expect("Hello");
        Self { hello, control }
    }

    fn answer(&mut self, paused: bool) {
        let ack = HelloAck {
            version: 2,
            post_copy: false,
            paused,
        };
        self.control.send(FrameKind::HelloAck, &ack).expect("sent");
    }
}

/// Pauses a VM, has it migrate to a destination that does this, and gives its owner back.
fn to_a_destination_that(
    backing: MemoryBacking,
    at: &Address,
    does: impl FnOnce(Met) + Send,
) -> Option<(Owner, shoal_proto::vm::MigrationReport, u64)> {
    let (source, _, _kernel) = talker(backing)?;
    source.pause(1).expect("paused");
    let written = source.written();
    let listener = Listener::bind(at).expect("a port");
    let to = listener.local_address().clone();
    let report = std::thread::scope(|scope| {
        let destination = scope.spawn(|| does(Met::accept(&listener)));
        migrate(&source, MigrationId::new(), to, Policy::default()).expect("started");
        let report = source.report();
        destination.join().expect("no panic");
        report
    });
    Some((source, report, written))
}

#[test]
fn a_destination_that_would_run_a_paused_vm_gets_nothing_of_it() {
    let older = |mut met: Met| {
        assert!(met.hello.paused);
        met.answer(false);
        let refused: Result<Empty, _> = met.control.expect(FrameKind::PassEnd, "nothing");
        let WireError::Aborted(why) = refused.expect_err("no page comes") else {
            panic!("it must be told why");
        };
        assert!(why.contains("would run it"), "{why}");
    };
    let Some((vm, report, at)) = to_a_destination_that(MemoryBacking::Anonymous, &anywhere(), older) else {
        return;
    };
    assert_eq!(report.result(), MigrationResult::Failed);
    assert!(report.reason.contains("update its node"), "{report:?}");
    assert_eq!((vm.state(), vm.written()), (VmState::Paused, at));
}

#[test]
fn a_vm_is_paused_again_when_its_migration_fails() {
    let leaves = |mut met: Met| met.answer(true);
    let Some((vm, report, at)) = to_a_destination_that(MemoryBacking::Anonymous, &anywhere(), leaves) else {
        return;
    };
    assert_eq!(report.result(), MigrationResult::Failed, "{report:?}");
    assert_eq!((vm.state(), vm.written()), (VmState::Paused, at));
    vm.resume(1).expect("resumed");
    vm.until_it_runs();
}

#[test]
fn a_vm_in_doubt_that_was_paused_is_paused_before_it_is_resumed() {
    let leaves_with_commit = |mut met: Met| {
        let _memory = met.control.stream_mut().receive_descriptor().expect("memory");
        met.answer(true);
        let (kind, _) = met.control.receive().expect("the state");
        assert_eq!(kind, FrameKind::State);
        let step = Step {
            migration_id: met.hello.migration_id.clone(),
        };
        met.control.send(FrameKind::Ready, &step).expect("sent");
        let _: Step = met.control.expect(FrameKind::Commit, "Commit").expect("Commit");
    };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = Address::Unix(directory.path().join("migration.sock"));
    let Some((vm, report, at)) = to_a_destination_that(MemoryBacking::Shared, &at, leaves_with_commit) else {
        return;
    };
    assert_eq!(report.result(), MigrationResult::InDoubt, "{report:?}");
    assert_eq!((vm.state(), vm.written()), (VmState::InDoubt, at));
    assert_eq!(vm.resume(1).expect("as before").state(), VmState::Paused);
    assert_eq!(vm.written(), at);
    assert_eq!(vm.resume(1).expect("resumed").state(), VmState::Running);
    vm.until_it_runs();
}
