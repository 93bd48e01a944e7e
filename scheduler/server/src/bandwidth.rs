//! Who gets how much of the network: one pure function over the migrations under way. Weighted max-min fairness: all
//! rates rise together, each by its weight, until a cap is reached; those it stops stay there, the others rise on.

use std::collections::BTreeMap;

use crate::policy::LEAST_BANDWIDTH;

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
}

/// Caps that migrations share; 0: none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caps {
    /// Of all of them together.
    pub cluster: u64,
    /// Of those from and to one node.
    pub link: u64,
}

/// Something with a cap, and who is held to it.
#[derive(Debug)]
struct Pool {
    cap: u64,
    members: Vec<usize>,
}

/// The cap that each is to be told, in order; 0: none.
pub fn shares(sharers: &[Sharer<'_>], caps: Caps) -> Vec<u64> {
    let pools = pools(sharers, caps);
    let mut rates: Vec<Option<f64>> = vec![None; sharers.len()];
    // Each round settles one member at least.
    while let Some((pool, level)) = first_full(&pools, &rates, sharers) {
        for &member in &pool.members {
            rates[member].get_or_insert(level * weight(&sharers[member]));
        }
    }
    rates.into_iter().map(|rate| rate.map_or(0, to_cap)).collect()
}

fn pools(sharers: &[Sharer<'_>], caps: Caps) -> Vec<Pool> {
    let mut pools: Vec<Pool> = Vec::new();
    let mut links: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    let mut all = Vec::new();
    for (number, sharer) in sharers.iter().enumerate() {
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
    let level = |pool: &Pool| {
        let used: f64 = pool.members.iter().filter_map(|&member| rates[member]).sum();
        let open = pool.members.iter().filter(|&&member| rates[member].is_none());
        let weights: f64 = open.map(|&member| weight(&sharers[member])).sum();
        (weights > 0.0).then(|| (as_rate(pool.cap) - used).max(0.0) / weights)
    };
    pools
        .iter()
        .filter_map(|pool| Some((pool, level(pool)?)))
        .min_by(|(_, a), (_, b)| a.total_cmp(b))
}

fn weight(sharer: &Sharer<'_>) -> f64 {
    f64::from(sharer.priority) + 1.0
}

#[expect(clippy::cast_precision_loss, reason = "a rate to 53 bits is exact enough")]
fn as_rate(cap: u64) -> f64 {
    cap as f64
}

/// Never 0, which would mean no cap.
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
        }
    }

    fn in_mib(sharers: &[Sharer<'_>], cluster: u64, link: u64) -> Vec<u64> {
        let caps = Caps {
            cluster: cluster * MIB,
            link: link * MIB,
        };
        shares(sharers, caps)
            .into_iter()
            .map(|share| share / MIB)
            .collect()
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
    fn a_share_is_never_so_small_that_it_reads_as_none() {
        let many = vec![sharer("a", "b", 0, 5); 100];
        let caps = Caps {
            cluster: LEAST_BANDWIDTH,
            link: 0,
        };
        assert!(shares(&many, caps).iter().all(|&share| share == LEAST_BANDWIDTH));
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
            let shares = shares(&sharers, caps);
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
    }
}
