//! Loads as openMosix smoothed them, one sample a second: (5 old + 3 new) / 8 and (7 old + new) / 8, as found in Kerrighed's
//! `mosix_probe.c`. What a node thinks of itself rises slowly and falls at once, what it tells others rises at once and falls
//! slowly. So a node is slow to push and slow to attract.

/// A load as the node itself sees it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LocalLoad(f64);

impl LocalLoad {
    /// Takes a sample and answers the new value.
    pub fn update(&mut self, sample: f64) -> f64 {
        let part = if sample > self.0 { 3.0 / 8.0 } else { 1.0 };
        self.0 += part * (sample - self.0);
        self.0
    }
}

/// A load as others see the node.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ExportedLoad(f64);

impl ExportedLoad {
    /// Takes a sample and answers the new value.
    pub fn update(&mut self, sample: f64) -> f64 {
        let part = if sample > self.0 { 1.0 } else { 1.0 / 8.0 };
        self.0 += part * (sample - self.0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_rises_slowly_and_falls_at_once() {
        let mut local = LocalLoad::default();
        assert_eq!(local.update(8.0), 3.0);
        assert_eq!(local.update(8.0), 4.875);
        assert_eq!(local.update(1.0), 1.0);
    }

    #[test]
    fn exported_rises_at_once_and_falls_slowly() {
        let mut exported = ExportedLoad::default();
        assert_eq!(exported.update(8.0), 8.0);
        assert_eq!(exported.update(0.0), 7.0);
    }
}
