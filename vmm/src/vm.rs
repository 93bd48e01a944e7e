//! One VM: its memory, vCPUs, interrupt controllers and devices, and what can be done to all of them at once.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::arch::msr::GuestMsrs;
use crate::arch::{cpuid, layout, msr};
use crate::console::Console;
use crate::devices::{DeviceError, Devices, GuestGap};
use crate::dirty;
use crate::memory::{GuestMemory, MemoryError};
use crate::state::{self, ClockState, IrqChipState, Kind, PitState, StateError, from_bytes, to_bytes};
use crate::vcpu::{self, Brake, GuestEnd, Vcpu, VcpuContext, VcpuError, VcpuStateError};

const IRQCHIP_IDS: std::ops::Range<u32> = 0..3;
const NS_PER_MS: u64 = 1_000_000;

/// Why a VM could not be made, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// /dev/kvm cannot be opened.
    #[error("/dev/kvm: {0}; is KVM enabled, and may this user open it?")]
    NoKvm(kvm_ioctls::Error),
    /// A KVM call failed.
    #[error("{ioctl}: {source}")]
    Ioctl {
        /// The call.
        ioctl: &'static str,
        /// Its error.
        source: kvm_ioctls::Error,
    },
    /// The CPUID table is too long for KVM.
    #[error("CPUID table: {0}")]
    Cpuid(vmm_sys_util::fam::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Devices.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A vCPU thread.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A vCPU's state.
    #[error("vCPU {id}: {source}")]
    VcpuState {
        /// Which.
        id: u32,
        /// Why.
        source: VcpuStateError,
    },
    /// It was to be saved, and runs.
    #[error("vCPU {0} runs, so its state cannot be saved; pause the VM first")]
    NotPaused(u32),
    /// Saved state that cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
}

fn call<T>(ioctl: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, VmError> {
    result.map_err(|source| VmError::Ioctl { ioctl, source })
}

/// What the guest sees of CPU and time, agreed on before a migration and equal on both sides; and what this host keeps of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Platform {
    /// CPUID, without what differs between vCPUs.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// TSC frequency that the guest was told when it booted, kHz.
    pub tsc_khz: u32,
    /// MSRs that this host's KVM saves and restores, whoever has them.
    pub msr_indices: Vec<u32>,
}

impl Platform {
    /// What this host's KVM offers a VM of `cpus` CPUs.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn of_host(kvm: &Kvm, cpus: u32) -> Result<Self, VmError> {
        let vm = call("KVM_CREATE_VM", kvm.create_vm())?;
        // KVM tells the TSC frequency per vCPU only, so this makes one and throws it away.
        let vcpu = call("KVM_CREATE_VCPU", vm.create_vcpu(0))?;
        Self::of_vcpu(kvm, cpus, &vcpu)
    }

    fn of_vcpu(kvm: &Kvm, cpus: u32, vcpu: &VcpuFd) -> Result<Self, VmError> {
        let tsc_khz = vcpu::read_tsc_khz(vcpu);
        let cpuid = call("KVM_GET_SUPPORTED_CPUID", cpuid::supported(kvm, cpus, tsc_khz))?;
        set_cpuid(vcpu, &cpuid, 0)?;
        let msr_indices = call("KVM_GET_MSR_INDEX_LIST", msr::saved_indices(kvm, vcpu))?;
        Ok(Self {
            cpuid,
            tsc_khz,
            msr_indices,
        })
    }
}

fn set_cpuid(vcpu: &VcpuFd, entries: &[kvm_cpuid_entry2], id: u32) -> Result<(), VmError> {
    let table = cpuid::to_kvm(&cpuid::for_vcpu(entries, id)).map_err(VmError::Cpuid)?;
    call("KVM_SET_CPUID2", vcpu.set_cpuid2(&table))
}

/// What connects a VM to the process around it.
pub struct VmHooks {
    /// Where console output goes.
    pub console: Arc<Console>,
    /// What the guest says of the time it missed.
    pub guest_gap: Arc<GuestGap>,
    /// Told once, by a vCPU thread, when the guest ends.
    pub ended: Box<dyn Fn(GuestEnd) + Send + Sync>,
}

