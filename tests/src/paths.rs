//! Where the programs and images under test are.

use std::path::PathBuf;

/// A program built beside the tests, or in `SHOAL_TEST_BIN`.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let path = match std::env::var_os("SHOAL_TEST_BIN") {
        Some(directory) => PathBuf::from(directory).join(name),
        None => profile_dir().join(name),
    };
    assert!(
        path.is_file(),
        "{} is missing: `cargo xtask test` builds it",
        path.display()
    );
    path
}

/// The directory of an image built by `cargo xtask images`, or in `SHOAL_TEST_IMAGES`.
#[must_use]
pub fn image(name: &str) -> PathBuf {
    let path = images().join(name);
    assert!(
        path.join("image.toml").is_file(),
        "{} is missing: `cargo xtask images` builds it",
        path.display()
    );
    path
}

/// The directory of all images.
#[must_use]
pub fn images() -> PathBuf {
    match std::env::var_os("SHOAL_TEST_IMAGES") {
        Some(directory) => PathBuf::from(directory),
        None => profile_dir().with_file_name("images"),
    }
}

/// `target/release`, if this is `target/release/deps/some_test` or `target/release/some_program`.
fn profile_dir() -> PathBuf {
    let own = std::env::current_exe().expect("the path of this program");
    let directory = own.parent().expect("a target directory");
    let is_test = directory.ends_with("deps");
    let profile = if is_test {
        directory.parent()
    } else {
        Some(directory)
    };
    profile.expect("a target directory").to_owned()
}
