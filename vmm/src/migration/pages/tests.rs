use std::io::Cursor;
use std::sync::Arc;

use proptest::prelude::*;
use shoal_proto::vm::Compression;
use vm_memory::{Bytes as _, GuestAddress};

use super::frame::{PageFrame, RunKind};
use super::*;
use crate::dirty;
use crate::migration::codec::DeltaCache;
use crate::migration::wire::{Connection, FrameKind, WireError};

const MEMORY: u64 = 4 << 20;
const PAGES: u64 = MEMORY / PAGE_SIZE;

struct Pair {
    source: GuestMemory,
    destination: GuestMemory,
    written: WrittenPages,
}

impl Pair {
    fn new() -> Self {
        let (source, destination) = (
            GuestMemory::new(MEMORY).expect("map"),
            GuestMemory::new(MEMORY).expect("map"),
        );
        let written = WrittenPages::none(&destination);
        Self {
            source,
            destination,
            written,
        }
    }

    /// Sends these pages, lets `damage` have the bytes, receives them; gives the counts of both and what was damaged.
    fn transfer(
        &self,
        sender: &mut PageSender<'_>,
        words: &[u64],
        resent: Resent,
        damage: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(PageCounts, Vec<u64>), WireError> {
        let mut out = Connection::new(Cursor::new(vec![]));
        let region = self.source.regions()[0];
        let mut go_on = |_| Ok::<_, WireError>(());
        sender.send(&mut out, &region, 0, words, resent, &mut go_on)?;
        sender.flush(&mut out, &mut go_on)?;
        let mut bytes = out.stream().get_ref().clone();
        assert_eq!(out.bytes_sent(), bytes.len() as u64);
        damage(&mut bytes);
        let length = bytes.len() as u64;
        let mut input = Connection::new(Cursor::new(bytes));
        let mut receiver = PageReceiver::new(&self.destination, &self.written);
        while input.stream().position() < length {
            let mut header = input.receive_header()?;
            assert_eq!(header.kind, FrameKind::PageRuns);
            receiver.receive(&mut input, &mut header)?;
        }
        Ok((receiver.counts(), receiver.damaged().take()))
    }

    fn sender(&self, compression: Compression) -> PageSender<'_> {
        PageSender::new(&self.source, compression, Arc::new(DeltaCache::new(1 << 20)))
    }

    fn equal(&self) -> bool {
        let contents = |memory: &GuestMemory| {
            let mut bytes = vec![0u8; usize::try_from(MEMORY).expect("small")];
            memory
                .mmap()
                .read_slice(&mut bytes, GuestAddress(0))
                .expect("inside");
            bytes
        };
        contents(&self.source) == contents(&self.destination)
    }
}

const METHODS: [Compression; 4] = [
    Compression::Off,
    Compression::Lz4,
    Compression::Zstd,
    Compression::Auto,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn pass_after_pass_arrives(
        passes in proptest::collection::vec(proptest::collection::vec((0..PAGES, 0u64..3), 0..300), 1..4),
        method in 0..METHODS.len(),
    ) {
        let pair = Pair::new();
        let mut sender = pair.sender(METHODS[method]);
        for (number, writes) in passes.iter().enumerate() {
            let mut bitmap = dirty::Bitmap::clean(PAGES);
            for (page, value) in writes {
                // Zero makes zero pages, also of those that had been sent with bytes.
                pair.source.mmap().write_obj(*value, GuestAddress(page * PAGE_SIZE + 8)).expect("inside");
                bitmap.set_run(*page, 1);
            }
            let before = sender.counts();
            let resent = if number == 0 { Resent::No } else { Resent::Yes };
            let (received, damaged) = pair.transfer(&mut sender, bitmap.words(), resent, |_| {}).expect("own stream");
            prop_assert_eq!(sender.counts().raw - before.raw, received.raw);
            prop_assert_eq!(sender.counts().pages() - before.pages(), bitmap.count());
            prop_assert!(damaged.is_empty());
            prop_assert!(pair.equal());
        }
    }

    #[test]
    fn no_payload_panics_the_parser(payload in proptest::collection::vec(any::<u8>(), 0..200), runs in 0u32..4, pages in 0u32..4) {
        let mut payload = payload;
        if payload.len() >= 24 {
            payload[4..8].copy_from_slice(&runs.to_le_bytes());
            payload[8..12].copy_from_slice(&pages.to_le_bytes());
        }
        let _ = PageFrame::with_room().parse(&payload);
    }

    #[test]
    fn what_is_parsed_is_what_was_gathered(pages in proptest::collection::btree_map(0u64..500, any::<bool>(), 0..64)) {
        let mut frame = PageFrame::with_room();
        for (page, zero) in &pages {
            frame.add(page * PAGE_SIZE, if *zero { RunKind::Zero } else { RunKind::Data });
            if !zero {
                frame.checksums.push(u32::try_from(*page).expect("small"));
            }
        }
        frame.data_len = frame.checksums.len() * PAGE;
        let mut payload = vec![];
        frame.encode(&mut payload);
        let mut parsed = PageFrame::with_room();
        parsed.parse(&payload).expect("own payload");
        prop_assert_eq!(parsed.runs, frame.runs);
        prop_assert_eq!(parsed.checksums, frame.checksums);
    }
}

