//! Loads as openMosix's nodes smooth them, from run queues that they sample (constants as found in Kerrighed's
//! `mosix_probe.c`). What a node thinks of itself rises slowly and falls at once, what it tells others rises at once and falls
//! slowly.

/// What the nodes think of their load.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SampledLoad {
    /// As the node itself sees it: (5 old + 3 new) / 8 when it rises, at once when it falls.
    pub local: f64,
    /// As others see it: at once when it rises, (7 old + new) / 8 when it falls.
    pub exported: f64,
}

impl SampledLoad {
    /// A load that is known and does not change.
    #[must_use]
    pub fn steady(load: f64) -> Self {
        Self {
            local: load,
            exported: load,
        }
    }

    /// Takes a sample, in CPUs.
    pub fn update(&mut self, sample: f64) {
        self.local = if sample > self.local {
            (5.0 * self.local + 3.0 * sample) / 8.0
        } else {
            sample
        };
        self.exported = if sample > self.exported {
            sample
        } else {
            (7.0 * self.exported + sample) / 8.0
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_rises_slowly_and_falls_at_once_and_exported_the_other_way_round() {
        let mut load = SampledLoad::default();
        load.update(8.0);
        assert_eq!(
            load,
            SampledLoad {
                local: 3.0,
                exported: 8.0
            }
        );
        load.update(8.0);
        assert_eq!(load.local, 4.875);
        load.update(0.0);
        assert_eq!(
            load,
            SampledLoad {
                local: 0.0,
                exported: 7.0
            }
        );
    }
}
