//! What is shown of migrations and their policies.

use serde::Serialize;
use shoal_proto::{cluster, vm};

use crate::format;
use crate::page::Page;

/// A migration, for `migrate`, `migrations`, `inspect`, `rebalance` and `upgrade`.
#[derive(Debug, Serialize)]
pub struct MigrationView {
    /// UUID.
    pub id: String,
    /// Which VM, by name.
    pub vm: String,
    /// Which VM, by id.
    pub vm_id: String,
    /// Source node.
    pub from: String,
    /// Destination node.
    pub to: String,
    /// completed, failed, cancelled, in-doubt; running if it has not ended, waiting if it has not begun.
    pub result: &'static str,
    /// Why it ended as it did, or has not begun; if there is nothing to say, why it was asked for.
    pub reason: String,
    /// Why it was asked for.
    pub requested_because: String,
    /// vCPU stop to vCPU run.
    pub downtime_ms: f64,
    /// Part of it: stopping the vCPUs.
    pub downtime_stop_ms: f64,
    /// Part of it: the last pages.
    pub downtime_pages_ms: f64,
    /// Part of it: CPU and device state.
    pub downtime_state_ms: f64,
    /// Part of it: commit and start.
    pub downtime_start_ms: f64,
    /// First byte to done.
    pub total_ms: f64,
    /// Over memory, the last one included.
    pub passes: u32,
    /// On the wire.
    pub bytes_sent: u64,
    /// With their content.
    pub pages_sent: u64,
    /// As runs of zeros.
    pub zero_pages: u64,
    /// The destination's.
    pub epoch: u64,
    /// When it began.
    pub started: String,
    /// When it began, in RFC 3339.
    pub started_at: String,
    /// For pages.
    pub connections: u32,
    /// The connections were encrypted.
    pub tls: bool,
    /// Memory went by file descriptor, within the host.
    pub handed_over: bool,
    /// The VM was suspended all the time, so that it had no downtime.
    pub suspended: bool,
    /// Sent compressed.
    pub compressed_pages: u64,
    /// What that saved.
    pub compression_saved_bytes: u64,
    /// Sent as the difference to what was sent before.
    pub delta_pages: u64,
    /// What that saved.
    pub delta_saved_bytes: u64,
    /// Written while they were sent, and sent again.
    pub resent_pages: u64,
    /// The most of its vCPU time that was taken from the guest.
    pub max_throttle_percent: u32,
    /// vCPU time taken from the guest.
    pub throttled_ms: f64,
    /// What was compared and equal: off, sampled, full.
    pub verified: &'static str,
    /// Part of the pause.
    pub verify_ms: f64,
    /// It ran at the destination before all of its memory was there.
    pub post_copy: bool,
    /// For how long.
    pub post_copy_ms: f64,
    /// Pages that came in that time.
    pub post_copy_pages: u64,
    /// Pages that the guest waited for.
    pub faults: u64,
    /// Longest wait.
    pub worst_fault_ms: f64,
    /// Mean wait.
    pub mean_fault_ms: f64,
    /// Connections lost and made again in post-copy.
    pub recoveries: u32,
    /// Longest time in which the guest saw no time pass, where it says so.
    pub guest_gap_ms: Option<f64>,
    /// How it was to go, as it held at the end.
    pub policy: Option<PolicyView>,
    /// What its VMM held it to, as it was last: of its own cap, or of one that it shared. 0: to none.
    pub bandwidth_taken_bytes_per_second: Option<u64>,
    /// How far it is, while it runs.
    pub progress: Option<ProgressView>,
}

