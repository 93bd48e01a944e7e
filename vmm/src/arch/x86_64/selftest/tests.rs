use shoal_cpuid::Table;

use super::*;
use crate::arch::msr::GuestMsrs;

/// A test's KVM. `None` where a test may do without.
fn kvm() -> Option<Kvm> {
    match crate::build::open_kvm() {
        Ok(kvm) => Some(kvm),
        Err(error) if std::env::var_os("SHOAL_SKIP_KVM").is_some() => {
            eprintln!("skipped without KVM: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

type Change = fn(&GuestMemory) -> Result<(), GuestMemoryError>;

/// What the self-test says of a KVM that it finds with `change` as it is without.
fn found(change: Change) -> Option<SelfTest> {
    Some(run_changed(&kvm()?, change).expect("a VM"))
}

fn overwrite_stub(memory: &GuestMemory, vector: u64, code: &[u8]) -> Result<(), GuestMemoryError> {
    let stub = read_header(memory)?.stubs + vector * STUB_SIZE;
    memory.mmap().write_slice(code, GuestAddress(LOAD + stub))
}

#[test]
fn this_kvm_has_what_a_kernel_in_ring_3_needs() {
    let Some(kvm) = kvm() else { return };
    let found = run(&kvm).expect("a VM");
    assert_eq!(found.ring3_kernel, Ok(()));
    let arrives = match found.kind {
        KvmKind::Software => 3,
        KvmKind::Hardware => 0,
    };
    assert_eq!(found.syscall_ring, Some(arrives));
    assert_eq!(is_software_kvm(&kvm), found.kind == KvmKind::Software);
}

/// Each takes from the guest what its KVM is to give, and the self-test says which check that fails.
#[test]
fn what_fails_is_named() {
    let cases: [(&str, &str, Change); 4] = [
        ("CPUID in ring 0", "another result than expected", |memory| {
            let mut header = read_header(memory)?;
            header.brand[15] ^= 1;
            memory.mmap().write_slice(header.as_bytes(), GuestAddress(LOAD))
        }),
        ("INT 4 to a service", "a triple fault", |memory| {
            // Neither a gate for it nor one for what follows of that.
            memory.mmap().write_slice(&[0; 16 * 32], GuestAddress(IDT))
        }),
        (
            "an interrupt in ring 3, from",
            "exception 14 at 0xffffffff800",
            |memory| memory.mmap().write_obj(0u64, GuestAddress(PAGE_DIRECTORY + 16)),
        ),
        ("an interrupt in ring 3, from", "no end after 2s", |memory| {
            overwrite_stub(memory, 0x30, &[0xeb, 0xfe]) // jmp to itself
        }),
    ];
    for (check, how, change) in cases {
        let Some(found) = found(change) else { return };
        let said = found.ring3_kernel.expect_err(check);
        assert!(said.starts_with(check) && said.contains(how), "{said}");
    }
}

#[test]
fn what_software_kvm_cannot_emulate_is_named() {
    let Some(found) = found(|memory| overwrite_stub(memory, 0x30, &[0xf3, 0x0f, 0xb8, 0xc3])) else {
        return;
    };
    let said = found.ring3_kernel.expect_err("popcnt in place of a stub");
    if found.kind == KvmKind::Software {
        assert!(
            said.contains("KVM could not emulate popcnt ([f3, 0f, b8, c3]) at"),
            "{said}"
        );
        assert!(said.contains("in ring 0"), "{said}");
    }
}

/// What ring 3 begins with, and in its place: ask for a service again and again, and end when one has not answered.
const RING3_START: [u8; 5] = [0x8c, 0xc8, 0x83, 0xf8, 0x33];
const SERVICES_FOR_EVER: [u8; 21] = [
    0x31, 0xc0, // xor eax, eax (SERVICE_RING)
    0xcd, 0x04, // int 4
    0x83, 0xf8, 0x10, // cmp eax, KERNEL_CODE
    0x74, 0xf7, // je to the start
    0xbf, 0x01, 0x00, 0x00, 0x00, // mov edi, END_MISMATCH
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, SERVICE_END
    0xcd, 0x04, // int 4
];

/// The self-test's vCPU with this code in ring 3.
fn in_ring3(kvm: &Kvm, code: &[u8]) -> (GuestMemory, VmFd, VcpuFd) {
    let memory = GuestMemory::new(crate::spec::MIN_MEMORY).expect("memory");
    let header = write_guest(&memory).expect("it fits");
    let mut places = image().windows(RING3_START.len()).enumerate();
    let (at, _) = places.find(|(_, code)| *code == RING3_START).expect("there");
    let at = GuestAddress(LOAD + u64::try_from(at).expect("small"));
    memory.mmap().write_slice(code, at).expect("it fits");
    let vm = kvm.create_vm().expect("a VM");
    let fd = make_vcpu(kvm, &vm, &memory).expect("a vCPU");
    let regs = kvm_regs {
        rip: linear(header.after_popcnt),
        rsp: linear(header.ring0_stack_end),
        rflags: 2,
        ..Default::default()
    };
    fd.set_regs(&regs).expect("registers");
    (memory, vm, fd)
}

/// Runs it for so long; says how it ended, if it did.
fn run_for(fd: &mut VcpuFd, limit: Duration) -> Result<Option<String>, VcpuError> {
    vcpu::run_at_most(fd, limit, |exit| Some(format!("{exit:?}")))
}

const MOMENT: Duration = Duration::from_micros(50);

/// KVM_GET_VCPU_EVENTS is silent of exceptions that INT raises, and there is a KVM that has gone past the INT by then.
#[test]
fn no_exception_is_lost_when_a_vcpu_is_saved() {
    const SAVES: usize = 500;
    let Some(kvm) = kvm() else { return };
    let (memory, _vm, mut fd) = in_ring3(&kvm, &SERVICES_FOR_EVER);
    let no_msrs = GuestMsrs::new(&fd, &Table::default(), &[]).expect("none");
    for save in 0..SAVES {
        let limit = Duration::from_micros(200 + u64::try_from(save % 100).expect("small"));
        assert_eq!(
            run_for(&mut fd, limit).expect("it runs"),
            None,
            "after {save} saves"
        );
        let end = vcpu::settle(&mut fd, memory.mmap(), |fd| run_for(fd, MOMENT)).expect("it runs");
        assert_eq!(end, None, "after {save} saves");
        let state = vcpu::save(&fd, &no_msrs, 0).expect("saved");
        vcpu::restore(&fd, &state, &[], || 0).expect("restored");
    }
}

/// A program that waits right behind an INT looks for ever as if its exception were under way.
#[test]
fn a_program_that_waits_behind_an_int_does_not_hold_up_a_pause() {
    const WAIT_BEHIND_INT: [u8; 6] = [
        0x31, 0xc0, // xor eax, eax (SERVICE_RING)
        0xcd, 0x04, // int 4
        0xeb, 0xfe, // jmp to itself
    ];
    let Some(kvm) = kvm() else { return };
    let (memory, _vm, mut fd) = in_ring3(&kvm, &WAIT_BEHIND_INT);
    assert_eq!(run_for(&mut fd, 1000 * MOMENT).expect("it runs"), None);
    let mut tries = 0;
    let end = vcpu::settle(&mut fd, memory.mmap(), |fd| {
        tries += 1;
        run_for(fd, MOMENT)
    });
    assert_eq!(end.expect("it runs"), None);
    assert!(tries <= 20, "{tries}");
}