impl std::fmt::Debug for VmHooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmHooks").finish_non_exhaustive()
    }
}

/// A built VM. All vCPUs are parked until [`Vm::resume`].
///
/// Fields drop in order: vCPU threads first, then the VM descriptor, then the memory that KVM maps.
#[derive(Debug)]
pub struct Vm {
    vcpus: Vec<Vcpu>,
    /// Of each vCPU, those that are saved.
    msrs: Vec<GuestMsrs>,
    fd: VmFd,
    devices: Arc<Devices>,
    memory: GuestMemory,
    console: Arc<Console>,
    platform: Platform,
    end: Arc<Mutex<Option<GuestEnd>>>,
    manual_dirty_protect: bool,
}

impl Vm {
    /// Builds a VM with `memory` and one vCPU thread per CPU, all parked, registers as after reset. `platform` is that of
    /// the source of a migration; without, the VM gets what this host offers.
    ///
    /// # Errors
    /// The first step that KVM or the host refuses.
    pub fn new(
        kvm: &Kvm,
        memory: GuestMemory,
        cpus: u32,
        platform: Option<Platform>,
        hooks: VmHooks,
    ) -> Result<Self, VmError> {
        let VmHooks {
            console,
            guest_gap,
            ended,
        } = hooks;
        let fd = call("KVM_CREATE_VM", kvm.create_vm())?;
        call("KVM_SET_TSS_ADDR", fd.set_tss_address(layout::KVM_TSS))?;
        call(
            "KVM_SET_IDENTITY_MAP_ADDR",
            fd.set_identity_map_address(layout::KVM_IDENTITY_MAP),
        )?;
        call("KVM_CREATE_IRQCHIP", fd.create_irq_chip())?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        call("KVM_CREATE_PIT2", fd.create_pit2(pit))?;
        let manual_dirty_protect = call(
            "KVM_ENABLE_CAP(dirty log)",
            dirty::enable_manual_protect(kvm, &fd),
        )?;
        memory.register(&fd, false)?;
        let devices = Arc::new(Devices::new(&fd, Arc::clone(&console), guest_gap)?);

        let end = Arc::new(Mutex::new(None));
        let first_end = Arc::clone(&end);
        let context = Arc::new(VcpuContext {
            devices: Arc::clone(&devices),
            memory: memory.mmap().clone(),
            ended: Box::new(move |_, how| {
                let mut first = first_end.lock().unwrap_or_else(PoisonError::into_inner);
                if first.is_none() {
                    *first = Some(how.clone());
                    drop(first);
                    ended(how);
                }
            }),
        });
        let boot_vcpu = call("KVM_CREATE_VCPU", fd.create_vcpu(0))?;
        let platform = platform.map_or_else(|| Platform::of_vcpu(kvm, cpus, &boot_vcpu), Ok)?;
        let mut boot_vcpu = Some(boot_vcpu);
        let table = cpuid::to_table(&platform.cpuid);
        let (mut vcpus, mut msrs) = (vec![], vec![]);
        for id in 0..cpus {
            let vcpu = boot_vcpu
                .take()
                .map_or_else(|| call("KVM_CREATE_VCPU", fd.create_vcpu(u64::from(id))), Ok)?;
            set_cpuid(&vcpu, &platform.cpuid, id)?;
            if vcpu::read_tsc_khz(&vcpu) != platform.tsc_khz {
                call("KVM_SET_TSC_KHZ", vcpu.set_tsc_khz(platform.tsc_khz))?;
            }
            let saved = GuestMsrs::new(&vcpu, &table, &platform.msr_indices);
            msrs.push(call("KVM_GET_MSRS", saved)?);
            vcpus.push(Vcpu::spawn(id, vcpu, Arc::clone(&context))?);
        }
        for vcpu in &vcpus {
            vcpu.wait_parked();
        }
        Ok(Self {
            vcpus,
            msrs,
            fd,
            devices,
            memory,
            console,
            platform,
            end,
            manual_dirty_protect,
        })
    }

    /// Lets every vCPU run.
    pub fn resume(&self) {
        for vcpu in &self.vcpus {
            vcpu.run();
        }
    }