impl From<&cluster::Migration> for MigrationView {
    fn from(migration: &cluster::Migration) -> Self {
        let report = migration.report.clone().unwrap_or_default();
        let started = format::time(migration.started_unix_ms);
        let by_vmm = report
            .policy
            .or_else(|| migration.progress.as_ref().and_then(|now| now.policy));
        Self {
            id: migration.id.clone(),
            vm: if migration.vm_name.is_empty() {
                migration.vm.clone()
            } else {
                migration.vm_name.clone()
            },
            vm_id: migration.vm.clone(),
            from: migration.from_node.clone(),
            to: migration.to_node.clone(),
            result: match migration_result(migration.report.as_ref()) {
                "running" if !migration.waits.is_empty() => "waiting",
                result => result,
            },
            requested_because: migration.reason.clone(),
            downtime_ms: format::milliseconds(report.downtime_us),
            downtime_stop_ms: format::milliseconds(report.downtime_stop_us),
            downtime_pages_ms: format::milliseconds(report.downtime_pages_us),
            downtime_state_ms: format::milliseconds(report.downtime_state_us),
            downtime_start_ms: format::milliseconds(report.downtime_start_us),
            total_ms: format::milliseconds(report.total_us),
            passes: report.passes,
            bytes_sent: report.bytes_sent,
            pages_sent: report.pages_sent,
            zero_pages: report.zero_pages,
            epoch: migration.epoch,
            started_at: started.clone(),
            started,
            connections: report.connections,
            tls: report.tls,
            handed_over: report.handed_over,
            suspended: report.paused,
            compressed_pages: report.compressed_pages,
            compression_saved_bytes: report.compression_saved_bytes,
            delta_pages: report.delta_pages,
            delta_saved_bytes: report.delta_saved_bytes,
            resent_pages: report.resent_pages,
            max_throttle_percent: report.max_throttle_percent,
            throttled_ms: format::milliseconds(report.throttled_us),
            verified: verify(report.verified()),
            verify_ms: format::milliseconds(report.verify_us),
            post_copy: report.post_copy,
            post_copy_ms: format::milliseconds(report.post_copy_us),
            post_copy_pages: report.post_copy_pages,
            faults: report.faults,
            worst_fault_ms: format::milliseconds(report.worst_fault_us),
            mean_fault_ms: format::milliseconds(report.mean_fault_us),
            recoveries: report.recoveries,
            guest_gap_ms: report.guest_gap_us.map(format::milliseconds),
            policy: migration.policy.as_ref().map(PolicyView::from),
            bandwidth_taken_bytes_per_second: by_vmm.and_then(|policy| policy.bandwidth_bytes_per_second),
            progress: migration.progress.as_ref().map(ProgressView::from),
            reason: if !migration.waits.is_empty() {
                migration.waits.clone()
            } else if report.reason.is_empty() {
                migration.reason.clone()
            } else {
                report.reason
            },
        }
    }
}

fn migration_result(report: Option<&vm::MigrationReport>) -> &'static str {
    use vm::MigrationResult;
    match report.map(vm::MigrationReport::result) {
        None => "running",
        Some(MigrationResult::Completed) => "completed",
        Some(MigrationResult::Cancelled) => "cancelled",
        Some(MigrationResult::InDoubt) => "in-doubt",
        Some(MigrationResult::Failed | MigrationResult::Unspecified) => "failed",
    }
}

/// How far a migration is.
#[derive(Debug, Serialize)]
pub struct ProgressView {
    /// In a word or two.
    pub phase: &'static str,
    /// From 1.
    pub pass: u32,
    /// On the wire so far.
    pub bytes_sent: u64,
    /// Of this pass.
    pub remaining_bytes: u64,
    /// Guest memory.
    pub total_bytes: u64,
    /// Measured.
    pub rate_bytes_per_second: u64,
    /// Of the guest.
    pub dirty_rate_bytes_per_second: u64,
    /// If it paused now.
    pub predicted_downtime_ms: f64,
    /// Since its start.
    pub elapsed_ms: u64,
    /// For pages.
    pub connections: u32,
    /// Of vCPU time taken from the guest now.
    pub throttle_percent: u32,
    /// Bytes on the wire by bytes of pages.
    pub compression_ratio: f64,
    /// Post-copy: pages the guest waited for.
    pub faults: u64,
    /// Post-copy: longest wait.
    pub worst_fault_ms: f64,
    /// Post-copy: the connections are gone, the VM waits.
    pub link_lost: bool,
}

impl From<&vm::MigrationProgress> for ProgressView {
    fn from(progress: &vm::MigrationProgress) -> Self {
        Self {
            phase: phase(progress.phase()),
            pass: progress.pass,
            bytes_sent: progress.bytes_sent,
            remaining_bytes: progress.remaining_bytes,
            total_bytes: progress.total_bytes,
            rate_bytes_per_second: progress.rate_bytes_per_second,
            dirty_rate_bytes_per_second: progress.dirty_rate_bytes_per_second,
            predicted_downtime_ms: format::milliseconds(progress.predicted_downtime_us),
            elapsed_ms: progress.elapsed_ms,
            connections: progress.connections,
            throttle_percent: progress.throttle_percent,
            compression_ratio: progress.compression_ratio,
            faults: progress.faults,
            worst_fault_ms: format::milliseconds(progress.worst_fault_us),
            link_lost: progress.link_lost,
        }
    }
}

