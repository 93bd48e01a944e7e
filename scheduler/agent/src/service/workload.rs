//! A workload's spec as it comes from the scheduler, checked as far as the agent uses it; the VMM checks the rest.

use std::path::Path;

use shoal_proto::node::{Blob, WorkloadSpec};
use shoal_proto::vm::{MemoryBacking, VmSpec};
use shoal_proto::{MigrationId, VmName};

use super::Refusal;
use crate::blobs::BlobId;
use crate::key::VmKey;
use crate::runtime_dir::VmRecord;

/// A checked [`WorkloadSpec`].
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) key: VmKey,
    name: VmName,
    spec: WorkloadSpec,
}

impl Workload {
    pub(super) fn parse(spec: Option<WorkloadSpec>) -> Result<Self, Refusal> {
        let spec = spec.ok_or(Refusal::Missing("spec"))?;
        let key = VmKey::parse(&spec.vm_id, spec.epoch)?;
        let name = spec.name.parse()?;
        Ok(Self { key, name, spec })
    }

    pub(super) fn kernel(&self) -> Result<BlobId, Refusal> {
        let kernel = self.spec.kernel.as_ref().ok_or(Refusal::Missing("kernel"))?;
        Ok(BlobId::parse("kernel", kernel)?)
    }

    pub(super) fn initrd(&self) -> Result<Option<BlobId>, Refusal> {
        let parse = |initrd: &Blob| BlobId::parse("initrd", initrd);
        Ok(self.spec.initrd.as_ref().map(parse).transpose()?)
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

    /// The VMM's spec; a VM that is loaded by a migration needs no files.
    pub(super) fn vm_spec(
        self,
        memory_backing: MemoryBacking,
        kernel: Option<&Path>,
        initrd: Option<&Path>,
    ) -> VmSpec {
        let text = |path: Option<&Path>| {
            path.map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        VmSpec {
            vm_id: self.key.id.to_string(),
            name: self.name.to_string(),
            epoch: self.key.epoch.0,
            cpus: self.spec.cpus,
            memory_bytes: self.spec.memory_bytes,
            kernel_path: text(kernel),
            initrd_path: text(initrd),
            cmdline: self.spec.cmdline,
            cmdline_software_kvm: self.spec.cmdline_software_kvm,
            memory_backing: memory_backing.into(),
            cpu_baseline: self.spec.cpu_baseline,
            console_offset: self.spec.console_offset,
        }
    }
}
