//! Who gets how much of the network: one pure function over the migrations under way. Weighted max-min fairness: all
//! rates rise together, each by its weight, until a cap is reached; those it stops stay there, the others rise on. None
//! gets less than [`LEAST_BANDWIDTH`]: what the caps leave less for has to wait until another has ended.

use std::collections::BTreeMap;

use bytesize::ByteSize;
use shoal_proto::LEAST_BANDWIDTH;

/// A migration that takes part. Rates are bytes per second; 0 means no cap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sharer<'a> {
    /// Node that sends.
    pub from: &'a str,
    /// Node that receives; the same if nothing goes over the network.
    pub to: &'a str,
    /// Its own cap.
    pub own: u64,
    /// 0 to 9.
    pub priority: u32,
    /// It has been let in before, and is not held back any more.
    pub begun: bool,
}

/// Caps that migrations share; 0: none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caps {
    /// Of all of them together.
    pub cluster: u64,
    /// Of those from and to one node.
    pub link: u64,
}

/// What a migration may use of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Share {
    /// So many bytes per second; 0: no cap.
    Rate(u64),
    /// Nothing yet, for this reason.
    Waits(String),
}

/// Something with a cap, and who is held to it.
#[derive(Debug)]
struct Pool {
    cap: u64,
    members: Vec<usize>,
}

