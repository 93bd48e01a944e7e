//! Four VMs on one node fill their memory until they cannot all stay. Simulated in steps, with reports, smoothing and
//! migrations that take their time, so that the whole loop is tried and not one round.

use std::time::Duration;

use shoal_plan::{
    ActionKind, Bytes, BytesPerSecond, ClusterSnapshot, Estimate, Growth, InFlight, NodeView, Policy, VmView,
    round, urgent,
};

const STEP: f64 = 0.1;
const MIB: f64 = 1048576.0;

struct Guest {
    started: f64,
    fill: f64,
    rate: f64,
    node: usize,
    /// Destination and bytes received there.
    moving: Option<(usize, f64)>,
    growth: Growth,
    moved_at: Option<f64>,
}

impl Guest {
    fn resident(&self, now: f64) -> f64 {
        6.0 * MIB + (self.rate * (now - self.started).max(0.0)).min(self.fill)
    }
}

struct Simulation {
    policy: Policy,
    nodes: usize,
    memory: f64,
    guests: Vec<Guest>,
    now: f64,
    snapshot: ClusterSnapshot,
    /// When, kind, VM, to.
    moves: Vec<(f64, ActionKind, String, String)>,
    highest: f64,
    /// Also moves for balance, not only those that must be.
    balance: bool,
}

impl Simulation {
    fn new(guests: Vec<Guest>, policy: Policy, balance: bool) -> Self {
        Self {
            policy,
            nodes: 3,
            memory: 1024.0 * MIB,
            guests,
            now: 0.0,
            snapshot: ClusterSnapshot::default(),
            moves: Vec::new(),
            highest: 0.0,
            balance,
        }
    }

    fn used(&self, node: usize) -> f64 {
        let here = self
            .guests
            .iter()
            .filter(|guest| guest.node == node)
            .map(|guest| guest.resident(self.now));
        let arriving = self
            .guests
            .iter()
            .filter_map(|guest| guest.moving.filter(|moving| moving.0 == node));
        here.sum::<f64>() + arriving.map(|moving| moving.1).sum::<f64>()
    }

    /// Pages move, the link of each source shared by its moves; a move ends when all is there.
    fn transfer(&mut self) {
        for node in 0..self.nodes {
            let here = |guest: &&Guest| guest.node == node && guest.moving.is_some();
            let moving = self.guests.iter().filter(here).count() as f64;
            for guest in self.guests.iter_mut().filter(|guest| guest.node == node) {
                let resident = guest.resident(self.now);
                let Some((to, received)) = &mut guest.moving else {
                    continue;
                };
                *received += self.policy.link_rate.0 as f64 * STEP / moving;
                if *received >= resident {
                    (guest.node, guest.moving, guest.moved_at) = (*to, None, Some(self.now));
                    guest.growth = Growth::default();
                }
            }
        }
    }

    fn report(&mut self) {
        let name = |node: usize| format!("node{}", node + 1);
        let mut snapshot = ClusterSnapshot::default();
        for node in 0..self.nodes {
            let mut view = NodeView::new(&name(node), 4, bytes(self.memory));
            view.memory_available = bytes(self.memory - self.used(node));
            snapshot.nodes.push(view);
        }
        for (number, guest) in self.guests.iter_mut().enumerate() {
            let mut vm = VmView::new(
                &format!("vm{}", number + 1),
                &name(guest.node),
                1,
                Bytes::mib(384),
            );
            let resident = bytes(guest.resident(self.now));
            vm.resident = Some(resident);
            vm.growth = guest.growth.update(resident, Duration::from_secs(1));
            vm.cpu = Some(Estimate::exactly(0.3));
            vm.in_flight = guest.moving.map(|(to, received)| InFlight {
                to: NodeView::new(&name(to), 1, Bytes(0)).name,
                received: bytes(received),
            });
            vm.since_last_move = guest.moved_at.map(|at| Duration::from_secs_f64(self.now - at));
            snapshot.vms.push(vm);
        }
        self.snapshot = snapshot;
    }

    fn plan(&mut self) {
        let decide = if self.balance { round } else { urgent };
        let plan = decide(&self.snapshot, &self.policy);
        for action in plan.actions {
            let number: usize = action.vm.as_str()[2..].parse().expect("our own id");
            let to: usize = action.to.as_str()[4..].parse().expect("our own name");
            self.guests[number - 1].moving = Some((to - 1, 0.0));
            self.moves.push((
                self.now,
                action.kind,
                action.vm.to_string(),
                action.to.to_string(),
            ));
        }
    }

    fn run(&mut self, seconds: f64) {
        let mut next_report = 0.7;
        let mut next_round = 1.0;
        let end = self.now + seconds;
        while self.now < end {
            self.now += STEP;
            self.transfer();
            if self.now >= next_report {
                self.report();
                next_report += 1.0;
            }
            if self.now >= next_round {
                self.plan();
                next_round += 1.0;
            }
            for node in 0..self.nodes {
                self.highest = self.highest.max(self.used(node) / self.memory);
            }
        }
    }
}

fn guests(rate_mib: f64, apart: f64) -> Vec<Guest> {
    let guest = |number: u32| Guest {
        started: f64::from(number) * apart,
        fill: 320.0 * MIB,
        rate: rate_mib * MIB,
        node: 0,
        moving: None,
        growth: Growth::default(),
        moved_at: None,
    };
    (0..4).map(guest).collect()
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // float casts saturate
fn bytes(amount: f64) -> Bytes {
    Bytes(amount as u64)
}

/// Rates from slow to a third of the slowest link, starts at once and apart, links from 1 to 12 Gbit/s.
fn every_case(balance: bool, check: impl Fn(&Simulation, &str)) {
    for rate in [5.0, 10.0, 20.0, 30.0, 40.0] {
        for apart in [0.0, 0.3, 1.0, 3.0] {
            for link_mib in [119, 400, 1500] {
                let policy = Policy {
                    link_rate: BytesPerSecond(link_mib << 20),
                    ..Policy::default()
                };
                let mut simulation = Simulation::new(guests(rate, apart), policy, balance);
                simulation.run(120.0);
                let moves = &simulation.moves;
                let case = format!("{rate} MiB/s, {apart} s apart, link {link_mib} MiB/s: {moves:?}");
                check(&simulation, &case);
            }
        }
    }
}

#[test]
fn ushering_moves_in_time_no_more_than_needed_and_stops() {
    every_case(false, |simulation, case| {
        assert!(
            simulation.highest <= 0.90,
            "a node reached {:.3}: {case}",
            simulation.highest
        );
        assert!(
            simulation
                .moves
                .iter()
                .all(|(_, kind, ..)| *kind == ActionKind::Usher),
            "{case}"
        );
        assert_eq!(
            simulation.moves.len(),
            2,
            "two VMs fit on the node, the others must go: {case}"
        );
    });
}

#[test]
fn balancing_at_the_same_time_does_no_harm() {
    every_case(true, |simulation, case| {
        assert!(
            simulation.highest <= 0.90,
            "a node reached {:.3}: {case}",
            simulation.highest
        );
        assert!((2..=3).contains(&simulation.moves.len()), "{case}");
    });
}
