//! What a process holds, as /proc tells: descriptors, listening ports, memory, children. For tests that nothing is left.

use std::collections::HashSet;
use std::fs;

/// A listening TCP socket, in /proc/net/tcp.
const LISTEN: &str = "0A";
/// Nothing but guest RAM is kept out of core dumps and as large as this.
const SMALLEST_RAM: u64 = 1 << 20;

/// Open descriptors of a process; 0 if it is gone.
#[must_use]
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// TCP ports on which a process listens, in its own network namespace.
#[must_use]
pub fn listening_ports(pid: u32) -> Vec<u16> {
    let sockets: HashSet<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|target| {
            let target = target.to_str()?;
            Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    ["tcp", "tcp6"]
        .into_iter()
        .flat_map(|table| {
            let table = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
            listening(&table)
        })
        .filter(|(_, inode)| sockets.contains(inode))
        .map(|(port, _)| port)
        .collect()
}

/// Ports and inodes of the listening sockets of a table as in /proc/net/tcp (proc(5)).
fn listening(table: &str) -> Vec<(u16, String)> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let (_, port) = words.get(1)?.rsplit_once(':')?;
            let port = u16::from_str_radix(port, 16).ok()?;
            (*words.get(3)? == LISTEN).then_some((port, (*words.get(9)?).to_owned()))
        })
        .collect()
}

/// Memory of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Mapped guest RAM, whether resident or not.
    pub guest: u64,
    /// Resident, all else.
    pub beyond_guest: u64,
}

/// Memory of a VMM; all zeros if it is gone.
#[must_use]
pub fn memory(pid: u32) -> Memory {
    parse_smaps(&fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default())
}

/// Guest RAM is what is not dumped (`dd`, from `MADV_DONTDUMP`) and large.
fn parse_smaps(smaps: &str) -> Memory {
    let (mut memory, mut size, mut resident) = (Memory::default(), 0, 0);
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let bytes = || {
            let kib = value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?;
            Some(kib << 10)
        };
        match key {
            "Size" => size = bytes().unwrap_or(0),
            "Rss" => resident = bytes().unwrap_or(0),
            // The last line of each mapping.
            "VmFlags" => {
                let not_dumped = value.split_ascii_whitespace().any(|flag| flag == "dd");
                if not_dumped && size >= SMALLEST_RAM {
                    memory.guest += size;
                } else {
                    memory.beyond_guest += resident;
                }
            }
            _ => {}
        }
    }
    memory
}

/// Processes of that name, living or not yet reaped, that this one has started.
#[must_use]
pub fn children(name: &str) -> Vec<u32> {
    let own = std::process::id();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            parent_and_name(&stat).is_some_and(|(parent, found)| parent == own && found == name)
        })
        .collect()
}

/// From a line as in /proc/PID/stat: `pid (name) state ppid ...`.
fn parent_and_name(stat: &str) -> Option<(u32, &str)> {
    let (_, rest) = stat.split_once('(')?;
    let (name, rest) = rest.rsplit_once(") ")?;
    Some((rest.split(' ').nth(1)?.parse().ok()?, name))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::process::Command;

    use super::*;

    #[test]
    fn own_ports_and_descriptors_are_found() {
        let own = std::process::id();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        assert!(listening_ports(own).contains(&port));
        assert!(descriptors(own) > 3);
        drop(listener);
        assert!(!listening_ports(own).contains(&port));
    }

    #[test]
    fn children_are_found_until_they_are_reaped() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        assert!(children("sleep").contains(&child.id()));
        child.kill().expect("killed");
        assert!(children("sleep").contains(&child.id()), "not reaped yet");
        child.wait().expect("reaped");
        assert!(!children("sleep").contains(&child.id()));
        assert_eq!(parent_and_name("7 (a) b) S 12 7"), Some((12, "a) b")));
    }

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let mapping = |size, rss, flags| {
            format!("7f00-7f80 rw-p 00000000 00:00 0 \nSize: {size} kB\nRss: {rss} kB\nVmFlags: {flags}\n")
        };
        let smaps = [
            mapping(65_536, 4_096, "rd wr mr dd hg"),
            mapping(2_048, 100, "rd wr"),
            mapping(4, 4, "rd dd"),
        ];
        let memory = parse_smaps(&smaps.concat());
        assert_eq!((memory.guest, memory.beyond_guest), (64 << 20, 104 << 10));
    }
}
