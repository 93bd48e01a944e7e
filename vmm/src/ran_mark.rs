//! A file that says that vCPUs have run here, so that it is known even after this process has died.
//! See docs/decisions/003-ran-mark.md.

use std::path::PathBuf;

/// Where the mark is left, if anywhere: a VM run by hand leaves none.
#[derive(Debug, Clone, Default)]
pub struct RanMark(Option<PathBuf>);

impl RanMark {
    /// A mark at `path`.
    #[must_use]
    pub fn at(path: Option<PathBuf>) -> Self {
        Self(path)
    }

    /// Leaves the mark. A failure is logged and the VM runs all the same: as long as this process lives it can say so
    /// itself.
    pub fn leave(&self) {
        if let Some(path) = &self.0
            && let Err(error) = std::fs::write(path, [])
        {
            tracing::error!(%error, "cannot leave the mark that this VM has run here");
        }
    }

    /// Whether it has been left.
    #[must_use]
    pub fn is_left(&self) -> bool {
        self.0.as_ref().is_some_and(|path| path.exists())
    }
}