    /// Stops every vCPU and returns when none runs guest code, or somebody has resumed the VM meanwhile. Port I/O in flight is
    /// complete.
    pub fn pause(&self) {
        self.pause_after(|| ());
    }

    /// As [`Vm::pause`]; `let_go` ends what may hold a vCPU that has been asked to stop, as a wait for memory does.
    pub fn pause_after(&self, let_go: impl FnOnce()) {
        for vcpu in &self.vcpus {
            vcpu.request_park();
        }
        let_go();
        for vcpu in &self.vcpus {
            vcpu.wait_parked();
        }
    }

    /// What holds each vCPU back, for [`crate::throttle`].
    #[must_use]
    pub fn brakes(&self) -> Vec<Brake> {
        self.vcpus.iter().map(Vcpu::brake).collect()
    }

    /// How the guest ended, if it has.
    #[must_use]
    pub fn guest_end(&self) -> Option<GuestEnd> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The KVM VM.
    #[must_use]
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The boot CPU.
    #[must_use]
    pub fn boot_vcpu(&self) -> &Vcpu {
        &self.vcpus[0]
    }

    /// vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        u32::try_from(self.vcpus.len()).expect("at most MAX_CPUS")
    }

    /// All of them.
    #[must_use]
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// Devices.
    #[must_use]
    pub fn devices(&self) -> &Arc<Devices> {
        &self.devices
    }

    /// Console output.
    #[must_use]
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// What the guest sees of CPU and time.
    #[must_use]
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Whether write protection waits for explicit clears (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    #[must_use]
    pub fn manual_dirty_protect(&self) -> bool {
        self.manual_dirty_protect
    }

    /// Saves all but memory. vCPUs must be paused.
    ///
    /// # Errors
    /// The part that could not be read, or the vCPU that runs.
    pub fn save(&self) -> Result<Vec<u8>, VmError> {
        let (clock, at) = self.clock()?;
        let mut writer = state::Writer::new();
        for chip_id in IRQCHIP_IDS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            call("KVM_GET_IRQCHIP", self.fd.get_irqchip(&mut chip))?;
            writer.section(
                Kind::IrqChip,
                chip_id,
                &IrqChipState {
                    chip: to_bytes(&chip),
                },
            );
        }
        let pit = call("KVM_GET_PIT2", self.fd.get_pit2())?;
        writer.section(Kind::Pit, 0, &PitState { pit: to_bytes(&pit) });
        // After the I/O APIC: an interrupt that passes from one to the other in between is in the local APIC's state.
        for (vcpu, msrs) in self.vcpus.iter().zip(&self.msrs) {
            let id = vcpu.id();
            // Not waited for: whoever let it run again may be waiting for the thread that saves.
            let fd = vcpu.fd_if_parked().ok_or(VmError::NotPaused(id))?;
            let saved = vcpu::read_tsc(&fd)
                .and_then(|(tsc, read_at)| vcpu::save(&fd, msrs, self.tsc_at(at, tsc, read_at)))
                .map_err(|source| VmError::VcpuState { id, source })?;
            writer.section(Kind::Vcpu, id, &saved);
        }
        writer.section(Kind::Clock, 0, &clock);
        self.devices.save(&mut writer);
        Ok(writer.finish())
    }

    /// Loads what [`Vm::save`] gave, into a VM built with the same platform and memory. Guest clocks are advanced by the
    /// time since the save, as the two hosts' real-time clocks tell it, at most by the time since `last_running`, when the
    /// guest still ran, and never set back.
    ///
    /// # Errors
    /// The section that is missing or malformed, or the KVM call that failed.
    pub fn restore(&self, saved: &[u8], last_running: Instant) -> Result<(), VmError> {
        let reader = state::Reader::parse(saved)?;
        let pit: PitState = reader.section(Kind::Pit, 0)?;
        call(
            "KVM_SET_PIT2",
            self.fd.set_pit2(&from_bytes(Kind::Pit, "pit", &pit.pit)?),
        )?;
        for chip_id in IRQCHIP_IDS {
            let chip: IrqChipState = reader.section(Kind::IrqChip, chip_id)?;
            call(
                "KVM_SET_IRQCHIP",
                self.fd
                    .set_irqchip(&from_bytes(Kind::IrqChip, "chip", &chip.chip)?),
            )?;
        }
        let clock: ClockState = reader.section(Kind::Clock, 0)?;
        let longest_ns = u64::try_from(last_running.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let (now_ns, now) = (realtime_now_ns(), Instant::now());
        let away_ns = now_ns.saturating_sub(clock.realtime_ns).min(longest_ns);
        self.set_clock(clock.kvmclock_ns, away_ns, now_ns)?;
        if reader.count(Kind::Vcpu) != self.vcpus.len() {
            let why = format!(
                "{} vCPUs in the state of a VM of {}",
                reader.count(Kind::Vcpu),
                self.vcpus.len()
            );
            let kind = Kind::Vcpu;
            return Err(StateError::Malformed { kind, why }.into());
        }
        let state_error = |vcpu: &Vcpu| {
            let id = vcpu.id();
            move |source| VmError::VcpuState { id, source }
        };
        if let Some(first) = self.vcpus.first() {
            vcpu::forget_tsc(&first.fd()).map_err(state_error(first))?;
        }
        for vcpu in &self.vcpus {
            let saved: state::VcpuState = reader.section(Kind::Vcpu, vcpu.id())?;
            let ticks = || self.ticks_in(Duration::from_nanos(away_ns) + now.elapsed());
            vcpu::restore(&vcpu.fd(), &saved, &self.platform.msr_indices, ticks)
                .map_err(state_error(vcpu))?;
        }
        // Last: a device that still asks for its interrupt raises the line again, which must reach restored controllers.
        self.devices.restore(&reader)?;
        Ok(())
    }
}