/// A phase in a word or two.
#[must_use]
pub fn phase(phase: vm::MigrationPhase) -> &'static str {
    use vm::MigrationPhase;
    match phase {
        MigrationPhase::Unspecified | MigrationPhase::Negotiate => "negotiate",
        MigrationPhase::PreCopy => "pre-copy",
        MigrationPhase::Pause => "pause",
        MigrationPhase::FinalPages => "final pages",
        MigrationPhase::State => "state",
        MigrationPhase::Commit => "commit",
        MigrationPhase::Done => "done",
        MigrationPhase::PostCopy => "post-copy",
    }
}

/// A policy. What is not set is null.
#[derive(Debug, Serialize)]
pub struct PolicyView {
    /// The longest pause that is acceptable.
    pub max_downtime_ms: Option<u64>,
    /// From the start to the pause.
    pub timeout_ms: Option<u64>,
    /// throttle, post-copy, cancel or force.
    pub on_stall: Option<&'static str>,
    /// 0: no cap.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// 0: chosen by the link.
    pub connections: Option<u32>,
    /// auto, off, lz4 or zstd.
    pub compression: Option<&'static str>,
    /// off, sampled or full.
    pub verify: Option<&'static str>,
    /// 0 to 9.
    pub priority: Option<u32>,
}

impl From<&vm::MigrationPolicy> for PolicyView {
    fn from(policy: &vm::MigrationPolicy) -> Self {
        use vm::{Compression, OnStall};
        Self {
            max_downtime_ms: policy.max_downtime_ms,
            timeout_ms: policy.timeout_ms,
            on_stall: match policy.on_stall() {
                OnStall::Unspecified => None,
                OnStall::Throttle => Some("throttle"),
                OnStall::PostCopy => Some("post-copy"),
                OnStall::Cancel => Some("cancel"),
                OnStall::Force => Some("force"),
            },
            bandwidth_bytes_per_second: policy.bandwidth_bytes_per_second,
            connections: policy.connections,
            compression: match policy.compression() {
                Compression::Unspecified => None,
                Compression::Auto => Some("auto"),
                Compression::Off => Some("off"),
                Compression::Lz4 => Some("lz4"),
                Compression::Zstd => Some("zstd"),
            },
            verify: match policy.verify() {
                vm::Verify::Unspecified => None,
                other => Some(verify(other)),
            },
            priority: policy.priority,
        }
    }
}

fn verify(verify: vm::Verify) -> &'static str {
    match verify {
        vm::Verify::Unspecified | vm::Verify::Off => "off",
        vm::Verify::Sampled => "sampled",
        vm::Verify::Full => "full",
    }
}

impl PolicyView {
    /// In one line.
    #[must_use]
    pub fn line(&self) -> String {
        let ms = |value: u64| format::micros(value.saturating_mul(1000));
        let mut parts = Vec::new();
        parts.extend(
            self.max_downtime_ms
                .map(|value| format!("max downtime {}", ms(value))),
        );
        parts.extend(self.timeout_ms.map(|value| format!("timeout {}", ms(value))));
        parts.extend(self.on_stall.map(|value| format!("on stall {value}")));
        parts.extend(
            self.bandwidth_bytes_per_second
                .map(|value| format!("bandwidth {}", cap(value))),
        );
        parts.extend(self.connections.map(|value| match value {
            0 => "connections auto".to_owned(),
            count => format!("connections {count}"),
        }));
        parts.extend(self.compression.map(|value| format!("compress {value}")));
        parts.extend(self.verify.map(|value| format!("verify {value}")));
        parts.extend(self.priority.map(|value| format!("priority {value}")));
        parts.join(", ")
    }
}

/// A cap on bandwidth as shown.
#[must_use]
pub fn cap(bytes_per_second: u64) -> String {
    match bytes_per_second {
        0 => "uncapped".to_owned(),
        rate => format!("{}/s", format::size(rate)),
    }
}

/// What migrations do unless a request says otherwise.
#[derive(Debug, Serialize)]
pub struct DefaultsView {
    /// Of migrations that users ask for. `on_stall` of moves off full or drained nodes is below.
    #[serde(flatten)]
    pub policy: PolicyView,
    /// For VMs that leave a node that runs out of memory or is drained.
    pub on_stall_leaving: &'static str,
    /// Of all migrations together; 0: no cap.
    pub cluster_bandwidth_bytes_per_second: u64,
    /// Of all migrations from and to one node; 0: no cap.
    pub link_bandwidth_bytes_per_second: u64,
}

