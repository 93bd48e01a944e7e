//! What CPU guests get here, and which MSRs they can have, as the VMM says: for the scheduler, which compares nodes.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use shoal_cpuid::MAX_MSRS;
use tokio::process::Command;

const LIMIT: Duration = Duration::from_secs(5);
/// `struct kvm_cpuid_entry2` times KVM_MAX_CPUID_ENTRIES.
const MAX_BYTES: usize = 40 * 256;

/// The CPUID table. Empty, with a warning, if the VMM does not tell: VMs run all the same.
pub(crate) async fn of_host(vmm_binary: &Path) -> Vec<u8> {
    ask(vmm_binary, "print-cpuid", parse).await
}

/// The MSRs that are saved and restored here. Empty, with a warning, if the VMM does not tell.
pub(crate) async fn msrs_of_host(vmm_binary: &Path) -> Vec<u32> {
    ask(vmm_binary, "print-msrs", parse_msrs).await
}

async fn ask<T>(vmm_binary: &Path, command: &str, parse: fn(&[u8]) -> Option<Vec<T>>) -> Vec<T> {
    let printed = Command::new(vmm_binary)
        .arg(command)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let why = match tokio::time::timeout(LIMIT, printed).await {
        Ok(Ok(output)) if output.status.success() => match parse(&output.stdout) {
            Some(told) => return told,
            None => "it printed something else".to_owned(),
        },
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stderr)
            .trim()
            .chars()
            .take(200)
            .collect(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", LIMIT.as_secs()),
    };
    tracing::warn!(
        why,
        "shoal-vmm {command}: the scheduler cannot compare this node's CPU with others"
    );
    Vec::new()
}

/// One line of hex.
fn parse(line: &[u8]) -> Option<Vec<u8>> {
    let hex = std::str::from_utf8(line).ok()?.trim();
    if hex.len() > 2 * MAX_BYTES || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let table = pairs.iter().map(byte).collect::<Option<Vec<u8>>>()?;
    (rest.is_empty() && !table.is_empty()).then_some(table)
}

/// One line of hex numbers.
fn parse_msrs(line: &[u8]) -> Option<Vec<u32>> {
    let words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let msr = |word: &str| {
        let digits = word.bytes().all(|byte| byte.is_ascii_hexdigit());
        u32::from_str_radix(word, 16).ok().filter(|_| digits)
    };
    let msrs = words.take(MAX_MSRS + 1).map(msr).collect::<Option<Vec<u32>>>()?;
    (1..=MAX_MSRS).contains(&msrs.len()).then_some(msrs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_line_of_hex_is_a_table() {
        assert_eq!(parse(b"00ff7A\n"), Some(vec![0, 0xff, 0x7a]));
        for other in [
            &b""[..],
            b"\n",
            b"0",
            b"0x",
            b"running 1 test",
            b"00 ff",
            &[b'0'; 20_482],
        ] {
            assert_eq!(parse(other), None);
        }
    }

    #[test]
    fn only_a_line_of_hex_numbers_is_a_list_of_msrs() {
        assert_eq!(
            parse_msrs(b"10 C0000081 4b564d01\n"),
            Some(vec![0x10, 0xc000_0081, 0x4b56_4d01])
        );
        let many = b"1 ".repeat(MAX_MSRS + 1);
        for other in [
            &b""[..],
            b"\n",
            b"+1",
            b"0x10",
            b"100000000",
            b"running 1 test",
            &many,
        ] {
            assert_eq!(parse_msrs(other), None);
        }
    }

    #[tokio::test]
    async fn a_vmm_that_does_not_tell_is_no_obstacle() {
        assert!(of_host(Path::new("/bin/false")).await.is_empty());
        assert!(of_host(Path::new("/bin/true")).await.is_empty());
        assert!(of_host(Path::new("no/such/program")).await.is_empty());
        assert!(of_host(Path::new("/bin/echo")).await.is_empty());
        assert!(msrs_of_host(Path::new("/bin/true")).await.is_empty());
    }
}
