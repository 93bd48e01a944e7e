//! A whole agent with real VMM processes that run a script instead of a guest, and a scheduler's end of the stream.
//! What needs guests is tested in the workspace's end-to-end tests.

mod support;

use shoal_agent::{AgentError, serve};
use shoal_proto::MigrationId;
use shoal_proto::TERM_HEADER;
use shoal_proto::node::agent_client::AgentClient;
use shoal_proto::node::{
    AbortIncomingRequest, LaunchVmRequest, PrepareIncomingRequest, SoftwareKvm, StartMigrationRequest, VmRef,
    WatchMigrationRequest,
};
use shoal_proto::vm::{self, VmState};
use shoal_secret::{ClusterSecret, Prove};
use tonic::{Code, Request};

use support::agent::{Agent, Disk, launch, new_vm, prepare};
use support::eventually;
use support::registry::Scheduler;

/// Not a test of its own: the VMM processes of the other tests run this.
#[test]
fn scripted_vmm() {
    support::vmm::run_if_started_as_vmm();
}

fn abort(vm: &VmRef, migration: MigrationId) -> AbortIncomingRequest {
    AbortIncomingRequest {
        vm: Some(vm.clone()),
        migration_id: migration.to_string(),
    }
}

#[tokio::test]
async fn a_vm_is_launched_reported_and_destroyed_and_only_its_epoch_stays() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let kernel = scheduler.add_blob(b"a kernel");
    let vm = new_vm(1);

    let status = client
        .launch_vm(launch(&vm, &kernel, "hello"))
        .await
        .expect("launched")
        .into_inner();
    assert_eq!((status.state(), status.epoch), (VmState::Running, 1));
    let process = disk.process();
    assert_eq!(status.pid, process.pid);
    eventually("it is in a heartbeat", || {
        let beating = scheduler.told(|told| told.beating()).unwrap_or_default();
        beating
            .iter()
            .any(|facts| facts.vmm_alive && facts.ran_here && facts.resident_bytes > 0)
    })
    .await;
    let again = client
        .launch_vm(launch(&vm, &kernel, "hello"))
        .await
        .expect_err("refused");
    assert_eq!(again.code(), Code::AlreadyExists);

    agent.tell(&vm, "say  world").await;
    client.destroy_vm(vm.clone()).await.expect("destroyed");
    assert_eq!(scheduler.told(|told| told.console_text(&vm.vm_id)), "hello world");
    assert!(!process.is_running());
    assert!(disk.vmms().is_empty());
    client
        .destroy_vm(vm.clone())
        .await
        .expect("destroying again changes nothing");
    assert_eq!(
        client.describe_vm(vm.clone()).await.expect_err("gone").code(),
        Code::NotFound
    );

    let stale = client
        .launch_vm(launch(&vm, &kernel, "hello"))
        .await
        .expect_err("refused");
    assert_eq!(stale.code(), Code::Aborted);
    let newer = VmRef { epoch: 2, ..vm };
    client
        .launch_vm(launch(&newer, &kernel, "hello"))
        .await
        .expect("a newer epoch may start");
    client.destroy_vm(newer).await.expect("destroyed");
}

#[tokio::test]
async fn vmms_are_put_into_the_cgroup_and_its_quota_is_told() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let group = disk.root.path().join("group");
    std::fs::create_dir(&group).expect("made");
    let mut config = disk.config(&scheduler);
    config.cgroup = Some(group.clone());
    let refused = serve(config).await.expect_err("no group").to_string();
    assert!(
        refused.starts_with(&format!("cgroup: {}: ", group.display())),
        "{refused}"
    );

    std::fs::write(group.join("cgroup.procs"), "").expect("written");
    std::fs::write(group.join("cpu.max"), "50000 100000\n").expect("written");
    let mut config = disk.config(&scheduler);
    config.cgroup = Some(group.clone());
    let agent = Agent::start_with(config, &scheduler).await;
    assert_eq!(scheduler.told(|told| told.registered[0].cpu_quota), Some(0.5));
    let (vm, kernel) = (new_vm(1), scheduler.add_blob(b"a kernel"));
    let mut client = agent.client.clone();
    client
        .launch_vm(launch(&vm, &kernel, ""))
        .await
        .expect("launched");
    let pid = disk.process().pid.to_string();
    let put = std::fs::read_to_string(group.join("cgroup.procs"));
    assert_eq!(put.expect("read"), pid);

    std::fs::remove_dir_all(&group).expect("removed");
    let second = launch(&new_vm(1), &kernel, "");
    let refused = client.launch_vm(second).await.expect_err("no group");
    let words = refused.message();
    assert!(
        words.starts_with("cannot put the VMM into its cgroup: "),
        "{words}"
    );
    assert!(words.contains("cgroup.procs"), "{words}");
    assert_eq!(disk.vmms().len(), 1, "nothing is left of it");
    client.destroy_vm(vm).await.expect("destroyed");
}

