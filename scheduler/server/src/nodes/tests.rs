use shoal_plan::Estimate;

use super::observed::MOST_CPUS;
use super::*;
use crate::record::{Cordon, NodeRecord, NodeWishes};
use crate::store::Term;

fn entry() -> NodeEntry {
    let record = NodeRecord {
        name: "node1".parse().expect("a name"),
        address: "127.0.0.1:1".to_owned(),
        cpus: 4,
        memory_bytes: 1 << 30,
        migration_tls: false,
        cordon: Cordon::Open,
        cpu: None,
        cpu_model: String::new(),
        kvm: None,
        kvm_trouble: String::new(),
        wishes: NodeWishes::default(),
        lost: None,
        removed: false,
    };
    NodeEntry::new(record, true, Caller::new(Term::default(), None)).expect("an address")
}

impl NodeEntry {
    /// As if the last report, or the scheduler's start, lay so far back.
    pub fn silence(&self, time: Duration) {
        let mut inner = self.lock();
        let then = Instant::now()
            .checked_sub(time)
            .expect("the host runs for longer");
        inner.since = then;
        inner.last_report = inner.last_report.map(|_| then);
    }
}

fn vm(dirty_rate: Option<u64>) -> ((VmId, Epoch), Arc<node::VmFacts>) {
    let facts = node::VmFacts {
        dirty_rate_bytes_per_second: dirty_rate,
        working_set_bytes: dirty_rate,
        resident_bytes: 1 << 20,
        ..node::VmFacts::default()
    };
    let id = "7d9f2f0e-5b7c-4c1e-9a66-5d1a55c0ffee".parse().expect("an id");
    ((id, Epoch(1)), Arc::new(facts))
}

fn busy() -> node::Heartbeat {
    node::Heartbeat {
        cpu_use: 4.0,
        run_queue: 4.0,
        memory_available_bytes: 1 << 29,
        ..node::Heartbeat::default()
    }
}

#[tokio::test]
async fn a_silent_node_is_suspect_and_then_lost() {
    let entry = entry();
    assert_eq!(entry.liveness_change(), None, "it has had no chance yet");
    entry.heartbeat(&busy(), Vec::new());
    assert_eq!(entry.liveness_change(), None);
    for (silent_s, expected, reachable) in [
        (4, Liveness::Live, true),
        (5, Liveness::Suspect, false),
        (29, Liveness::Suspect, false),
        (30, Liveness::Lost, false),
    ] {
        entry.silence(Duration::from_secs(silent_s));
        assert_eq!(
            (entry.liveness(), entry.is_reachable()),
            (expected, reachable),
            "{silent_s} s"
        );
    }
    entry.silence(Duration::from_secs(6));
    assert_eq!(entry.liveness_change(), Some(Liveness::Suspect));
    assert_eq!(entry.liveness_change(), None, "told once");
    entry.silence(Duration::from_secs(31));
    assert_eq!(entry.liveness_change(), Some(Liveness::Lost));
    entry.heartbeat(&busy(), Vec::new());
    assert_eq!(entry.liveness_change(), Some(Liveness::Live));
}

#[tokio::test]
async fn one_that_never_reports_is_lost_too() {
    let entry = entry();
    entry.silence(Duration::from_secs(31));
    assert_eq!(entry.liveness_change(), Some(Liveness::Lost));
    assert_eq!(entry.silent_for(), None);
}

#[tokio::test]
async fn what_a_lost_node_was_like_is_forgotten_and_a_suspect_one_is_known() {
    let entry = entry();
    entry.heartbeat(&busy(), vec![vm(Some(8 << 20))]);
    let idle = node::Heartbeat {
        memory_available_bytes: 1 << 30,
        ..node::Heartbeat::default()
    };
    entry.silence(Duration::from_secs(10));
    entry.heartbeat(&idle, vec![vm(Some(0))]);
    let (key, _) = vm(None);
    let dirty = |entry: &NodeEntry| {
        let seen = entry.observed_vm(key.0, key.1).expect("reported");
        seen.dirty_rate.expect("sampled").value()
    };
    assert_eq!(dirty(&entry), 7 << 20);
    entry.silence(Duration::from_secs(60));
    let (sender, _) = mpsc::channel(1);
    entry
        .begin_session(entry.record(), 7, sender)
        .expect("an address");
    entry.heartbeat(&idle, vec![vm(Some(0))]);
    assert_eq!(dirty(&entry), 0);
}

#[tokio::test]
async fn a_vm_that_is_not_sampled_has_no_dirty_rate() {
    let entry = entry();
    let (key, facts) = vm(None);
    entry.heartbeat(&busy(), vec![(key, facts)]);
    let seen = entry.observed_vm(key.0, key.1).expect("reported");
    assert_eq!((seen.dirty_rate, seen.working_set), (None, None));
    entry.heartbeat(&busy(), vec![vm(Some(4096))]);
    entry.heartbeat(&busy(), vec![vm(None)]);
    let seen = entry.observed_vm(key.0, key.1).expect("reported");
    assert_eq!(seen.dirty_rate, None, "a value that is not kept up is not kept");
}

#[tokio::test]
async fn what_a_vm_wants_is_known_once_its_agent_says_so() {
    let entry = entry();
    let (key, facts) = vm(None);
    entry.heartbeat(&busy(), vec![(key, Arc::clone(&facts))]);
    let demand = || entry.observed_vm(key.0, key.1).expect("reported").demand();
    assert_eq!(demand(), None);
    for (mean, error, known) in [
        (
            0.5,
            Some(0.1),
            Estimate {
                mean: 0.5,
                error: 0.1,
            },
        ),
        (0.5, None, Estimate::exactly(0.5)),
        (
            f64::NAN,
            Some(f64::INFINITY),
            Estimate {
                mean: 0.0,
                error: MOST_CPUS,
            },
        ),
    ] {
        let facts = node::VmFacts {
            cpu_demand: Some(mean),
            cpu_demand_error: error,
            ..(*facts).clone()
        };
        entry.heartbeat(&busy(), vec![(key, Arc::new(facts))]);
        assert_eq!(demand(), Some(known));
    }
}

#[tokio::test]
async fn what_is_told_of_the_host_is_made_usable() {
    let entry = entry();
    entry.heartbeat(&busy(), Vec::new());
    assert_eq!(entry.host_cpu(), None, "an agent that does not tell");
    entry.set_host("b4a1f0ee-0000-4000-8000-000000000000", 8);
    let told = node::Heartbeat {
        other_cpu: Some(f64::INFINITY),
        other_cpu_error: Some(-1.0),
        vmm_cpu: Some(f64::NAN),
        ..busy()
    };
    entry.heartbeat(&told, Vec::new());
    let host = entry.host_cpu().expect("told");
    assert!(host.host.is_some() && host.host_cpus == 8 && host.lends == 4);
    assert_eq!((host.other, host.vmms), (Estimate::exactly(MOST_CPUS), 0.0));
    entry.set_host(&"x".repeat(65), 8);
    assert_eq!(entry.host_cpu().expect("told").host, None);
}

#[tokio::test]
async fn speeds_and_quotas_that_cannot_be_are_not_known() {
    let entry = entry();
    for (told, known) in [
        (0.0, None),
        (f64::NAN, None),
        (-1.0, None),
        (f64::INFINITY, None),
        (1.5, Some(1.5)),
    ] {
        entry.set_cpu_speed(told);
        assert_eq!(entry.cpu_speed(), known, "{told}");
        entry.set_cpu_quota(Some(told));
        assert_eq!(entry.cpu_quota(), known, "{told}");
    }
}
