//! Deltas, applied, give what a whole report would have said; and nothing that a stream can bring does harm.

use std::collections::BTreeMap;

use proptest::prelude::*;
use shoal_proto::node::agent_report::Report as Message;
use shoal_proto::node::{Heartbeat, HeartbeatDelta, NumaNode, Pressure, VmDelta, VmFacts};
use shoal_proto::vm::VmStatus;
use shoal_report::{Decoder, Encoder, Gap, Report, Thresholds, WHOLE_EVERY};

fn vm(id: u64) -> impl Strategy<Value = VmFacts> {
    (
        (1_u64..3, 0_i32..4, any::<bool>()),
        (0_u64..8 << 20, 0.0..4.0_f64),
        prop::option::of(0.0..1.0_f64),
        (prop::option::of(0_u64..8 << 20), prop::option::of(0_u64..1 << 30)),
        prop::option::of(0_u64..1 << 20),
    )
        .prop_map(
            move |((epoch, state, alive), (resident, cpu_use), steal, (dirty, set), io)| VmFacts {
                status: Some(VmStatus {
                    vm_id: format!("vm{id}"),
                    epoch,
                    state,
                    ..VmStatus::default()
                }),
                vmm_alive: alive,
                resident_bytes: resident,
                cpu_use,
                ran_here: !alive,
                cpu_steal: steal,
                dirty_rate_bytes_per_second: dirty,
                working_set_bytes: set,
                read_bytes_per_second: io,
                write_bytes_per_second: io.map(|rate| rate / 2),
                handle: 0,
                cpu_demand: steal.map(|cpus| 2.0 * cpus),
                cpu_demand_error: steal,
            },
        )
}

fn heartbeat() -> impl Strategy<Value = Heartbeat> {
    let vms = prop::collection::vec(any::<bool>(), 5).prop_flat_map(|there| {
        let there = (0..).zip(there).filter(|(_, there)| *there);
        there.map(|(id, _)| vm(id)).collect::<Vec<_>>()
    });
    let percent = || prop::option::of(0.0..100.0_f64);
    let rate = || prop::option::of(0_u64..1 << 20);
    (
        (0_u64..4 << 20, 0.0..4.0_f64, 0_u32..9),
        (percent(), percent(), percent()),
        (rate(), rate()),
        0_u64..1 << 30,
        vms,
    )
        .prop_map(
            |((memory, cpu_use, queue), (cpu, mem, io), (swap, network), numa, vms)| Heartbeat {
                memory_available_bytes: memory,
                cpu_use,
                run_queue: queue.into(),
                pressure: Some(Pressure { cpu, memory: mem, io }),
                vms,
                swap_in_bytes_per_second: swap,
                swap_out_bytes_per_second: swap,
                network_receive_bytes_per_second: network,
                network_transmit_bytes_per_second: network,
                numa: vec![NumaNode {
                    id: 0,
                    cpus: 2,
                    memory_bytes: 1 << 30,
                    memory_available_bytes: numa,
                }],
                sequence: 0,
                other_cpu: cpu,
                other_cpu_error: mem,
                vmm_cpu: Some(cpu_use),
            },
        )
}

/// What the scheduler is to see, by id and epoch, without what only the stream needs.
fn plain(report: &Report) -> (Heartbeat, BTreeMap<(String, u64), VmFacts>) {
    let vms = report.vms.values().map(|vm| VmFacts {
        handle: 0,
        ..VmFacts::clone(vm)
    });
    let by_key = vms.map(|vm| {
        let status = vm.status.clone().expect("a status");
        ((status.vm_id, status.epoch), vm)
    });
    let node = Heartbeat {
        sequence: 0,
        ..report.node.clone()
    };
    (node, by_key.collect())
}

fn decode(decoder: &mut Decoder, message: Message) -> Result<Report, Gap> {
    match message {
        Message::Heartbeat(whole) => Ok(decoder.whole(whole).clone()),
        Message::Delta(delta) => decoder.delta(delta).cloned(),
        other => panic!("no report: {other:?}"),
    }
}

fn near(sent: f64, now: f64, absolute: f64, relative: f64) -> bool {
    (sent - now).abs() <= absolute.max(relative * sent.abs())
}

#[expect(clippy::cast_precision_loss, reason = "small")]
fn near_option(sent: Option<u64>, now: Option<u64>, absolute: f64, relative: f64) -> bool {
    match (sent, now) {
        (Some(sent), Some(now)) => near(sent as f64, now as f64, absolute, relative),
        (sent, now) => sent == now,
    }
}