fn in_term<T>(term: u64, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let term = term.to_string().parse().expect("a value");
    request.metadata_mut().insert(TERM_HEADER, term);
    request
}

#[tokio::test]
async fn a_stranger_changes_nothing_and_no_call_that_is_wrong_raises_the_term() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let secret = ClusterSecret::read_or_create(&disk.root.path().join("secret")).expect("made");
    let mut config = disk.config(&scheduler);
    config.cluster_secret = Some(secret.clone());
    let agent = Agent::start_with(config, &scheduler).await;
    let registered = scheduler.told(|told| told.registered[0].clone());
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", registered.address));
    let channel = endpoint.expect("an address").connect().await.expect("connected");
    let mut client = AgentClient::with_interceptor(channel, Prove::new(Some(&secret)));
    let term = || std::fs::read_to_string(disk.state().join("term")).unwrap_or_default();
    let (before, vm) = (term(), new_vm(1));

    let mut stranger = agent.client.clone();
    let refused = stranger.describe_vm(in_term(7, vm.clone())).await;
    assert_eq!(refused.expect_err("refused").code(), Code::Unauthenticated);
    let refused = client.describe_vm(in_term(u64::MAX, vm.clone())).await;
    assert_eq!(refused.expect_err("refused").code(), Code::FailedPrecondition);
    for wrong in [
        VmRef {
            vm_id: "web".into(),
            ..vm.clone()
        },
        VmRef {
            epoch: u64::MAX,
            ..vm.clone()
        },
    ] {
        let refused = client.destroy_vm(in_term(7, wrong)).await;
        assert_eq!(refused.expect_err("refused").code(), Code::InvalidArgument);
    }
    assert_eq!(term(), before);
    client.destroy_vm(in_term(7, vm.clone())).await.expect("obeyed");
    assert_eq!(term(), "7\n");
    let refused = client.destroy_vm(in_term(6, vm)).await.expect_err("over");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    agent.stop().await;
}

#[tokio::test]
async fn kvm_that_comes_back_is_found_and_told() {
    let scheduler = Scheduler::start();
    let disk = Disk::with_self_test(
        r#"test -e "$(dirname "$0")/kvm" || { echo 'no /dev/kvm' >&2; exit 1; }
        echo '{"kvm":"hardware","ring3_kernel":false,"reason":"not needed"}'"#,
    );
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let (kernel, vm) = (scheduler.add_blob(b"a kernel"), new_vm(1));
    scheduler.told(|told| {
        let first = &told.registered[0];
        assert_eq!(
            (first.software_kvm, first.kvm_trouble.as_str()),
            (None, "no /dev/kvm")
        );
    });
    std::fs::write(disk.root.path().join("kvm"), "").expect("written");
    // It is refused, and has KVM tested again.
    let refused = client
        .launch_vm(launch(&vm, &kernel, "hello"))
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    eventually("it is registered with KVM", || {
        scheduler.told(|told| {
            told.registered
                .last()
                .is_some_and(|last| last.software_kvm == Some(false))
        })
    })
    .await;
    client
        .launch_vm(launch(&vm, &kernel, "hello"))
        .await
        .expect("launched");
    client.destroy_vm(vm).await.expect("destroyed");
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_has_heard_of_a_later_lead_says_so_when_it_registers() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    assert_eq!(scheduler.told(|told| told.registered[0].term), 0);
    // The scheduler here leads in term 0.
    let mut client = agent.client.clone();
    client.destroy_vm(in_term(9, new_vm(1))).await.expect("obeyed");
    eventually("it has ended the session and says why", || {
        scheduler.told(|told| told.registered.last().is_some_and(|last| last.term == 9))
    })
    .await;
    agent.stop().await;
}

