//! How much each figure has to change before it is sent.

/// A change counts if it is larger than `absolute` and than `relative` times what was sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    /// In the figure's unit.
    pub absolute: f64,
    /// Part of the value.
    pub relative: f64,
}

impl Threshold {
    /// Every change counts.
    pub const EXACT: Self = Self {
        absolute: 0.0,
        relative: 0.0,
    };

    const fn new(absolute: f64, relative: f64) -> Self {
        Self { absolute, relative }
    }

    /// Whether `now` is to be sent after `sent`. What is no number is sent if it was one before, and the other way round.
    #[must_use]
    pub fn passed(self, sent: f64, now: f64) -> bool {
        if sent.is_nan() || now.is_nan() {
            return sent.is_nan() != now.is_nan();
        }
        let change = (now - sent).abs();
        change > 0.0 && change > self.absolute && change > self.relative * sent.abs()
    }

    #[expect(clippy::cast_precision_loss, reason = "a comparison against a threshold")]
    pub(crate) fn passed_by_count(self, sent: u64, now: u64) -> bool {
        sent != now && (self == Self::EXACT || self.passed(sent as f64, now as f64))
    }

    pub(crate) fn passed_by_rate(self, sent: Option<u64>, now: Option<u64>) -> bool {
        match (sent, now) {
            (Some(sent), Some(now)) => self.passed_by_count(sent, now),
            (sent, now) => sent.is_some() != now.is_some(),
        }
    }

    pub(crate) fn passed_by_share(self, sent: Option<f64>, now: Option<f64>) -> bool {
        match (sent, now) {
            (Some(sent), Some(now)) => self.passed(sent, now),
            (sent, now) => sent.is_some() != now.is_some(),
        }
    }
}

/// The thresholds of a report's figures. Its states are sent whenever they change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    /// Memory in bytes, of the node and resident of its VMs: growth is measured with it, so the step is small.
    pub memory: Threshold,
    /// CPUs in use, and waited for.
    pub cpu: Threshold,
    /// Threads.
    pub run_queue: Threshold,
    /// PSI, percent.
    pub pressure: Threshold,
    /// Bytes per second: network, storage, swap.
    pub rate: Threshold,
    /// Bytes per second.
    pub dirty_rate: Threshold,
    /// Bytes.
    pub working_set: Threshold,
    /// Free memory of NUMA nodes, bytes: shown only.
    pub numa: Threshold,
}

impl Thresholds {
    /// What agents use.
    pub const DEFAULT: Self = Self {
        memory: Threshold::new(262_144.0, 0.0),
        cpu: Threshold::new(0.02, 0.02),
        run_queue: Threshold::new(0.5, 0.0),
        pressure: Threshold::new(0.5, 0.0),
        rate: Threshold::new(65_536.0, 0.1),
        dirty_rate: Threshold::new(262_144.0, 0.1),
        working_set: Threshold::new(1_048_576.0, 0.05),
        numa: Threshold::new(67_108_864.0, 0.02),
    };

    /// Every change is sent.
    pub const EXACT: Self = Self {
        memory: Threshold::EXACT,
        cpu: Threshold::EXACT,
        run_queue: Threshold::EXACT,
        pressure: Threshold::EXACT,
        rate: Threshold::EXACT,
        dirty_rate: Threshold::EXACT,
        working_set: Threshold::EXACT,
        numa: Threshold::EXACT,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_has_to_be_large_by_both_measures() {
        let threshold = Threshold::new(10.0, 0.1);
        assert!(!threshold.passed(50.0, 60.0));
        assert!(threshold.passed(50.0, 61.0));
        assert!(!threshold.passed(1000.0, 1100.0));
        assert!(threshold.passed(1000.0, 899.0));
        assert!(threshold.passed(0.0, f64::INFINITY));
        assert!(threshold.passed(0.0, f64::NAN) && !threshold.passed(f64::NAN, f64::NAN));
        assert!(Threshold::EXACT.passed_by_count(u64::MAX, u64::MAX - 1));
        assert!(!Threshold::EXACT.passed(1.0, 1.0));
    }
}