proptest! {
    /// With thresholds of nothing, deltas give exactly what is so.
    #[test]
    fn deltas_applied_are_the_whole(steps in prop::collection::vec(heartbeat(), 1..40), phase in any::<u32>()) {
        let (mut encoder, mut decoder) = (Encoder::new(Thresholds::EXACT, phase), Decoder::default());
        for now in steps {
            let seen = decode(&mut decoder, encoder.encode(now.clone())).expect("no gap");
            prop_assert_eq!(plain(&seen), plain(&Report::from(now)));
        }
    }

    /// With those that agents use, no figure is further off than its threshold, and every state is right.
    #[test]
    fn what_is_left_out_is_small(steps in prop::collection::vec(heartbeat(), 1..40)) {
        let limits = Thresholds::DEFAULT;
        let (mut encoder, mut decoder) = (Encoder::new(limits, WHOLE_EVERY - 1), Decoder::default());
        for now in steps {
            let seen = decode(&mut decoder, encoder.encode(now.clone())).expect("no gap");
            let (seen, truth) = (plain(&seen), plain(&Report::from(now)));
            prop_assert!(near(seen.0.cpu_use, truth.0.cpu_use, limits.cpu.absolute, limits.cpu.relative));
            prop_assert!(near_option(
                Some(seen.0.memory_available_bytes), Some(truth.0.memory_available_bytes),
                limits.memory.absolute, limits.memory.relative));
            prop_assert!(near_option(
                seen.0.swap_in_bytes_per_second, truth.0.swap_in_bytes_per_second,
                limits.rate.absolute, limits.rate.relative));
            prop_assert_eq!(seen.1.keys().collect::<Vec<_>>(), truth.1.keys().collect::<Vec<_>>());
            for (seen, truth) in seen.1.values().zip(truth.1.values()) {
                prop_assert_eq!(&seen.status, &truth.status);
                prop_assert_eq!((seen.vmm_alive, seen.ran_here), (truth.vmm_alive, truth.ran_here));
                prop_assert!(near_option(
                    Some(seen.resident_bytes), Some(truth.resident_bytes), limits.memory.absolute, 0.0));
                prop_assert!(near_option(
                    seen.dirty_rate_bytes_per_second, truth.dirty_rate_bytes_per_second,
                    limits.dirty_rate.absolute, limits.dirty_rate.relative));
            }
        }
    }

    /// A report that is lost is noticed at the next, and mended by a whole one.
    #[test]
    fn a_gap_is_noticed_and_mended(steps in prop::collection::vec(heartbeat(), 4..10), lost in 1_usize..3) {
        let (mut encoder, mut decoder) = (Encoder::new(Thresholds::EXACT, WHOLE_EVERY - 1), Decoder::default());
        for (number, now) in steps.into_iter().enumerate() {
            let message = encoder.encode(now.clone());
            if number == lost {
                continue;
            }
            let seen = decode(&mut decoder, message);
            if number == lost + 1 {
                prop_assert!(matches!(seen, Err(Gap::Sequence { .. })), "{seen:?}");
                encoder.want_whole();
            } else {
                prop_assert_eq!(plain(&seen.expect("no gap")), plain(&Report::from(now)));
            }
        }
    }

    /// Whatever comes, nothing panics, and what does not fit is refused until there is a whole report again.
    #[test]
    fn hostile_deltas_are_refused(
        first in 0_u64..3,
        deltas in prop::collection::vec((0_u64..6, prop::collection::vec(0_u32..4, 0..3), prop::collection::vec(0_u32..4, 0..3), prop::collection::vec(0_u32..4, 0..3)), 0..12),
    ) {
        let mut decoder = Decoder::default();
        decoder.whole(Heartbeat { sequence: first, ..Heartbeat::default() });
        let mut broken = false;
        for (sequence, new, changed, gone) in deltas {
            let delta = HeartbeatDelta {
                sequence,
                new_vms: new.into_iter().map(|handle| VmFacts { handle, ..VmFacts::default() }).collect(),
                vms: changed.into_iter().map(|handle| VmDelta { handle, cpu_use: Some(f64::NAN), ..VmDelta::default() }).collect(),
                gone,
                ..HeartbeatDelta::default()
            };
            match decoder.delta(delta) {
                Ok(_) => prop_assert!(!broken),
                Err(_) => broken = true,
            }
        }
    }
}

#[test]
fn a_quiet_node_says_next_to_nothing() {
    let quiet = Heartbeat {
        memory_available_bytes: 1 << 30,
        cpu_use: 0.5,
        ..Heartbeat::default()
    };
    let mut encoder = Encoder::new(Thresholds::DEFAULT, 3);
    let mut wholes = Vec::new();
    for number in 0..200 {
        match encoder.encode(quiet.clone()) {
            Message::Heartbeat(_) => wholes.push(number),
            Message::Delta(delta) => {
                let nothing = HeartbeatDelta {
                    sequence: delta.sequence,
                    ..HeartbeatDelta::default()
                };
                assert_eq!(delta, nothing);
            }
            other => panic!("no report: {other:?}"),
        }
    }
    assert_eq!(wholes, [0, 4, 64, 124, 184]);
}

#[test]
fn a_value_that_drifts_is_never_far_off() {
    let mut encoder = Encoder::new(Thresholds::DEFAULT, WHOLE_EVERY - 1);
    let mut decoder = Decoder::default();
    let mut changes = 0;
    for step in 0..50_u64 {
        let now = Heartbeat {
            memory_available_bytes: step * 100_000,
            ..Heartbeat::default()
        };
        let message = encoder.encode(now);
        changes +=
            usize::from(matches!(&message, Message::Delta(delta) if delta.memory_available_bytes.is_some()));
        let seen = decode(&mut decoder, message).expect("no gap");
        assert!(seen.node.memory_available_bytes.abs_diff(step * 100_000) <= 262_144);
    }
    assert!((10..30).contains(&changes), "{changes}");
}
