//! A command that is interrupted has not done what it was asked: `shoal drain n && poweroff` must not power off.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use shoal_tests::shoal::Shoal;
use shoal_tests::wait::{self, seconds};

use crate::CALM;

/// What a shell has in `$?`.
fn in_a_shell(status: ExitStatus) -> Option<i32> {
    status.code().or(status.signal().map(|signal| 128 + signal))
}

/// Starts a command that heeds signals, whatever whoever runs the tests has it ignore: what is in the background of a script does.
fn start(shoal: &Shoal, args: &[&str]) -> Child {
    let command = shoal.command(&[&["-o", "json"][..], args].concat());
    let mut heeds = Command::new("env");
    heeds.arg("--default-signal=INT,TERM");
    heeds.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => heeds.env(name, value),
            None => heeds.env_remove(name),
        };
    }
    heeds.stdout(Stdio::piped()).stderr(Stdio::piped());
    heeds.spawn().expect("shoal starts")
}

/// Sends a signal; answers what a shell gets, and what was said on stderr.
fn interrupt(command: Child, signal: Signal) -> (Option<i32>, String) {
    kill_process(Pid::from_child(&command), signal).expect("it runs");
    let output = command.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (in_a_shell(output.status), said)
}

#[test]
fn an_interrupted_command_does_not_exit_as_if_it_were_done() {
    let Some(machine) = Machine::with_kvm("Ctrl-C and SIGTERM in commands that wait") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let shoal = &cluster.shoal;
    cluster.run_probe("a", "node1", "128MiB", CALM);
    // No move is done before the command that asks for it is interrupted: it would take a minute.
    shoal.ok(&["migrations", "defaults", "set", "--cluster-bandwidth", "1MiB"]);

    for (command, signal, status, goes_on) in [
        (&["migrate", "a"][..], Signal::INT, 130, "the migration goes on"),
        (&["migrate", "a"], Signal::TERM, 143, "the migration goes on"),
        (&["expel", "node1"], Signal::INT, 130, "the VMs go on moving"),
        (&["drain", "node1"], Signal::INT, 130, "node1 goes on draining"),
    ] {
        let child = start(shoal, command);
        cluster.wait_for_state("a", "migrating", seconds(30));
        let (ended, said) = interrupt(child, signal);
        assert_eq!(ended, Some(status), "{command:?}: {said}");
        assert!(
            said.contains(&format!("interrupted; {goes_on}")),
            "{command:?}: {said}"
        );
        if command[0] == "drain" {
            shoal.ok(&["uncordon", "node1"]);
        }
        shoal.ok(&["migrations", "cancel", "a"]);
        cluster.wait_for_state("a", "running", seconds(30));
    }

    for command in [&["logs", "-f", "a"][..], &["events", "-f"]] {
        for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143)] {
            let mut child = start(shoal, command);
            let mut first = String::new();
            let mut lines = BufReader::new(child.stdout.take().expect("a pipe"));
            lines.read_line(&mut first).expect("it writes");
            assert_eq!(interrupt(child, signal).0, Some(status), "{command:?}");
        }
    }
}

#[test]
fn a_job_that_waits_goes_on_waiting_when_its_command_is_interrupted() {
    let Some(machine) = Machine::with_kvm("Ctrl-C while a job waits") else {
        return;
    };
    let shape = Shape {
        nodes: 1,
        node_cpus: 1,
        ..Shape::default()
    };
    let cluster = Cluster::start(machine, &shape);
    let shoal = &cluster.shoal;
    cluster.run_probe("a", "node1", "128MiB", CALM);
    let mut child = start(shoal, &["run", "probe", "--queue", "--name", "job"]);
    let mut said = String::new();
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe"));
    lines.read_line(&mut said).expect("it says why it waits");
    assert!(said.starts_with("job waits, place 1 in the queue: "), "{said}");
    let (ended, _) = interrupt(child, Signal::INT);
    lines.read_to_string(&mut said).expect("text");
    assert_eq!(ended, Some(130), "{said}");
    assert!(
        said.contains("interrupted; job goes on waiting: `shoal queue` shows it"),
        "{said}"
    );
    assert_eq!(shoal.json(&["queue"])[0]["name"], "job");

    // One that is taken out of the queue has failed for whoever waits for it.
    let mut child = start(shoal, &["run", "probe", "--queue", "--name", "out"]);
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut said = String::new();
    lines.read_line(&mut said).expect("it says why it waits");
    shoal.ok(&["rm", "out"]);
    let output = child.wait_with_output().expect("it ends");
    lines.read_to_string(&mut said).expect("text");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("out is failed: taken out of the queue"), "{said}");
}

#[test]
fn a_console_that_nobody_reads_is_no_success() {
    let Some(machine) = Machine::with_kvm("run into a pipe that closes") else {
        return;
    };
    let cluster = Cluster::start(machine, &Shape::default());
    let mut run = cluster
        .shoal
        .command(&["run", "probe", "--name", "a", "--", "wss=1MiB"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("shoal starts");
    let mut first = String::new();
    let mut lines = BufReader::new(run.stdout.take().expect("a pipe"));
    lines.read_line(&mut first).expect("it writes");
    drop(lines);
    let output = run.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(in_a_shell(output.status), Some(141), "{said}");
    assert!(said.contains("a goes on: `shoal logs -f a` shows it"), "{said}");
    wait::until_true("the VM to go on", seconds(10), || {
        cluster.vm("a")["state"] == "running"
    });
}