#[tokio::test]
async fn what_a_vm_writes_is_reported_and_reports_are_deltas_until_one_is_lost() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let kernel = scheduler.add_blob(b"a kernel");
    let vm = new_vm(1);
    client
        .launch_vm(launch(&vm, &kernel, "hello"))
        .await
        .expect("launched");
    eventually("the VMM's sample is in a report", || {
        let beating = scheduler.told(|told| told.beating()).unwrap_or_default();
        beating.iter().any(|facts| {
            facts.dirty_rate_bytes_per_second == Some(7 << 20) && facts.working_set_bytes == Some(9 << 20)
        })
    })
    .await;
    let wholes = scheduler.told(|told| {
        assert!(told.deltas > 0, "{} whole reports", told.wholes);
        told.lose_delta = true;
        told.wholes
    });
    eventually("a whole report in place of the one that was lost", || {
        scheduler.told(|told| told.wholes > wholes)
    })
    .await;
    assert_eq!(scheduler.told(|told| told.beating()).unwrap_or_default().len(), 1);
    client.destroy_vm(vm).await.expect("destroyed");
    eventually("it has left the reports", || {
        scheduler
            .told(|told| told.beating())
            .unwrap_or_default()
            .is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_failed_boot_is_told_in_the_vmms_words_and_leaves_nothing() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let kernel = scheduler.add_blob(b"a kernel");
    let refused = client
        .launch_vm(launch(&new_vm(1), &kernel, "bad"))
        .await
        .expect_err("refused");
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::InvalidArgument, "cmdline: it says bad")
    );
    assert!(disk.vmms().is_empty());

    let unknown = shoal_proto::node::Blob {
        sha256: "0".repeat(64),
        size_bytes: 3,
    };
    let refused = client
        .launch_vm(launch(&new_vm(1), &unknown, "x"))
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let refused = client
        .launch_vm(launch(&new_vm(1), &kernel, "crash"))
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("SIGABRT"), "{refused}");
    let evil = shoal_proto::node::Blob {
        sha256: "../../x".into(),
        size_bytes: 3,
    };
    let refused = client
        .launch_vm(launch(&new_vm(1), &evil, "x"))
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(disk.vmms().is_empty());
}

#[tokio::test]
async fn an_image_is_fetched_once_for_all_who_want_it() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let kernel = scheduler.add_blob(b"a kernel that takes several chunks");
    let vms = [new_vm(1), new_vm(1), new_vm(1)];
    let launches = vms.clone().map(|vm| {
        let (mut client, request) = (agent.client.clone(), launch(&vm, &kernel, "x"));
        tokio::spawn(async move { client.launch_vm(request).await })
    });
    for launched in launches {
        launched.await.expect("no panic").expect("launched");
    }
    assert_eq!(scheduler.told(|told| told.fetches), 1);
    for vm in vms {
        agent.client.clone().destroy_vm(vm).await.expect("destroyed");
    }
}

/// Of an image with a kernel for each kind of KVM.
fn launch_with_two_kernels(vm: &VmRef, scheduler: &Scheduler) -> LaunchVmRequest {
    let mut request = launch(vm, &scheduler.add_blob(b"a plain kernel"), "quiet -- sh");
    let spec = request.spec.as_mut().expect("a spec");
    spec.software_kvm = Some(SoftwareKvm {
        kernel: Some(scheduler.add_blob(b"a kernel in ring 3")),
        cmdline: "noapic".into(),
        max_cpus: 1,
    });
    request
}