impl From<&cluster::MigrationDefaults> for DefaultsView {
    fn from(defaults: &cluster::MigrationDefaults) -> Self {
        let policy = PolicyView::from(&defaults.policy.unwrap_or_default());
        let said = policy.on_stall;
        Self {
            policy: PolicyView {
                on_stall: said.or(Some("cancel")),
                ..policy
            },
            on_stall_leaving: said.unwrap_or("throttle"),
            cluster_bandwidth_bytes_per_second: defaults.cluster_bandwidth_bytes_per_second.unwrap_or(0),
            link_bandwidth_bytes_per_second: defaults.link_bandwidth_bytes_per_second.unwrap_or(0),
        }
    }
}

impl DefaultsView {
    /// For people.
    #[must_use]
    pub fn text(&self) -> Page {
        let leaving = self.on_stall_leaving;
        Page::from_iter([
            format!("policy:   {}", self.policy.line()),
            format!("leaving:  on stall {leaving} (VMs that leave a full or drained node)"),
            format!("cluster:  {}", cap(self.cluster_bandwidth_bytes_per_second)),
            format!("each link: {}", cap(self.link_bandwidth_bytes_per_second)),
        ])
    }
}

/// A migration with its whole report.
#[derive(Debug, Serialize)]
pub struct MigrationDetails {
    /// As in lists.
    #[serde(flatten)]
    pub migration: MigrationView,
    /// The first and last passes.
    pub pass_table: Vec<PassView>,
    /// Its life, for a plot.
    pub samples: Vec<SampleView>,
}

/// One pass over memory.
#[derive(Debug, Serialize)]
pub struct PassView {
    /// From 1.
    pub pass: u32,
    /// Sent with their bytes.
    pub pages: u64,
    /// As runs of zeros.
    pub zero_pages: u64,
    /// On the wire.
    pub bytes: u64,
    /// How long it took.
    pub duration_ms: f64,
    /// While it was sent.
    pub dirtied_pages: u64,
    /// Of vCPU time taken from the guest.
    pub throttle_percent: u32,
}

/// A moment of a migration.
#[derive(Debug, Serialize)]
pub struct SampleView {
    /// Since its start.
    pub elapsed_ms: f64,
    /// On the wire.
    pub rate_bytes_per_second: u64,
    /// Of the guest.
    pub dirty_rate_bytes_per_second: u64,
    /// To be sent.
    pub remaining_bytes: u64,
    /// Of vCPU time taken from the guest.
    pub throttle_percent: u32,
    /// In a word or two.
    pub phase: &'static str,
}

impl From<&cluster::Migration> for MigrationDetails {
    fn from(migration: &cluster::Migration) -> Self {
        let report = migration.report.clone().unwrap_or_default();
        let pass = |pass: &vm::MigrationPass| PassView {
            pass: pass.pass,
            pages: pass.pages,
            zero_pages: pass.zero_pages,
            bytes: pass.bytes,
            duration_ms: format::milliseconds(pass.duration_us),
            dirtied_pages: pass.dirtied_pages,
            throttle_percent: pass.throttle_percent,
        };
        let sample = |sample: &vm::MigrationSample| SampleView {
            elapsed_ms: format::milliseconds(sample.elapsed_us),
            rate_bytes_per_second: sample.rate_bytes_per_second,
            dirty_rate_bytes_per_second: sample.dirty_rate_bytes_per_second,
            remaining_bytes: sample.remaining_bytes,
            throttle_percent: sample.throttle_percent,
            phase: phase(sample.phase()),
        };
        Self {
            migration: MigrationView::from(migration),
            pass_table: report.pass_table.iter().map(pass).collect(),
            samples: report.samples.iter().map(sample).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_reads_well() {
        let policy = vm::MigrationPolicy {
            max_downtime_ms: Some(50),
            timeout_ms: Some(600_000),
            on_stall: vm::OnStall::PostCopy.into(),
            bandwidth_bytes_per_second: Some(100 << 20),
            connections: Some(0),
            ..Default::default()
        };
        assert_eq!(
            PolicyView::from(&policy).line(),
            "max downtime 50.0 ms, timeout 10m, on stall post-copy, bandwidth 100.0 MiB/s, connections auto"
        );
        assert_eq!(PolicyView::from(&vm::MigrationPolicy::default()).line(), "");
    }
}
