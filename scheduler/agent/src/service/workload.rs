//! A workload's spec as it comes from the scheduler, checked as far as the agent uses it; the VMM checks the rest.

use std::path::PathBuf;

use shoal_proto::node::WorkloadSpec;
use shoal_proto::vm::{MemoryBacking, VmSpec};
use shoal_proto::{MigrationId, VmName};

use super::Refusal;
use crate::blobs::BlobId;
use crate::key::VmKey;
use crate::kvm::{HostKvm, KvmKind};
use crate::runtime_dir::VmRecord;

/// A checked [`WorkloadSpec`].
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) key: VmKey,
    name: VmName,
    spec: WorkloadSpec,
}

/// What a VM boots on this host.
#[derive(Debug)]
pub(super) struct Boot {
    pub(super) kernel: BlobId,
    pub(super) initrd: Option<BlobId>,
    /// In full.
    pub(super) cmdline: String,
}

/// The same, with the files that are here.
#[derive(Debug, Default)]
pub(super) struct BootFiles {
    pub(super) kernel: PathBuf,
    pub(super) initrd: Option<PathBuf>,
    pub(super) cmdline: String,
}

/// Why a VM cannot boot with the KVM of this host.
#[derive(Debug, thiserror::Error)]
pub(super) enum KernelError {
    #[error("KVM cannot be used on this node: {0}")]
    NoKvm(String),
    #[error("{}", match .0 {
        KvmKind::Hardware => "KVM has hardware virtualization here, and the image has no kernel for that (kernel in image.toml)",
        KvmKind::Software => "KVM has no hardware virtualization here, and the image has no kernel for that ([software_kvm] kernel in image.toml)",
    })]
    Missing(KvmKind),
    #[error("KVM of this node cannot run a kernel in ring 3: {0}")]
    NoRing3(String),
    #[error(
        "cpus: the image runs with {most} where KVM has no hardware virtualization, as here; the VM asks for {cpus}"
    )]
    Cpus { cpus: u32, most: u32 },
}

impl Workload {
    pub(super) fn parse(spec: Option<WorkloadSpec>) -> Result<Self, Refusal> {
        let spec = spec.ok_or(Refusal::Missing("spec"))?;
        let key = VmKey::parse(&spec.vm_id, spec.epoch)?;
        let name = spec.name.parse()?;
        Ok(Self { key, name, spec })
    }

    /// What it boots with the KVM of this host.
    pub(super) fn boot(&self, kvm: &HostKvm) -> Result<Boot, Refusal> {
        let (spec, cpus) = (&self.spec, self.spec.cpus);
        let kind = kvm.kind.ok_or_else(|| KernelError::NoKvm(kvm.trouble.clone()))?;
        let software = spec.software_kvm.as_ref().filter(|_| kind == KvmKind::Software);
        let own = software.and_then(|software| Some(("software_kvm.kernel", software.kernel.as_ref()?)));
        if own.is_some() && !kvm.trouble.is_empty() {
            return Err(KernelError::NoRing3(kvm.trouble.clone()).into());
        }
        let most = software
            .map(|software| software.max_cpus)
            .filter(|most| *most > 0);
        if let Some(most) = most.filter(|most| cpus > *most) {
            return Err(KernelError::Cpus { cpus, most }.into());
        }
        let other = || Some(("kernel", spec.kernel.as_ref()?));
        let (field, kernel) = own.or_else(other).ok_or(KernelError::Missing(kind))?;
        let initrd = spec.initrd.as_ref().map(|initrd| BlobId::parse("initrd", initrd));
        Ok(Boot {
            kernel: BlobId::parse(field, kernel)?,
            initrd: initrd.transpose()?,
            cmdline: with_options(
                &spec.cmdline,
                software.map_or("", |software| software.cmdline.as_str()),
            ),
        })
    }

    /// What stays on disk beside the VMM.
    pub(super) fn record(&self, incoming_migration: Option<MigrationId>) -> VmRecord {
        VmRecord {
            name: self.name.clone(),
            cpus: self.spec.cpus,
            memory_bytes: self.spec.memory_bytes,
            incoming_migration,
        }
    }

    /// The VMM's spec; a VM that is loaded by a migration boots nothing.
    pub(super) fn vm_spec(self, memory_backing: MemoryBacking, boot: Option<BootFiles>) -> VmSpec {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let boot = boot.unwrap_or_default();
        VmSpec {
            vm_id: self.key.id.to_string(),
            name: self.name.to_string(),
            epoch: self.key.epoch.0,
            cpus: self.spec.cpus,
            memory_bytes: self.spec.memory_bytes,
            kernel_path: text(boot.kernel),
            initrd_path: boot.initrd.map(text).unwrap_or_default(),
            cmdline: boot.cmdline,
            memory_backing: memory_backing.into(),
            cpu_baseline: self.spec.cpu_baseline,
            console_offset: self.spec.console_offset,
        }
    }
}