impl Vm {
    /// The clocks now, and when that is. KVM tells its own real time with its clock where the host's clock is the TSC;
    /// elsewhere it is taken before anything else is done, or a guest would lose that time in every move.
    fn clock(&self) -> Result<(ClockState, Instant), VmError> {
        let before = Instant::now();
        let clock = call("KVM_GET_CLOCK", self.fd.get_clock())?;
        let at = before + before.elapsed() / 2;
        let realtime_ns = if clock.flags & KVM_CLOCK_REALTIME != 0 {
            clock.realtime
        } else {
            realtime_now_ns()
        };
        let clock = ClockState {
            kvmclock_ns: clock.clock,
            realtime_ns,
            tsc_khz: self.platform.tsc_khz,
        };
        Ok((clock, at))
    }

    /// What a TSC showed at a time shortly before it was read: all clocks are saved as of one moment, so that they do not
    /// part a little further with every move.
    fn tsc_at(&self, at: Instant, tsc: u64, read_at: Instant) -> u64 {
        tsc.wrapping_sub(self.ticks_in(read_at.saturating_duration_since(at)))
    }

    /// Sets kvmclock to what it was, advanced by `away_ns`, counted at `now_ns`. Where KVM can, it adds the time until the
    /// clock is set as well.
    fn set_clock(&self, kvmclock_ns: u64, away_ns: u64, now_ns: u64) -> Result<(), VmError> {
        let known = u32::try_from(self.fd.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        let advanced = if known & KVM_CLOCK_REALTIME != 0 {
            kvm_clock_data {
                clock: kvmclock_ns,
                realtime: now_ns.saturating_sub(away_ns),
                flags: KVM_CLOCK_REALTIME,
                ..Default::default()
            }
        } else {
            kvm_clock_data {
                clock: kvmclock_ns.saturating_add(away_ns),
                ..Default::default()
            }
        };
        call("KVM_SET_CLOCK", self.fd.set_clock(&advanced))
    }

    /// Of the guest's TSC.
    fn ticks_in(&self, time: Duration) -> u64 {
        let ticks = time.as_nanos() * u128::from(self.platform.tsc_khz) / u128::from(NS_PER_MS);
        u64::try_from(ticks).unwrap_or(0)
    }
}

fn realtime_now_ns() -> u64 {
    let since_epoch = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests;