#[tokio::test]
async fn the_kernel_for_the_hosts_kind_of_kvm_is_fetched_and_booted_and_no_other() {
    let software = r#"echo '{"kvm":"software","ring3_kernel":true,"reason":""}'"#;
    let cases = [
        (Disk::new(), Some(false), "quiet -- sh", "a plain kernel"),
        (
            Disk::with_self_test(software),
            Some(true),
            "quiet noapic -- sh",
            "a kernel in ring 3",
        ),
    ];
    for (disk, software, cmdline, kernel) in cases {
        let scheduler = Scheduler::start();
        let agent = Agent::start(&disk, &scheduler).await;
        assert_eq!(scheduler.told(|told| told.registered[0].software_kvm), software);
        let vm = new_vm(1);
        let request = launch_with_two_kernels(&vm, &scheduler);
        agent.client.clone().launch_vm(request).await.expect("launched");
        eventually("its command line is on its console", || {
            scheduler.told(|told| told.console_text(&vm.vm_id).starts_with(cmdline))
        })
        .await;
        let blobs = std::fs::read_dir(disk.state().join("blobs")).expect("the cache");
        let blobs = blobs.map(|blob| std::fs::read(blob.expect("an entry").path()).expect("a blob"));
        assert_eq!(blobs.collect::<Vec<_>>(), [kernel.as_bytes()]);
        agent.client.clone().destroy_vm(vm).await.expect("destroyed");
    }
}

#[tokio::test]
async fn what_the_self_test_found_is_told_and_keeps_from_starting_what_cannot_run() {
    let stuck = r#"echo '{"kvm":"software","ring3_kernel":false,"reason":"interrupts do not arrive"}'"#;
    let broken = "echo 'shoal-vmm: /dev/kvm: permission denied' >&2; exit 1";
    for (self_test, software, trouble) in [
        (stuck, Some(true), "interrupts do not arrive"),
        (broken, None, "/dev/kvm: permission denied"),
    ] {
        let (scheduler, disk) = (Scheduler::start(), Disk::with_self_test(self_test));
        let agent = Agent::start(&disk, &scheduler).await;
        let registered = scheduler.told(|told| told.registered[0].clone());
        assert_eq!(
            (registered.software_kvm, registered.kvm_trouble.as_str()),
            (software, trouble)
        );
        let mut client = agent.client.clone();
        let request = launch_with_two_kernels(&new_vm(1), &scheduler);
        let refused = client.launch_vm(request).await.expect_err("it cannot run");
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().ends_with(trouble), "{refused}");
        assert!(disk.vmms().is_empty() && scheduler.told(|told| told.fetches) == 0);
    }
}

#[tokio::test]
async fn exits_and_crashes_are_reported_at_once() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let kernel = scheduler.add_blob(b"a kernel");
    let vm = new_vm(1);
    client
        .launch_vm(launch(&vm, &kernel, "x"))
        .await
        .expect("launched");
    agent.tell(&vm, "exit 3").await;
    eventually("the exit is reported", || {
        let status = scheduler
            .told(|told| told.facts(&vm.vm_id))
            .and_then(|facts| facts.status);
        status.is_some_and(|status| status.state() == VmState::Exited && status.exit_status == Some(3))
    })
    .await;
    client.destroy_vm(vm).await.expect("destroyed");

    let vm = new_vm(1);
    client
        .launch_vm(launch(&vm, &kernel, "x"))
        .await
        .expect("launched");
    disk.process().kill().expect("killed");
    eventually("the crash is reported", || {
        let facts = scheduler.told(|told| told.facts(&vm.vm_id));
        facts.is_some_and(|facts| !facts.vmm_alive && facts.ran_here && facts.resident_bytes == 0)
    })
    .await;
    let facts = client
        .describe_vm(vm.clone())
        .await
        .expect("still known")
        .into_inner();
    let message = facts.status.expect("a status").status_message;
    assert!(message.contains("SIGKILL"), "{message}");
    client.destroy_vm(vm).await.expect("destroyed");
    assert!(disk.vmms().is_empty());
}