/// What each may use, in order.
pub fn shares(sharers: &[Sharer<'_>], caps: Caps) -> Vec<Share> {
    let waits = let_in(sharers, caps);
    let pools = pools(sharers, &waits, caps);
    let mut rates: Vec<Option<f64>> = vec![None; sharers.len()];
    // Each round settles one member at least.
    while let Some((pool, level)) = first_full(&pools, &rates, sharers) {
        for &member in &pool.members {
            rates[member].get_or_insert(rate_at(level, &sharers[member]));
        }
    }
    let share = |(waits, rate): (Option<String>, Option<f64>)| {
        waits.map_or_else(|| Share::Rate(rate.map_or(0, to_cap)), Share::Waits)
    };
    waits.into_iter().zip(rates).map(share).collect()
}

/// Who has to wait, and why. Those that have begun go on, also if a cap has become too small for them; of the others the
/// ones of higher priority come first, then those that have waited longer, which are first in `sharers`.
fn let_in(sharers: &[Sharer<'_>], caps: Caps) -> Vec<Option<String>> {
    let networked = |sharer: &Sharer<'_>| sharer.from != sharer.to;
    let mut waits = vec![None; sharers.len()];
    // Of all links together, under no name.
    let mut used: BTreeMap<Option<&str>, u64> = BTreeMap::new();
    let mut in_turn: Vec<usize> = (0..sharers.len())
        .filter(|&number| networked(&sharers[number]))
        .collect();
    in_turn.sort_by_key(|&number| {
        (
            !sharers[number].begun,
            std::cmp::Reverse(sharers[number].priority),
        )
    });
    for number in in_turn {
        let sharer = &sharers[number];
        let over = [
            (None, caps.cluster),
            (Some(sharer.from), caps.link),
            (Some(sharer.to), caps.link),
        ];
        let full = over.into_iter().find_map(|(whose, cap)| {
            let others = used.get(&whose).copied().unwrap_or(0);
            let is_full = cap > 0 && (others + 1).saturating_mul(LEAST_BANDWIDTH) > cap;
            is_full.then(|| too_little(whose, cap, others))
        });
        match full {
            Some(why) if !sharer.begun => waits[number] = Some(why),
            _ => {
                for (whose, _) in over {
                    *used.entry(whose).or_default() += 1;
                }
            }
        }
    }
    waits
}

fn too_little(whose: Option<&str>, cap: u64, others: u64) -> String {
    let of = whose.map_or("all migrations".to_owned(), |node| {
        format!("migrations from and to {node}")
    });
    let (cap, least) = (ByteSize::b(cap), ByteSize::b(LEAST_BANDWIDTH));
    let others = if others == 1 {
        "another one".to_owned()
    } else {
        format!("{others} others")
    };
    format!(
        "the {cap}/s that {of} may use are taken by {others}, and none gets less than {least}/s; it begins when one has ended"
    )
}

fn pools(sharers: &[Sharer<'_>], waits: &[Option<String>], caps: Caps) -> Vec<Pool> {
    let mut pools: Vec<Pool> = Vec::new();
    let mut links: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    let mut all = Vec::new();
    for (number, sharer) in sharers
        .iter()
        .enumerate()
        .filter(|(number, _)| waits[*number].is_none())
    {
        let members = vec![number];
        let cap = sharer.own;
        pools.push(Pool { cap, members });
        if sharer.from != sharer.to {
            links.entry(sharer.from).or_default().push(number);
            links.entry(sharer.to).or_default().push(number);
            all.push(number);
        }
    }
    let link = |members| Pool {
        cap: caps.link,
        members,
    };
    pools.extend(links.into_values().map(link));
    pools.push(Pool {
        cap: caps.cluster,
        members: all,
    });
    pools.retain(|pool| pool.cap > 0);
    pools
}

/// The pool that is used up first as rates rise, and the level of rates, per weight, at which it is.
fn first_full<'p>(
    pools: &'p [Pool],
    rates: &[Option<f64>],
    sharers: &[Sharer<'_>],
) -> Option<(&'p Pool, f64)> {
    pools
        .iter()
        .filter_map(|pool| Some((pool, level(pool, rates, sharers)?)))
        .min_by(|(_, a), (_, b)| a.total_cmp(b))
}

/// At which a pool is used up by those of its members whose rate is open; none if there is no such member.
fn level(pool: &Pool, rates: &[Option<f64>], sharers: &[Sharer<'_>]) -> Option<f64> {
    let used: f64 = pool.members.iter().filter_map(|&member| rates[member]).sum();
    let open = pool.members.iter().filter(|&&member| rates[member].is_none());
    let mut weights: Vec<f64> = open.map(|&member| weight(&sharers[member])).collect();
    weights.sort_by(f64::total_cmp);
    let (mut left, mut sum) = (as_rate(pool.cap) - used, weights.iter().sum::<f64>());
    for &lightest in &weights {
        if left / sum * lightest >= as_rate(LEAST_BANDWIDTH) {
            return Some(left / sum);
        }
        // It gets the least there is, and the others share what remains.
        left -= as_rate(LEAST_BANDWIDTH);
        sum -= lightest;
    }
    // All of them get the least.
    (!weights.is_empty()).then_some(0.0)
}

fn rate_at(level: f64, sharer: &Sharer<'_>) -> f64 {
    (level * weight(sharer)).max(as_rate(LEAST_BANDWIDTH))
}

fn weight(sharer: &Sharer<'_>) -> f64 {
    f64::from(sharer.priority) + 1.0
}

#[expect(clippy::cast_precision_loss, reason = "a rate to 53 bits is exact enough")]
fn as_rate(cap: u64) -> f64 {
    cap as f64
}

/// Never less than the least, by rounding.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "not negative, and `as` saturates"
)]
fn to_cap(rate: f64) -> u64 {
    (rate as u64).max(LEAST_BANDWIDTH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn sharer<'a>(from: &'a str, to: &'a str, own_mib: u64, priority: u32) -> Sharer<'a> {
        Sharer {
            from,
            to,
            own: own_mib * MIB,
            priority,
            begun: false,
        }
    }

    fn in_mib(sharers: &[Sharer<'_>], cluster: u64, link: u64) -> Vec<u64> {
        let caps = Caps {
            cluster: cluster * MIB,
            link: link * MIB,
        };
        shares(sharers, caps)
            .into_iter()
            .map(|share| rate(&share).expect("room for all") / MIB)
            .collect()
    }

    fn rate(share: &Share) -> Option<u64> {
        match share {
            Share::Rate(rate) => Some(*rate),
            Share::Waits(_) => None,
        }
    }

    #[test]
    fn without_caps_there_is_none_and_a_lone_migration_gets_the_least_of_its_caps() {
        assert_eq!(in_mib(&[sharer("a", "b", 0, 5)], 0, 0), [0]);
        assert_eq!(in_mib(&[sharer("a", "b", 7, 5)], 0, 0), [7]);
        assert_eq!(in_mib(&[sharer("a", "b", 70, 5)], 50, 30), [30]);
        assert_eq!(in_mib(&[sharer("a", "b", 70, 5)], 20, 30), [20]);
        assert_eq!(in_mib(&[], 20, 30), [0; 0]);
    }

    #[test]
    fn a_link_is_shared_by_priority_and_what_one_leaves_the_others_get() {
        let two = [sharer("a", "b", 0, 5), sharer("a", "c", 0, 5)];
        assert_eq!(in_mib(&two, 0, 100), [50, 50]);
        let weighted = [sharer("a", "b", 0, 9), sharer("a", "c", 0, 0)];
        assert_eq!(in_mib(&weighted, 0, 110), [100, 10]);
        let modest = [sharer("a", "b", 10, 5), sharer("a", "c", 0, 5)];
        assert_eq!(in_mib(&modest, 0, 100), [10, 90]);
        let apart = [sharer("a", "b", 0, 5), sharer("c", "d", 0, 5)];
        assert_eq!(in_mib(&apart, 0, 100), [100, 100]);
        assert_eq!(in_mib(&apart, 100, 100), [50, 50]);
    }

    #[test]
    fn the_receiving_link_counts_as_well() {
        let to_one = [
            sharer("a", "x", 0, 5),
            sharer("b", "x", 0, 5),
            sharer("c", "d", 0, 5),
        ];
        assert_eq!(in_mib(&to_one, 0, 100), [50, 50, 100]);
    }

    #[test]
    fn within_a_node_nothing_is_shared() {
        let upgrade = [sharer("a", "a", 0, 5), sharer("a", "b", 0, 5)];
        assert_eq!(in_mib(&upgrade, 80, 100), [0, 80]);
    }

    #[test]
    fn what_a_cap_leaves_too_little_for_waits_and_says_why() {
        let three = vec![sharer("a", "b", 0, 5); 3];
        let caps = |cluster, link| Caps { cluster, link };
        let of = |sharers: &[Sharer<'_>], caps| shares(sharers, caps);
        let one = Share::Rate(LEAST_BANDWIDTH);
        let waits = |share: &Share, words: &str| matches!(share, Share::Waits(why) if why.contains(words));

        let got = of(&three, caps(LEAST_BANDWIDTH, 0));
        assert_eq!(got[0], one);
        assert!(
            got[1..].iter().all(|share| waits(
                share,
                "the 1.0 MiB/s that all migrations may use are taken by another one"
            )),
            "{got:?}"
        );
        let got = of(&three, caps(0, 2 * LEAST_BANDWIDTH));
        assert_eq!(got[..2], [one.clone(), one.clone()]);
        assert!(waits(&got[2], "from and to a"), "{got:?}");

        // Who has begun goes on, whatever its priority; of those that wait the higher one is next.
        let mut mixed = three;
        (mixed[1].begun, mixed[1].priority, mixed[2].priority) = (true, 0, 9);
        let got = of(&mixed, caps(2 * LEAST_BANDWIDTH, 0));
        assert!(waits(&got[0], "2 others"), "{got:?}");
        assert_eq!(got[1..], [one.clone(), one.clone()]);
        // A cap that became too small holds nobody who has begun.
        mixed.iter_mut().for_each(|sharer| sharer.begun = true);
        assert_eq!(of(&mixed, caps(LEAST_BANDWIDTH, 0)), vec![one; 3]);

        // Nothing that stays within a node waits.
        let upgrade = [sharer("a", "b", 0, 5), sharer("a", "a", 0, 5)];
        assert_eq!(of(&upgrade, caps(LEAST_BANDWIDTH, 0))[1], Share::Rate(0));
    }

    #[test]
    fn nobody_gets_less_than_the_least_however_light() {
        let weighted = [sharer("a", "b", 0, 9), sharer("a", "c", 0, 0)];
        assert_eq!(in_mib(&weighted, 5, 0), [4, 1]);
    }

    proptest! {
        #[test]
        fn no_cap_is_passed_and_nobody_gets_less_than_its_part(
            moves in prop::collection::vec((0usize..5, 0usize..5, 0u64..400, 0u32..10), 1..20),
            cluster in 100u64..2000,
            link in 100u64..2000,
        ) {
            let names = ["a", "b", "c", "d", "e"];
            let sharers: Vec<_> = moves
                .iter()
                .map(|&(from, to, own, priority)| sharer(names[from], names[to], own, priority))
                .collect();
            let caps = Caps { cluster: cluster * MIB, link: link * MIB };
            let shares: Vec<u64> = shares(&sharers, caps).iter().map(|share| rate(share).expect("room for all")).collect();
            let networked = |number: &usize| sharers[*number].from != sharers[*number].to;
            let sum = |members: &[usize]| members.iter().map(|&number| shares[number]).sum::<u64>();
            let all: Vec<usize> = (0..sharers.len()).filter(networked).collect();
            prop_assert!(sum(&all) <= caps.cluster + MIB);
            let part = |cap: u64, members: &[usize], number: usize| {
                let weights: f64 = members.iter().map(|&member| weight(&sharers[member])).sum();
                as_rate(cap) * weight(&sharers[number]) / weights
            };
            for number in all.clone() {
                let own = if sharers[number].own == 0 { u64::MAX } else { sharers[number].own };
                prop_assert!(shares[number] <= own);
                let mut least = as_rate(own).min(part(caps.cluster, &all, number));
                for node in [sharers[number].from, sharers[number].to] {
                    let on_link: Vec<usize> = all
                        .iter()
                        .copied()
                        .filter(|&other| sharers[other].from == node || sharers[other].to == node)
                        .collect();
                    prop_assert!(sum(&on_link) <= caps.link + MIB);
                    least = least.min(part(caps.link, &on_link, number));
                }
                prop_assert!(as_rate(shares[number]) >= least - 1.0, "{} < {least}", shares[number]);
            }
        }

        #[test]
        fn small_caps_hold_and_who_waits_would_not_fit(
            moves in prop::collection::vec((0usize..4, 0usize..4, 0u64..4, 0u32..10), 1..20),
            cluster in 1u64..12,
            link in 1u64..6,
        ) {
            let names = ["a", "b", "c", "d"];
            let sharers: Vec<_> = moves
                .iter()
                .map(|&(from, to, own, priority)| sharer(names[from], names[to], own, priority))
                .collect();
            let caps = Caps { cluster: cluster * MIB, link: link * MIB };
            let shares = shares(&sharers, caps);
            let sum = |on: &dyn Fn(&Sharer<'_>) -> bool| -> (u64, u64) {
                let on = |sharer: &Sharer<'_>| sharer.from != sharer.to && on(sharer);
                let rates = sharers.iter().zip(&shares).filter(|(sharer, _)| on(sharer)).filter_map(|(_, share)| rate(share));
                rates.fold((0, 0), |(count, sum), rate| (count + 1, sum + rate))
            };
            let (begun, all) = sum(&|_| true);
            prop_assert!(all <= caps.cluster);
            for (sharer, share) in sharers.iter().zip(&shares) {
                let own = if sharer.own == 0 { u64::MAX } else { sharer.own };
                let mut full = (begun + 1) * LEAST_BANDWIDTH > caps.cluster;
                for node in [sharer.from, sharer.to] {
                    let (begun, on_link) = sum(&|other| other.from == node || other.to == node);
                    prop_assert!(on_link <= caps.link);
                    full |= (begun + 1) * LEAST_BANDWIDTH > caps.link;
                }
                match share {
                    Share::Rate(0) => prop_assert!(sharer.from == sharer.to && sharer.own == 0),
                    Share::Rate(rate) => prop_assert!((LEAST_BANDWIDTH..=own).contains(rate)),
                    Share::Waits(_) => prop_assert!(full && sharer.from != sharer.to),
                }
            }
        }
    }
}
