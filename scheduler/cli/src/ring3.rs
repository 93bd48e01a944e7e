//! What a user has to know of a guest whose kernel runs in ring 3: said once by `run`, always by `inspect`.

use std::fs::{self, File};
use std::io;

use crate::daemon::default_state_dir;

/// Beside the state of `up`: it was said to this user.
pub const SAID: &str = "ring3-kernel-was-said";

/// Whether it was not said to this user before; it counts as said from now on. True each time where that cannot be kept.
#[must_use]
pub fn first_time() -> bool {
    let Ok(directory) = default_state_dir() else {
        return true;
    };
    let made = fs::create_dir_all(&directory).and_then(|()| File::create_new(directory.join(SAID)));
    !matches!(made, Err(error) if error.kind() == io::ErrorKind::AlreadyExists)
}
