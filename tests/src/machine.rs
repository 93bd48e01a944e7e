//! The machine that tests run on: shared by as many tests as the runner has threads, or one test's alone; and only where there is KVM.

use std::fs::File;
use std::io::Write;
use std::thread;
use std::time::Instant;

/// Held by a test that uses the machine, alone or with others; other tests wait, in this process and in others.
///
/// How long it was held is written to the file that `SHOAL_TEST_TIMES` names.
#[derive(Debug)]
pub struct Machine {
    _lock: File,
    since: Instant,
}

#[derive(Debug, Clone, Copy)]
enum Hold {
    Shared,
    Alone,
}

impl Machine {
    /// A share of the machine for a test that runs guests. `None` if there is no KVM and the user said to skip such tests.
    #[must_use]
    pub fn with_kvm(test: &str) -> Option<Self> {
        Self::if_kvm(test, Hold::Shared)
    }

    /// The whole machine, for a test whose guests must be as fast as they are told to be, or that keeps both CPUs busy by itself.
    #[must_use]
    pub fn alone_with_kvm(test: &str) -> Option<Self> {
        Self::if_kvm(test, Hold::Alone)
    }

    fn if_kvm(test: &str, hold: Hold) -> Option<Self> {
        match File::options().read(true).write(true).open("/dev/kvm") {
            Ok(_) => Some(Self::hold(hold)),
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

    /// The whole machine for a test that also makes network namespaces, which only root can.
    #[must_use]
    pub fn with_kvm_and_root(test: &str) -> Option<Self> {
        if rustix::process::geteuid().is_root() {
            return Self::alone_with_kvm(test);
        }
        assert!(
            std::env::var("SHOAL_SKIP_ROOT").is_ok_and(|value| value == "1"),
            "{test} makes network namespaces and so must run as root. SHOAL_SKIP_ROOT=1 skips such tests and says so"
        );
        say(&format!("SKIPPED {test}: not root, and SHOAL_SKIP_ROOT=1"));
        None
    }

    /// A share of the machine for a test without guests.
    #[must_use]
    pub fn shared() -> Self {
        Self::hold(Hold::Shared)
    }

    /// The whole machine for something without guests.
    #[must_use]
    pub fn alone() -> Self {
        Self::hold(Hold::Alone)
    }

    fn hold(hold: Hold) -> Self {
        let file = |name: &str| File::create(std::env::temp_dir().join(name)).expect("a lock file");
        // Whoever waits keeps the gate shut behind it, so that tests which share do not keep out for good one that wants to be alone.
        let gate = file("shoal-tests.gate");
        gate.lock().expect("the gate");
        let lock = file("shoal-tests.lock");
        match hold {
            Hold::Shared => lock.lock_shared(),
            Hold::Alone => lock.lock(),
        }
        .expect("the lock");
        Self {
            _lock: lock,
            since: Instant::now(),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let Some(path) = std::env::var_os("SHOAL_TEST_TIMES") else {
            return;
        };
        // The runner names a test's thread after it.
        let line = format!(
            "{} {}\n",
            self.since.elapsed().as_secs_f64(),
            thread::current().name().unwrap_or("?")
        );
        let file = File::options().append(true).create(true).open(path);
        drop(file.and_then(|mut file| file.write_all(line.as_bytes())));
    }
}

/// Says something even where the test runner keeps output to itself.
pub fn say(text: &str) {
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}
