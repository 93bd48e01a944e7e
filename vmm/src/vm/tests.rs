//! State that KVM keeps, over a save and a restore into another VM.

use std::collections::BTreeMap;

use super::*;
use crate::build;

const MEMORY: u64 = 8 << 20;

/// `None` where a test may do without KVM.
pub(crate) fn kvm() -> Option<Kvm> {
    match build::open_kvm() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            assert!(std::env::var_os("SHOAL_SKIP_KVM").is_some(), "{error}");
            eprintln!("skipped without KVM: {error}");
            None
        }
    }
}

/// A VM that has never run.
pub(crate) fn new_vm(kvm: &Kvm, cpus: u32, platform: Option<Platform>) -> Vm {
    vcpu::install_kick_handler().expect("a signal handler");
    let hooks = VmHooks {
        console: Arc::new(Console::new(false)),
        guest_gap: Arc::new(GuestGap::default()),
        ended: Box::new(|_| ()),
    };
    let memory = GuestMemory::new(MEMORY).expect("memory");
    Vm::new(kvm, memory, cpus, platform, hooks).expect("a VM")
}

fn values(vcpu: &Vcpu, indices: &[u32]) -> BTreeMap<u32, u64> {
    let read = msr::read(&vcpu.fd(), indices).expect("read");
    read.iter().map(|entry| (entry.index, entry.data)).collect()
}

/// Gives an MSR another value than it has, if it takes one.
fn change(vcpu: &Vcpu, index: u32) -> Option<u64> {
    let old = *values(vcpu, &[index]).get(&index)?;
    // An MTRR's types, a canonical address that is aligned, a single bit, all of them, none.
    let tried = [0x0606_0606_0606_0606, 0x0010_3000, 0xc06, 0x40, 1, u64::MAX, 0];
    tried.into_iter().filter(|&value| value != old).find(|&value| {
        let refused = msr::write(&vcpu.fd(), [(index, value)]).expect("asked");
        refused.is_none() && values(vcpu, &[index]).get(&index) == Some(&value)
    })
}

/// As a guest can write them, and some that only KVM's owner can.
#[test]
fn every_msr_that_can_be_written_is_what_it_was_after_a_move() {
    /// What goes on by itself, or happens when it is written.
    const ALIVE: [u32; 2] = [msr::TSC, msr::TSC_DEADLINE];
    const AMONG_THEM: [u32; 9] = [
        0x174,
        0x1a0,
        0x200,
        0x20f,
        0x26f,
        0x2ff,
        0x402,
        0x47f,
        0xc000_0082,
    ];
    let Some(kvm) = kvm() else { return };
    let source = new_vm(&kvm, 2, None);
    let (cpu, known) = (
        cpuid::to_table(&source.platform().cpuid),
        &source.platform().msr_indices,
    );
    let all = [
        shoal_cpuid::needed_msrs(&cpu, known),
        shoal_cpuid::optional_msrs(&cpu, known),
    ];
    let all = all.concat();
    let mut changed: Vec<BTreeMap<u32, u64>> = vec![];
    for vcpu in source.vcpus() {
        let dead = all.iter().filter(|index| !ALIVE.contains(index));
        let of_vcpu: BTreeMap<u32, u64> = dead
            .filter_map(|&index| change(vcpu, index).map(|value| (index, value)))
            .collect();
        // Some change others: what counts is what they all are at the end.
        let indices: Vec<u32> = of_vcpu.keys().copied().collect();
        changed.push(values(vcpu, &indices));
        for index in AMONG_THEM {
            assert!(of_vcpu.contains_key(&index), "{index:#x} of {of_vcpu:x?}");
        }
    }
    let saved = source.save().expect("saved");
    let destination = new_vm(&kvm, 2, Some(source.platform().clone()));
    destination.restore(&saved, Instant::now()).expect("restored");
    for (vcpu, changed) in destination.vcpus().iter().zip(&changed) {
        let indices: Vec<u32> = changed.keys().copied().collect();
        assert_eq!(values(vcpu, &indices), *changed, "vCPU {}", vcpu.id());
    }
}

#[test]
fn an_msr_that_the_guest_does_not_have_is_saved_only_if_it_was_changed() {
    /// Of pages that are not there: KVM knows it whatever the guest's CPUID says.
    const ASYNC_PF_EN: u32 = 0x4b56_4d02;
    const KVM_FEATURES: u32 = 0x4000_0001;
    let Some(kvm) = kvm() else { return };
    let mut platform = Platform::of_host(&kvm, 1).expect("a platform");
    for entry in &mut platform.cpuid {
        if entry.function == KVM_FEATURES {
            entry.eax = 0;
        }
    }
    assert!(platform.msr_indices.contains(&ASYNC_PF_EN));
    let source = new_vm(&kvm, 1, Some(platform.clone()));
    let saved_msr = |vm: &Vm| {
        let saved = vm.save().expect("saved");
        let reader = state::Reader::parse(&saved).expect("state");
        let vcpu: state::VcpuState = reader.section(Kind::Vcpu, 0).expect("a vCPU");
        let found = vcpu.msrs.iter().find(|msr| msr.index == ASYNC_PF_EN);
        found.map(|msr| msr.data)
    };
    assert_eq!(saved_msr(&source), None);
    let value = change(source.boot_vcpu(), ASYNC_PF_EN).expect("it can be written");
    assert_eq!(saved_msr(&source), Some(value));

    let saved = source.save().expect("saved");
    platform.msr_indices.retain(|&index| index != ASYNC_PF_EN);
    let lesser = new_vm(&kvm, 1, Some(platform));
    let refused = lesser
        .restore(&saved, Instant::now())
        .expect_err("not known there");
    assert_eq!(
        refused.to_string(),
        "vCPU 0: MSR 0x4b564d02 (KVM_ASYNC_PF_EN): this host's KVM does not know it, or it is there twice"
    );
}

#[test]
fn clocks_are_saved_as_of_one_moment_however_long_the_saving_takes() {
    const LONG: Duration = Duration::from_millis(100);
    let Some(kvm) = kvm() else { return };
    let vm = new_vm(&kvm, 1, None);
    let (_, at) = vm.clock().expect("a clock");
    let at_clock = || {
        let (tsc, read_at) = vcpu::read_tsc(&vm.boot_vcpu().fd()).expect("a TSC");
        vm.tsc_at(at, tsc, read_at)
    };
    let soon = at_clock();
    std::thread::sleep(LONG);
    let late = at_clock();
    assert!(late.abs_diff(soon) < vm.ticks_in(LONG) / 10, "{soon} and {late}");
}

#[test]
fn a_guest_keeps_its_frequency_on_a_host_that_is_a_little_faster_or_slower() {
    let Some(kvm) = kvm() else { return };
    let host = Platform::of_host(&kvm, 1).expect("a platform");
    for tsc_khz in [
        host.tsc_khz - host.tsc_khz / 5000,
        host.tsc_khz + host.tsc_khz / 5000,
    ] {
        let platform = Platform {
            tsc_khz,
            ..host.clone()
        };
        let vm = new_vm(&kvm, 1, Some(platform));
        assert_eq!(vcpu::read_tsc_khz(&vm.boot_vcpu().fd()), tsc_khz);
        assert_eq!(vm.platform().tsc_khz, tsc_khz);
    }
}