#[tokio::test]
async fn a_vmm_that_does_not_quit_is_killed() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let vm = new_vm(1);
    client
        .launch_vm(launch(&vm, &scheduler.add_blob(b"k"), "x"))
        .await
        .expect("launched");
    agent.tell(&vm, "deaf").await;
    let process = disk.process();
    client.destroy_vm(vm).await.expect("destroyed");
    assert!(!process.is_running() && disk.vmms().is_empty());
}

#[tokio::test]
async fn the_next_agent_adopts_what_lives_and_clears_away_what_does_not() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let kernel = scheduler.add_blob(b"a kernel");
    let [lives, crashes] = [new_vm(4), new_vm(5)];
    for vm in [&lives, &crashes] {
        agent
            .client
            .clone()
            .launch_vm(launch(vm, &kernel, "before "))
            .await
            .expect("launched");
    }
    let incoming = new_vm(6);
    agent
        .client
        .clone()
        .prepare_incoming(prepare(&incoming, MigrationId::new()))
        .await
        .expect("prepared");
    let locked = serve(disk.config(&scheduler)).await;
    assert!(matches!(locked, Err(AgentError::Locked(_))), "{locked:?}");
    agent.stop().await;

    let dir_of = |vm: &VmRef| disk.state().join(format!("vms/{}-{}", vm.vm_id, vm.epoch));
    let process = support::agent::identity(&dir_of(&lives));
    assert!(process.is_running(), "VMMs go on without an agent");
    for dead in [&crashes, &incoming] {
        let process = support::agent::identity(&dir_of(dead));
        process.kill().expect("killed");
        eventually("it has ended", || !process.is_running()).await;
    }
    std::fs::remove_file(dir_of(&lives).join("pid")).expect("as if the agent had died before it wrote it");
    // It does not answer either, for longer than it is asked.
    let pid = i32::try_from(process.pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    let stop = |pid| rustix::process::kill_process(pid, rustix::process::Signal::STOP);
    stop(pid.expect("a pid")).expect("stopped");

    let agent = Agent::start(&disk, &scheduler).await;
    assert_eq!(
        support::agent::identity(&dir_of(&lives)),
        process,
        "found without its word"
    );
    let mut client = agent.client.clone();
    let facts = client
        .describe_vm(lives.clone())
        .await
        .expect("adopted")
        .into_inner();
    let status = facts.status.expect("a status");
    assert_eq!(
        (facts.vmm_alive, status.state(), status.pid),
        (true, VmState::Running, process.pid)
    );
    let facts = client
        .describe_vm(crashes.clone())
        .await
        .expect("still known")
        .into_inner();
    assert_eq!((facts.vmm_alive, facts.ran_here), (false, true));
    assert!(!dir_of(&incoming).exists(), "it never ran");

    agent.tell(&lives, "say after").await;
    eventually("the console goes on", || {
        scheduler.told(|told| told.console_text(&lives.vm_id)) == "before after"
    })
    .await;
    for vm in [lives, crashes] {
        client.destroy_vm(vm).await.expect("destroyed");
    }
    assert!(!process.is_running() && disk.vmms().is_empty());
}

#[tokio::test]
async fn a_pid_file_that_names_no_process_that_runs_leaves_no_vmm_alone() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let vm = new_vm(1);
    let agent = Agent::start(&disk, &scheduler).await;
    agent
        .client
        .clone()
        .launch_vm(launch(&vm, &scheduler.add_blob(b"k"), "x"))
        .await
        .expect("launched");
    agent.stop().await;
    let dir = disk.state().join(format!("vms/{}-{}", vm.vm_id, vm.epoch));
    let process = support::agent::identity(&dir);
    let dead = shoal_agent::ProcessIdentity {
        start_ticks: process.start_ticks + 1,
        ..process
    };
    let of_another_boot = shoal_agent::ProcessIdentity {
        boot_id: Some(uuid::Uuid::from_u128(1)),
        ..process
    };
    for wrong in [dead, of_another_boot] {
        std::fs::write(dir.join("pid"), format!("{wrong}\n")).expect("written");
        // Without this word it would be cleared away.
        let _ = std::fs::remove_file(dir.join("ran"));
        let agent = Agent::start(&disk, &scheduler).await;
        assert_eq!(support::agent::identity(&dir), process);
        agent.stop().await;
    }
    let agent = Agent::start(&disk, &scheduler).await;
    agent.client.clone().destroy_vm(vm).await.expect("destroyed");
    assert!(!process.is_running() && disk.vmms().is_empty());
}

