//! How each VM writes its memory, as its VMM samples it while the agent listens.

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use shoal_proto::vm::{MemorySample, SampleMemoryRequest};
use tonic::{Code, Status};

use crate::vm::Vm;

/// Pause before asking again after the VMM's stream has broken.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Of a VM that migrates, or waits for a CPU, no sample may come when it should.
const GRACE: Duration = Duration::from_secs(30);

/// The latest sample, as long as it says anything.
#[derive(Debug, Default)]
pub(crate) struct LatestSample(Mutex<Option<(MemorySample, Instant)>>);

impl LatestSample {
    fn set(&self, sample: MemorySample, now: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((sample, now));
    }

    /// The sample, unless the next is long overdue.
    pub(crate) fn get(&self, now: Instant) -> Option<MemorySample> {
        let latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        latest
            .filter(|(sample, taken)| {
                let interval = Duration::from_millis(sample.interval_ms);
                let lasts = interval.saturating_mul(2).saturating_add(GRACE);
                now.saturating_duration_since(*taken) <= lasts
            })
            .map(|(sample, _)| sample)
    }
}

/// Keeps the VM's latest sample, as long as it is polled.
pub(crate) async fn follow(vm: &Vm, interval: Option<Duration>) -> Infallible {
    let Some(interval) = interval else {
        return std::future::pending().await;
    };
    loop {
        match listen(vm, interval).await {
            Err(status) if status.code() == Code::Unimplemented => {
                tracing::info!(vm = %vm.key.id, %status, "its memory is not sampled");
                return std::future::pending().await;
            }
            Err(status) => tracing::debug!(vm = %vm.key.id, %status, "no samples"),
            Ok(()) => {}
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn listen(vm: &Vm, interval: Duration) -> Result<(), Status> {
    let request = SampleMemoryRequest {
        interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
        window_ms: 0,
    };
    let mut samples = vm.client().sample_memory(request).await?.into_inner();
    while let Some(sample) = samples.message().await? {
        vm.memory_sample.set(sample, Instant::now());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_says_nothing_when_the_next_is_long_overdue() {
        let latest = LatestSample::default();
        let start = Instant::now();
        assert_eq!(latest.get(start), None);
        let sample = MemorySample {
            interval_ms: 5000,
            ..MemorySample::default()
        };
        latest.set(sample, start);
        assert_eq!(latest.get(start + Duration::from_secs(40)), Some(sample));
        assert_eq!(latest.get(start + Duration::from_secs(41)), None);
        let absurd = MemorySample {
            interval_ms: u64::MAX,
            ..sample
        };
        latest.set(absurd, start);
        assert_eq!(latest.get(start + Duration::from_secs(41)), Some(absurd));
    }
}
