//! Pages as protocol version 1 sent them; this build only receives them.
//!
//! A Pages frame is `runs u32, reserved u32`, then the runs (`gpa u64, pages u32, encoding u32`: 0 raw, 1 zero), then the
//! bytes of the raw runs in order, all under the frame's checksum.

use std::io::{IoSliceMut, Read, Write};

use vm_memory::GuestAddress;

use super::{PAGE, PageCounts};
use crate::memory::GuestMemory;
use crate::migration::wire::{Connection, FrameHeader, FrameKind, WireError};
use crate::spec::PAGE_SIZE;

const MAX_PAGE_DATA: usize = 1 << 20;
const MAX_RUNS: usize = 1024;
const PAGES_HEAD_LEN: usize = 8;
const RUN_LEN: usize = 16;
/// Longest payload.
pub const MAX_PAYLOAD: usize = PAGES_HEAD_LEN + MAX_RUNS * RUN_LEN + MAX_PAGE_DATA;
const RAW: u32 = 0;
const ZERO: u32 = 1;

/// Receives the rest of a Pages frame, straight into guest memory. vCPUs must never have run.
///
/// # Errors
/// When the stream fails, or a run is malformed or outside guest memory.
pub fn receive<S: Read + Write>(
    connection: &mut Connection<S>,
    header: &mut FrameHeader,
    memory: &GuestMemory,
    counts: &mut PageCounts,
) -> Result<(), WireError> {
    let malformed = |why: String| WireError::Malformed {
        kind: FrameKind::Pages,
        why,
    };
    let mut head = [0u8; PAGES_HEAD_LEN];
    if header.length < PAGES_HEAD_LEN {
        return Err(malformed(format!(
            "length {} is less than its own head",
            header.length
        )));
    }
    connection.receive_into(header, &mut head)?;
    let count = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    let count = usize::try_from(count).ok().filter(|&count| count <= MAX_RUNS);
    let count = count.ok_or_else(|| malformed(format!("more than {MAX_RUNS} runs")))?;
    let data_len = header.length.checked_sub(PAGES_HEAD_LEN + count * RUN_LEN);
    let data_len = data_len.ok_or_else(|| malformed(format!("{count} runs do not fit its length")))?;
    let mut runs = vec![0u8; count * RUN_LEN];
    connection.receive_into(header, &mut runs)?;

    let mut targets: Vec<(*mut u8, usize)> = Vec::with_capacity(count);
    let mut zero_runs: Vec<(*mut u8, usize)> = vec![];
    let mut expected = 0usize;
    let mut free_from = 0u64;
    for run in runs.chunks_exact(RUN_LEN) {
        let gpa = u64::from_le_bytes(run[..8].try_into().expect("8 bytes"));
        let pages = u32::from_le_bytes(run[8..12].try_into().expect("4 bytes"));
        let encoding = u32::from_le_bytes(run[12..].try_into().expect("4 bytes"));
        let bytes = u64::from(pages) * PAGE_SIZE;
        let host =
            (gpa.is_multiple_of(PAGE_SIZE) && pages > 0).then(|| memory.host_range(GuestAddress(gpa), bytes));
        let host = host
            .flatten()
            .ok_or_else(|| malformed(format!("run of {pages} pages at {gpa:#x} is not guest memory")))?;
        let length = usize::try_from(bytes).expect("within guest memory");
        // Ascending, so that no two slices below can overlap.
        if gpa < free_from {
            return Err(malformed(format!(
                "run at {gpa:#x} overlaps or precedes the run before it"
            )));
        }
        free_from = gpa + bytes;
        match encoding {
            RAW => {
                targets.push((host, length));
                expected += length;
                counts.raw += u64::from(pages);
            }
            ZERO => {
                zero_runs.push((host, length));
                counts.zero += u64::from(pages);
            }
            other => return Err(malformed(format!("run encoding {other} is unknown"))),
        }
    }
    if expected != data_len {
        return Err(malformed(format!(
            "its raw runs need {expected} bytes and it has {data_len}"
        )));
    }
    {
        let mut buffers: Vec<_> = targets
            .iter()
            // SAFETY: host_range says that the range lies within one guest memory mapping, and runs ascend without
            // overlap (checked above), so the slices are disjoint; no vCPU of this VM has run, so
            // nothing else accesses it, and `buffers` is dropped before `targets` is read again.
            .map(|&(host, length)| IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(host, length) }))
            .collect();
        connection.receive_vectored(&mut buffers)?;
    }
    for &(host, length) in &targets {
        // SAFETY: as above; the mutable slices are gone.
        header.add_to_checksum(unsafe { std::slice::from_raw_parts(host, length) });
    }
    header.verify()?;
    for &(host, length) in &zero_runs {
        // SAFETY: as above; zero runs are written after the raw ones, through their own slices.
        let run = unsafe { std::slice::from_raw_parts_mut(host, length) };
        for page in run.chunks_exact_mut(PAGE) {
            // Reading a page that was never touched costs less than writing it, and keeps it unbacked.
            if page.iter().any(|byte| *byte != 0) {
                page.fill(0);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    const MEMORY: u64 = 4 << 20;

    fn received(payload: &[u8]) -> Result<(), WireError> {
        let memory = GuestMemory::new(MEMORY).expect("map");
        let mut out = Connection::new(Cursor::new(vec![]));
        out.send_parts(FrameKind::Pages, payload, &[]).expect("memory");
        let mut input = Connection::new(Cursor::new(out.stream().get_ref().clone()));
        let mut header = input.receive_header().expect("own header");
        receive(&mut input, &mut header, &memory, &mut PageCounts::default())
    }

    proptest! {
        #[test]
        fn no_payload_panics_the_receiver(payload in proptest::collection::vec(any::<u8>(), 0..200), runs in 0u32..8) {
            let mut payload = payload;
            if payload.len() >= 4 {
                payload[..4].copy_from_slice(&runs.to_le_bytes());
            }
            let _ = received(&payload);
        }
    }

    #[test]
    fn a_run_outside_guest_memory_is_refused() {
        for (gpa, pages) in [
            (MEMORY, 1u32),
            (MEMORY - PAGE_SIZE, 2),
            (1, 1),
            (0, 0),
            (u64::MAX - 4095, 1),
        ] {
            let mut head = vec![1, 0, 0, 0, 0, 0, 0, 0];
            head.extend_from_slice(&gpa.to_le_bytes());
            head.extend_from_slice(&pages.to_le_bytes());
            head.extend_from_slice(&ZERO.to_le_bytes());
            let error = received(&head).expect_err("outside");
            assert!(error.to_string().contains("is not guest memory"), "{error}");
        }
    }
}