#[tokio::test]
async fn what_the_scheduler_missed_is_sent_again() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let vm = new_vm(1);
    agent
        .client
        .clone()
        .launch_vm(launch(&vm, &scheduler.add_blob(b"k"), "one "))
        .await
        .expect("launched");
    eventually("the first word", || {
        scheduler.told(|told| told.console_text(&vm.vm_id)) == "one "
    })
    .await;

    scheduler.told(|told| told.acknowledge = false);
    agent.tell(&vm, "say two ").await;
    eventually("the second word", || {
        scheduler.told(|told| told.console_text(&vm.vm_id)) == "one two "
    })
    .await;
    scheduler.told(|told| {
        told.console.remove(&vm.vm_id);
        told.console.insert(vm.vm_id.clone(), vec![(0, b"one ".to_vec())]);
        told.acknowledge = true;
        told.heartbeat = None;
    });
    let scheduler = scheduler
        .restart(async || agent.tell(&vm, "say three").await)
        .await;
    eventually("nothing is missing", || {
        scheduler.told(|told| told.console_text(&vm.vm_id)) == "one two three"
    })
    .await;
    eventually("every VM is reported again", || {
        scheduler
            .told(|told| told.beating())
            .is_some_and(|beating| beating.len() == 1)
    })
    .await;
    agent.client.clone().destroy_vm(vm).await.expect("destroyed");
}

#[tokio::test]
async fn an_acknowledgement_that_was_lost_is_asked_for_again() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    scheduler.told(|told| told.acknowledge = false);
    let vm = new_vm(1);
    let kernel = scheduler.add_blob(b"k");
    agent
        .client
        .clone()
        .launch_vm(launch(&vm, &kernel, "one "))
        .await
        .expect("launched");
    eventually("the first word", || {
        scheduler.told(|told| told.console_text(&vm.vm_id)) == "one "
    })
    .await;
    scheduler.told(|told| told.acknowledge = true);
    agent.tell(&vm, "say two").await;
    eventually("the next word", || {
        scheduler.told(|told| told.console_text(&vm.vm_id)) == "one two"
    })
    .await;
    agent.client.clone().destroy_vm(vm).await.expect("destroyed");
}

#[tokio::test]
async fn an_incoming_migration_is_aborted_or_was_committed() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let migration = MigrationId::new();
    let prepared = async |vm: &VmRef| {
        let answer = agent
            .client
            .clone()
            .prepare_incoming(prepare(vm, migration))
            .await
            .expect("prepared");
        assert_eq!(answer.into_inner().address, "127.0.0.1:9");
    };

    let uncommitted = new_vm(2);
    prepared(&uncommitted).await;
    let facts = client
        .describe_vm(uncommitted.clone())
        .await
        .expect("here")
        .into_inner();
    assert_eq!(
        (facts.status.expect("a status").state(), facts.ran_here),
        (VmState::Incoming, false)
    );
    let process = disk.process();
    let answer = client
        .abort_incoming(abort(&uncommitted, migration))
        .await
        .expect("answered");
    assert!(!answer.into_inner().committed);
    assert!(!process.is_running() && disk.vmms().is_empty());
    let late = client
        .prepare_incoming(prepare(&uncommitted, migration))
        .await
        .expect_err("never again");
    assert_eq!(late.code(), Code::Aborted);

    let committed = new_vm(2);
    prepared(&committed).await;
    agent.tell(&committed, "commit").await;
    for _ in 0..2 {
        let answer = client
            .abort_incoming(abort(&committed, migration))
            .await
            .expect("answered");
        assert!(answer.into_inner().committed);
        assert!(disk.process().is_running());
    }
    client.destroy_vm(committed).await.expect("destroyed");
}