#[test]
fn a_damaged_page_is_named_and_the_rest_arrives() {
    let pair = Pair::new();
    for page in 0..10 {
        pair.source
            .mmap()
            .write_obj(7u64, GuestAddress(page * PAGE_SIZE))
            .expect("inside");
    }
    let mut sender = pair.sender(Compression::Off);
    let (_, damaged) = pair
        .transfer(&mut sender, &[0x3ff], Resent::No, |bytes| {
            let at = bytes.len() - 4 * PAGE - 100;
            bytes[at] ^= 1;
        })
        .expect("framing is whole");
    assert_eq!(damaged, [5 * PAGE_SIZE]);
    let (_, damaged) = pair
        .transfer(&mut sender, &[1 << 5], Resent::Yes, |_| {})
        .expect("own stream");
    assert!(damaged.is_empty() && pair.equal());
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
        let mut payload = vec![0u8; 24];
        payload[4] = 1;
        payload.extend_from_slice(&gpa.to_le_bytes());
        payload.extend_from_slice(&pages.to_le_bytes());
        payload.extend_from_slice(&1u32.to_le_bytes());
        let mut out = Connection::new(Cursor::new(vec![]));
        out.send_parts(FrameKind::PageRuns, &payload, &[])
            .expect("memory");
        let mut input = Connection::new(Cursor::new(out.stream().get_ref().clone()));
        let mut header = input.receive_header().expect("own header");
        let pair = Pair::new();
        let mut receiver = PageReceiver::new(&pair.destination, &pair.written);
        let error = receiver.receive(&mut input, &mut header).expect_err("outside");
        assert!(error.to_string().contains("is not guest memory"), "{error}");
    }
}

#[test]
fn pages_that_are_zero_in_a_fresh_destination_are_not_sent() {
    let pair = Pair::new();
    pair.source
        .mmap()
        .write_obj(1u8, GuestAddress(0))
        .expect("inside");
    let mut sender = pair.sender(Compression::Off);
    let (received, _) = pair
        .transfer(&mut sender, &[u64::MAX], Resent::No, |_| {})
        .expect("own stream");
    assert_eq!(sender.counts(), PageCounts { raw: 1, zero: 63 });
    assert_eq!(received, PageCounts { raw: 1, zero: 0 });
}

#[test]
fn zero_pages_are_told_from_others_by_any_word() {
    let memory = GuestMemory::new(MEMORY).expect("map");
    let page = memory.host_range(GuestAddress(0), PAGE_SIZE).expect("inside");
    // SAFETY: a page of that memory.
    assert!(unsafe { is_zero_at(page) });
    for at in [0u64, 8, 2048, 4095] {
        memory.mmap().write_obj(1u8, GuestAddress(at)).expect("inside");
        // SAFETY: as above.
        assert!(!unsafe { is_zero_at(page) });
        memory.mmap().write_obj(0u8, GuestAddress(at)).expect("inside");
    }
}
