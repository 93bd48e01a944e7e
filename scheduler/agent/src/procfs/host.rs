//! What the host as a whole says of swap, networks and NUMA: proc(5), and the kernel's admin-guide/mm/numaperf and
//! ABI/stable/sysfs-devices-node documents.

use super::{PAGE_SIZE, meminfo_field};

/// A counter for what comes in, and one for what goes out, in bytes since the host's boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct InOut {
    pub(crate) into: u64,
    pub(crate) out: u64,
}

/// Bytes swapped in and out, from `/proc/vmstat`.
pub(crate) fn parse_swap(text: &str) -> Option<InOut> {
    let pages = |name: &str| -> Option<u64> {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        rest.trim().parse().ok()
    };
    Some(InOut {
        into: pages("pswpin ")?.checked_mul(PAGE_SIZE)?,
        out: pages("pswpout ")?.checked_mul(PAGE_SIZE)?,
    })
}

/// Bytes received and sent by each interface, from `/proc/net/dev`. Lines that make no sense are left out.
pub(crate) fn parse_networks(text: &str) -> Vec<(&str, InOut)> {
    let line = |line: &'_ str| -> Option<(usize, InOut)> {
        let colon = line.rfind(':')?; // an alias has one in its name
        let mut fields = line[colon + 1..].split_ascii_whitespace();
        let into = fields.next()?.parse().ok()?;
        let out = fields.nth(7)?.parse().ok()?;
        Some((colon, InOut { into, out }))
    };
    let named = |text| line(text).map(|(colon, bytes)| (text[..colon].trim(), bytes));
    text.lines().skip(2).filter_map(named).collect()
}

/// How many CPUs a list such as `0-3,8` names; `None` for what is no list.
pub(crate) fn count_cpus(list: &str) -> Option<u32> {
    let list = list.trim();
    if list.is_empty() {
        return Some(0);
    }
    list.split(',').try_fold(0_u32, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// All memory of a NUMA node, and what of it is free or holds files, from its `meminfo`.
pub(crate) fn parse_node_memory(text: &str) -> Option<(u64, u64)> {
    // Each line begins with "Node N ".
    let fields: String = text
        .lines()
        .filter_map(|line| line.splitn(3, ' ').nth(2))
        .flat_map(|line| [line, "\n"])
        .collect();
    let field = |name| meminfo_field(&fields, name);
    let total = field("MemTotal:")?;
    let files = field("Active(file):")?.checked_add(field("Inactive(file):")?)?;
    Some((total, field("MemFree:")?.checked_add(files)?.min(total)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_counted_in_bytes() {
        let text = "nr_free_pages 7\npswpin 3\npswpout 5\n";
        let swap = InOut {
            into: 3 * 4096,
            out: 5 * 4096,
        };
        assert_eq!(parse_swap(text), Some(swap));
        for bad in [
            "",
            "pswpin 3\n",
            "pswpin x\npswpout 1\n",
            &format!("pswpin {}\npswpout 1\n", u64::MAX),
        ] {
            assert_eq!(parse_swap(bad), None, "{bad}");
        }
    }

    #[test]
    fn networks_are_found_by_name() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes packets |bytes\n\
                    \x20   lo: 10 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n\
                    eth0:1: 30 1 0 0 0 0 0 0 40 1 0 0 0 0 0 0\n\
                    bad: 1 2 3\n\
                    worse 1\n\
                    huge: 99999999999999999999999 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n";
        let expected = [
            ("lo", InOut { into: 10, out: 20 }),
            ("eth0:1", InOut { into: 30, out: 40 }),
        ];
        assert_eq!(parse_networks(text), expected);
        assert_eq!(parse_networks("one line"), []);
    }

    #[test]
    fn lists_of_cpus_are_counted() {
        for (list, cpus) in [("", 0), ("0", 1), ("0-3,8\n", 5), ("2-2", 1), (" 0-1 ", 2)] {
            assert_eq!(count_cpus(list), Some(cpus), "{list}");
        }
        for bad in [
            "x",
            "3-1",
            "1,,2",
            "0-4294967295",
            "0-4294967294,0-9",
            "-1",
            "1-2-3",
        ] {
            assert_eq!(count_cpus(bad), None, "{bad}");
        }
    }

    #[test]
    fn memory_of_a_numa_node() {
        let text = "Node 0 MemTotal:  100 kB\nNode 0 MemFree:  40 kB\nNode 0 MemUsed: 60 kB\n\
                    Node 0 Active(file): 10 kB\nNode 0 Inactive(file): 5 kB\n";
        assert_eq!(parse_node_memory(text), Some((100 << 10, 55 << 10)));
        assert_eq!(parse_node_memory(""), None);
        assert_eq!(parse_node_memory("Node 0 MemTotal: 1 kB\n"), None);
        let absurd = text.replace(" 40 kB", &format!(" {} kB", u64::MAX));
        assert_eq!(parse_node_memory(&absurd), None);
    }
}