#[tokio::test]
async fn a_vm_is_taken_over_by_a_second_vmm_on_its_node() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let kernel = scheduler.add_blob(b"a kernel");
    let at = |vm: &VmRef, epoch| VmRef { epoch, ..vm.clone() };
    let vm = new_vm(1);
    client
        .launch_vm(launch(&vm, &kernel, "hello"))
        .await
        .expect("launched");
    let refused = client
        .prepare_incoming(prepare(&at(&vm, 2), MigrationId::new()))
        .await
        .expect_err("a source elsewhere cannot be");
    assert_eq!(refused.code(), Code::FailedPrecondition);

    let within = |epoch| PrepareIncomingRequest {
        source_node: disk.config(&scheduler).node.to_string(),
        ..prepare(&at(&vm, epoch), MigrationId::new())
    };
    let address = client
        .prepare_incoming(within(3))
        .await
        .expect("prepared")
        .into_inner()
        .address;
    assert!(
        address.starts_with("unix:/") && address.ends_with("-3/migration.sock"),
        "{address}"
    );
    let start = StartMigrationRequest {
        vm: Some(vm.clone()),
        migration: Some(vm::StartMigrationRequest::default()),
        ..StartMigrationRequest::default()
    };
    client
        .start_migration(start.clone())
        .await
        .expect("the source's epoch is no old one");
    let refused = client
        .prepare_incoming(within(4))
        .await
        .expect_err("one at a time");
    assert_eq!(refused.code(), Code::FailedPrecondition);

    // It is given up: the source may be resumed, and another attempt made, also by the next agent.
    let answer = client
        .abort_incoming(abort(&at(&vm, 3), MigrationId::new()))
        .await;
    assert!(!answer.expect("answered").into_inner().committed);
    client.resume_vm(vm.clone()).await.expect("it goes on");
    agent.stop().await;
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    client.resume_vm(vm.clone()).await.expect("it still may");
    client.prepare_incoming(within(5)).await.expect("prepared");
    agent.tell(&at(&vm, 5), "commit").await;

    // It ran: whatever is asked of the source comes too late, also when nothing of the new one is left.
    let refused = client.resume_vm(vm.clone()).await.expect_err("too late");
    assert_eq!(refused.code(), Code::Aborted);
    client.destroy_vm(at(&vm, 5)).await.expect("destroyed");
    let refused = client.start_migration(start).await.expect_err("too late");
    assert_eq!(refused.code(), Code::Aborted);
    client.destroy_vm(vm).await.expect("destroyed");
    assert!(disk.vmms().is_empty());
}

#[tokio::test]
async fn a_vm_is_paused_at_its_epoch_and_taken_over_as_it_is() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let kernel = scheduler.add_blob(b"a kernel");
    let vm = new_vm(2);
    client
        .launch_vm(launch(&vm, &kernel, "hello"))
        .await
        .expect("launched");
    let older = VmRef {
        epoch: 1,
        ..vm.clone()
    };
    let refused = client.pause_vm(older).await.expect_err("another incarnation");
    assert_eq!(refused.code(), Code::Aborted);
    for _ in 0..2 {
        let paused = client.pause_vm(vm.clone()).await.expect("paused");
        assert_eq!(paused.into_inner().state(), VmState::Paused);
    }
    agent.stop().await;
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let facts = client.describe_vm(vm.clone()).await.expect("it is there");
    let status = facts.into_inner().status.unwrap_or_default();
    assert_eq!(status.state(), VmState::Paused);

    let newer = VmRef {
        epoch: 3,
        ..vm.clone()
    };
    let within = PrepareIncomingRequest {
        source_node: disk.config(&scheduler).node.to_string(),
        ..prepare(&newer, MigrationId::new())
    };
    client
        .prepare_incoming(within)
        .await
        .expect("one that is paused is taken over, too");
    client.destroy_vm(newer).await.expect("destroyed");
    let resumed = client.resume_vm(vm.clone()).await.expect("that one never ran");
    assert_eq!(resumed.into_inner().state(), VmState::Running);
    client.destroy_vm(vm).await.expect("destroyed");
    assert!(disk.vmms().is_empty());
}

