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

    /// Leaves the mark.
    ///
    /// # Errors
    /// When it cannot be left; then vCPUs must not run.
    pub fn leave(&self) -> std::io::Result<()> {
        let Some(path) = &self.0 else { return Ok(()) };
        crate::fault::point("destination.ran_mark")?;
        std::fs::write(path, [])
    }
}
