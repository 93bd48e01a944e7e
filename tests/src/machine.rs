//! The machine that tests run on: one test at a time, and only where there is KVM.

use std::fs::File;
use std::io::Write;

/// Held by a test that uses the machine; others wait, in this process and in others.
#[derive(Debug)]
pub struct Machine {
    _lock: File,
}

impl Machine {
    /// The machine for a test that runs guests. `None` if there is no KVM and the user said to skip such tests.
    #[must_use]
    pub fn with_kvm(test: &str) -> Option<Self> {
        match File::options().read(true).write(true).open("/dev/kvm") {
            Ok(_) => Some(Self::exclusive()),
            Err(error) if std::env::var("SHOAL_SKIP_KVM").is_ok_and(|value| value == "1") => {
                say(&format!(
                    "SKIPPED {test}: /dev/kvm: {error}, and SHOAL_SKIP_KVM=1"
                ));
                None
            }
            Err(error) => panic!(
                "{test} runs real guests, but /dev/kvm cannot be opened: {error}. \
                 SHOAL_SKIP_KVM=1 skips such tests and says so"
            ),
        }
    }

    /// The machine for a test that also makes network namespaces, which only root can.
    #[must_use]
    pub fn with_kvm_and_root(test: &str) -> Option<Self> {
        if rustix::process::geteuid().is_root() {
            return Self::with_kvm(test);
        }
        assert!(
            std::env::var("SHOAL_SKIP_ROOT").is_ok_and(|value| value == "1"),
            "{test} makes network namespaces and so must run as root. SHOAL_SKIP_ROOT=1 skips such tests and says so"
        );
        say(&format!("SKIPPED {test}: not root, and SHOAL_SKIP_ROOT=1"));
        None
    }

    /// The machine for a test without guests.
    #[must_use]
    pub fn exclusive() -> Self {
        let path = std::env::temp_dir().join("shoal-tests.lock");
        let lock = File::create(&path).expect("a lock file");
        lock.lock().expect("the lock");
        Self { _lock: lock }
    }
}

/// Says something even where the test runner keeps output to itself.
pub fn say(text: &str) {
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}