#[tokio::test]
async fn after_the_vmm_has_died_its_mark_tells_whether_it_was_committed() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let migration = MigrationId::new();
    for ran in [false, true] {
        let vm = new_vm(2);
        client
            .prepare_incoming(prepare(&vm, migration))
            .await
            .expect("prepared");
        if ran {
            agent.tell(&vm, "commit").await;
        }
        let process = disk.process();
        process.kill().expect("killed");
        eventually("it has ended", || !process.is_running()).await;
        let answer = client
            .abort_incoming(abort(&vm, migration))
            .await
            .expect("answered");
        assert_eq!(answer.into_inner().committed, ran);
        client.destroy_vm(vm).await.expect("destroyed");
        assert!(disk.vmms().is_empty());
    }
}

#[tokio::test]
async fn an_abort_before_the_preparation_wins() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let (vm, migration) = (new_vm(7), MigrationId::new());
    let answer = client
        .abort_incoming(abort(&vm, migration))
        .await
        .expect("answered");
    assert!(!answer.into_inner().committed);
    let late = client
        .prepare_incoming(prepare(&vm, migration))
        .await
        .expect_err("refused");
    assert_eq!(late.code(), Code::Aborted);
    assert!(disk.vmms().is_empty());
}

#[tokio::test]
async fn a_vm_is_not_started_beside_itself() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let kernel = scheduler.add_blob(b"a kernel");
    let vm = new_vm(1);
    client
        .launch_vm(launch(&vm, &kernel, "x"))
        .await
        .expect("launched");
    let newer = VmRef {
        epoch: 2,
        ..vm.clone()
    };
    let beside = client
        .launch_vm(launch(&newer, &kernel, "x"))
        .await
        .expect_err("refused");
    assert_eq!(beside.code(), Code::FailedPrecondition, "{beside}");
    let beside = client
        .prepare_incoming(prepare(&newer, MigrationId::new()))
        .await
        .expect_err("refused");
    assert_eq!(beside.code(), Code::FailedPrecondition, "{beside}");
    assert!(disk.process().is_running());
    client.destroy_vm(vm).await.expect("destroyed");
    client
        .launch_vm(launch(&newer, &kernel, "x"))
        .await
        .expect("now it may");
    client.destroy_vm(newer).await.expect("destroyed");
}

#[tokio::test]
async fn a_watched_migration_ends_with_the_vmm_and_says_so() {
    let (scheduler, disk) = (Scheduler::start(), Disk::new());
    let agent = Agent::start(&disk, &scheduler).await;
    let mut client = agent.client.clone();
    let vm = new_vm(1);
    client
        .launch_vm(launch(&vm, &scheduler.add_blob(b"k"), "x"))
        .await
        .expect("launched");
    let migration_id = MigrationId::new().to_string();
    let watch = WatchMigrationRequest {
        vm: Some(vm.clone()),
        migration_id: migration_id.clone(),
    };
    let unknown = client
        .watch_migration(watch.clone())
        .await
        .expect_err("there is none");
    assert_eq!(unknown.code(), Code::NotFound);
    let migration = vm::StartMigrationRequest {
        migration_id,
        ..vm::StartMigrationRequest::default()
    };
    let start = StartMigrationRequest {
        vm: Some(vm.clone()),
        migration: Some(migration),
        ..StartMigrationRequest::default()
    };
    client.start_migration(start).await.expect("started");
    let mut progress = client.watch_migration(watch).await.expect("watched").into_inner();
    assert_eq!(
        progress
            .message()
            .await
            .expect("progress")
            .expect("a message")
            .pass,
        1
    );
    disk.process().kill().expect("killed");
    let end = progress.message().await.expect_err("the VMM is gone");
    assert_eq!(end.code(), Code::Unavailable);
    assert!(end.message().contains("SIGKILL"), "{}", end.message());
    client.destroy_vm(vm).await.expect("destroyed");
}
