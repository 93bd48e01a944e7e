//! Linux guests, moved and ended.

use std::process::Stdio;

use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};

const COUNT_FOR_EVER: &str = "i=0; while :; do echo count $i; i=$((i+1)); sleep 1; done";

#[test]
fn linux_counts_on_while_it_is_moved_twice() {
    let Some(machine) = Machine::with_kvm("two moves of a Linux that counts") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let run = [
        "run",
        "linux",
        "--detach",
        "--name",
        "counter",
        "--prefer-node",
        "node1",
        "--",
        "sh",
        "-c",
        COUNT_FOR_EVER,
    ];
    cluster.shoal.json(&run);
    let counts = || guest::counts(&cluster.logs("counter"));
    wait::until_true("Linux to boot and count", seconds(30), || counts().len() >= 3);

    for to in ["node2", "node1"] {
        let report = cluster.shoal.json(&["migrate", "counter", "--to", to]);
        assert_eq!(report["result"], "completed", "{report}");
        let before = counts().len();
        wait::until_true("Linux to count on", seconds(30), || counts().len() >= before + 3);
    }

    let numbers = counts();
    assert_eq!(numbers[0], 0);
    guest::assert_consecutive("counts", &numbers);
}

#[test]
fn run_shows_the_console_and_exits_with_the_status_of_the_command() {
    let Some(machine) = Machine::with_kvm("a command in Linux and its exit status") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let script = "printf '<%s>\\n' \"$@\"; exit 7";
    let args = [
        "run",
        "linux",
        "--",
        "sh",
        "-c",
        script,
        "sh",
        "two  words",
        "100% \"quoted\" 'ü'",
    ];
    let output = cluster
        .shoal
        .command(&args)
        .stdin(Stdio::null())
        .output()
        .expect("shoal starts");
    let console = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(7), "{}", guest::tail(&console));
    for line in ["<two  words>", "<100% \"quoted\" 'ü'>"] {
        assert!(console.contains(line), "{line} in:\n{}", guest::tail(&console));
    }

    let script = "printf '<%s>' \"$0\" \"$@\"; echo";
    let output = cluster.shoal.output(&[
        "run", "linux", "--", "sh", "-c", script, "--", "one", "--", "", "two",
    ]);
    let console = String::from_utf8_lossy(&output.stdout);
    assert!(
        console.contains("<--><one><--><><two>"),
        "{}",
        guest::tail(&console)
    );
    assert!(output.status.success(), "{:?}", output.status);
}

#[test]
fn a_guest_that_ends_without_a_status_is_no_success() {
    let Some(machine) = Machine::with_kvm("ends without a status") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    // A reset of this image is a triple fault.
    let reset = "echo 1 > /proc/sys/kernel/sysrq; echo b > /proc/sysrq-trigger; sleep 60";
    let output = cluster
        .shoal
        .output(&["run", "linux", "--name", "reset", "--", "sh", "-c", reset]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("error: reset ended without an exit status: the guest reset"),
        "{said}"
    );
    let vm = cluster.vm("reset");
    assert_eq!(vm["state"], "exited", "{vm}");
    assert!(vm["exit_status"].is_null(), "{vm}");

    let run = cluster
        .shoal
        .start(&["run", "linux", "--name", "stopped", "--", "sleep", "1000"]);
    wait::until_true("it to run", seconds(30), || {
        let vms = cluster.shoal.json(&["ps"]);
        // It writes nothing, and so counts as booting for a minute.
        let runs = |vm: &serde_json::Value| vm["name"] == "stopped" && vm["state"] == "booting";
        vms.as_array().expect("a list").iter().any(runs)
    });
    cluster.shoal.ok(&["stop", "stopped"]);
    let output = run.wait_with_output().expect("run ends with its VM");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("stopped ended without an exit status: stopped on request"),
        "{said}"
    );
}

#[test]
fn a_kernel_that_panics_has_failed_and_says_why() {
    let Some(machine) = Machine::with_kvm("a kernel panic") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60";
    let output = cluster
        .shoal
        .command(&["run", "linux", "--name", "doomed", "--", "sh", "-c", script])
        .stdin(Stdio::null())
        .output()
        .expect("shoal starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("the guest says: kernel panic: sysrq triggered crash"),
        "{said}"
    );
    let vm = cluster.shoal.json(&["inspect", "doomed"]);
    assert_eq!(vm["state"], "failed", "{vm}");
    // The console has what the kernel said before.
    let console = cluster.logs("doomed");
    assert!(
        console.contains("Kernel panic - not syncing"),
        "{}",
        guest::tail(&console)
    );
}