/// Adds options for the kernel. What follows the word `--` belongs to init, so they go before it.
fn with_options(cmdline: &str, options: &str) -> String {
    let options = options.trim();
    if options.is_empty() {
        return cmdline.to_owned();
    }
    match format!(" {cmdline} ").find(" -- ") {
        Some(dashes) => {
            let (kernel, init) = cmdline.split_at(dashes);
            format!("{kernel}{options} {init}")
        }
        None => format!("{cmdline} {options}").trim_start().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use shoal_proto::node::{Blob, SoftwareKvm};

    use super::*;

    fn blob(digit: &str) -> Blob {
        Blob {
            sha256: digit.repeat(64),
            size_bytes: 1,
        }
    }

    /// Of an image with two kernels: `a` for hardware, `b` for software KVM.
    fn workload(change: impl FnOnce(&mut WorkloadSpec, &mut SoftwareKvm)) -> Workload {
        let mut spec = WorkloadSpec {
            vm_id: shoal_proto::VmId::new().to_string(),
            name: "web".into(),
            epoch: 1,
            cpus: 1,
            kernel: Some(blob("a")),
            cmdline: "quiet -- sh".into(),
            ..WorkloadSpec::default()
        };
        let mut software = SoftwareKvm {
            kernel: Some(blob("b")),
            cmdline: "noapic".into(),
            max_cpus: 1,
        };
        change(&mut spec, &mut software);
        if software != SoftwareKvm::default() {
            spec.software_kvm = Some(software);
        }
        Workload::parse(Some(spec)).expect("a workload")
    }

    fn host(kind: Option<KvmKind>, trouble: &str) -> HostKvm {
        HostKvm {
            kind,
            trouble: trouble.to_owned(),
        }
    }

    /// Which kernel, and the command line.
    fn chosen(workload: &Workload, host: &HostKvm) -> Result<(&'static str, String), String> {
        let boot = workload.boot(host).map_err(|refusal| refusal.to_string())?;
        let named = ["a", "b"].into_iter().find(|digit| {
            let blob = BlobId::parse("kernel", &blob(digit)).expect("a digest");
            blob == boot.kernel
        });
        Ok((named.expect("one of the two"), boot.cmdline))
    }

    #[test]
    fn kernel_and_command_line_follow_the_kind_of_kvm() {
        let hardware = host(Some(KvmKind::Hardware), "");
        let software = host(Some(KvmKind::Software), "");
        let both = workload(|_, _| ());
        assert_eq!(chosen(&both, &hardware), Ok(("a", "quiet -- sh".into())));
        assert_eq!(chosen(&both, &software), Ok(("b", "quiet noapic -- sh".into())));
        let options_only = workload(|_, software| software.kernel = None);
        assert_eq!(
            chosen(&options_only, &software),
            Ok(("a", "quiet noapic -- sh".into()))
        );
        let plain = workload(|_, software| *software = SoftwareKvm::default());
        for host in [&hardware, &software] {
            assert_eq!(chosen(&plain, host), Ok(("a", "quiet -- sh".into())));
        }
        let wide = workload(|spec, _| spec.cpus = 2);
        assert!(chosen(&wide, &hardware).is_ok());
    }

    #[test]
    fn what_cannot_run_here_is_refused_in_words() {
        let software = host(Some(KvmKind::Software), "");
        let only_software = workload(|spec, _| spec.kernel = None);
        let refused = chosen(&only_software, &host(Some(KvmKind::Hardware), "")).expect_err("no kernel");
        assert!(
            refused.contains("KVM has hardware virtualization here, and the image has no kernel"),
            "{refused}"
        );
        let only_hardware = workload(|spec, software| (spec.kernel, software.kernel) = (None, None));
        let refused = chosen(&only_hardware, &software).expect_err("no kernel");
        assert!(
            refused.contains("KVM has no hardware virtualization here"),
            "{refused}"
        );
        let wide = workload(|spec, _| spec.cpus = 2);
        let refused = chosen(&wide, &software).expect_err("one CPU");
        assert!(refused.starts_with("cpus: the image runs with 1"), "{refused}");
        let both = workload(|_, _| ());
        let refused = chosen(&both, &host(Some(KvmKind::Software), "no luck")).expect_err("not in ring 3");
        assert!(refused.ends_with("no luck"), "{refused}");
        let refused = chosen(&both, &host(None, "no /dev/kvm")).expect_err("no KVM");
        assert!(refused.ends_with("no /dev/kvm"), "{refused}");
        let hostile = workload(|_, software| software.kernel = Some(blob("../")));
        let refused = chosen(&hostile, &software).expect_err("no digest");
        assert!(refused.starts_with("software_kvm.kernel.sha256: "), "{refused}");
    }

    #[test]
    fn options_go_before_the_arguments_of_init() {
        for (cmdline, whole) in [
            ("quiet -- sh -- x", "quiet noapic -- sh -- x"),
            ("quiet", "quiet noapic"),
            ("", "noapic"),
            ("-- sh", "noapic -- sh"),
            (" -- sh", " noapic -- sh"),
            ("quiet --", "quiet noapic --"),
            ("a--b", "a--b noapic"),
        ] {
            assert_eq!(with_options(cmdline, " noapic "), whole);
            assert_eq!(with_options(cmdline, " "), cmdline);
        }
    }
}
