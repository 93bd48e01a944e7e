use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// Reproducible noise.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn random(seed: u64, pages: usize) -> Vec<u8> {
    let mut noise = Noise(seed | 1);
    (0..pages * PAGE / 8)
        .flat_map(|_| noise.next().to_le_bytes())
        .collect()
}

fn text(seed: u64, pages: usize) -> Vec<u8> {
    const WORDS: [&str; 12] = [
        "kernel ",
        "page ",
        "struct ",
        "0x7f",
        "the ",
        "of ",
        "memory",
        "\n",
        "return ",
        "static int ",
        "1024",
        "; ",
    ];
    let mut noise = Noise(seed | 1);
    let mut bytes = vec![];
    while bytes.len() < pages * PAGE {
        bytes.extend_from_slice(WORDS[usize::try_from(noise.next() % 12).unwrap()].as_bytes());
        if noise.next().is_multiple_of(4) {
            bytes.extend_from_slice(format!("{:x} ", noise.next() % 65536).as_bytes());
        }
    }
    bytes.truncate(pages * PAGE);
    bytes
}

fn zero_rich(seed: u64, pages: usize) -> Vec<u8> {
    let mut noise = Noise(seed | 1);
    let mut bytes = vec![0; pages * PAGE];
    for page in bytes.chunks_mut(PAGE) {
        for _ in 0..40 {
            let at = usize::try_from(noise.next() % 512).unwrap() * 8;
            page[at..at + 8].copy_from_slice(&(noise.next() % 100_000).to_le_bytes());
        }
    }
    bytes
}

fn page_tables(seed: u64, pages: usize) -> Vec<u8> {
    let mut noise = Noise(seed | 1);
    let mut frame = noise.next() % 1_000_000;
    let entry = |_| {
        frame = if noise.next().is_multiple_of(8) {
            noise.next() % 1_000_000
        } else {
            frame + 1
        };
        (frame << 12 | 0x67).to_le_bytes()
    };
    (0..pages * PAGE / 8).flat_map(entry).collect()
}

/// What the other end does.
#[derive(Default)]
struct Receiver(HashMap<u64, Vec<u8>>);

impl Receiver {
    fn receive(&mut self, gpas: &[u64], encoded: &Encoded<'_>) {
        let mut bytes = vec![0; gpas.len() * PAGE];
        decode(encoded.encoding, encoded.payload, &mut bytes).unwrap();
        for (i, (&gpa, page)) in gpas.iter().zip(bytes.chunks(PAGE)).enumerate() {
            if encoded.delta >> i & 1 == 1 {
                apply_delta(self.0.get_mut(&gpa).expect("a delta needs a page"), page);
            } else {
                self.0.insert(gpa, page.to_vec());
            }
        }
    }
}

fn send(encoder: &mut Encoder, receiver: &mut Receiver, gpas: &[u64], bytes: &[u8], resent: bool) -> usize {
    let mut staged = bytes.to_vec();
    let encoded = encoder.encode(
        Batch {
            gpas,
            bytes: &mut staged,
        },
        resent,
    );
    receiver.receive(gpas, &encoded);
    for (gpa, page) in gpas.iter().zip(bytes.chunks(PAGE)) {
        assert!(receiver.0[gpa] == page, "page {gpa:#x} arrived wrong");
    }
    encoded.payload.len()
}

fn addresses(first: u64, pages: usize) -> Vec<u64> {
    (0..pages as u64)
        .map(|page| (first + page) * PAGE as u64)
        .collect()
}

#[test]
fn compressible_pages_shrink_and_random_ones_do_not_grow() {
    for policy in [Compression::Lz4, Compression::Zstd] {
        let mut encoder = Encoder::new(policy, Arc::new(DeltaCache::new(0)));
        let gpas = addresses(16, 64);
        for _ in 0..3 {
            assert!(encoder.wants(false));
            let sent = send(&mut encoder, &mut Receiver::default(), &gpas, &text(1, 64), false);
            assert!(sent < 64 * PAGE * 2 / 3, "{policy:?}: {sent}");
            let sent = send(
                &mut encoder,
                &mut Receiver::default(),
                &gpas,
                &random(1, 64),
                false,
            );
            assert_eq!(sent, 64 * PAGE, "{policy:?}");
        }
        let counts = encoder.saved();
        assert_eq!(
            (counts.compressed_pages, counts.raw_pages, counts.delta_pages),
            (192, 192, 0)
        );
        assert!(counts.compression_saved_bytes > 64 * 4096);
    }
}

#[test]
fn off_never_asks_for_a_batch() {
    let mut encoder = Encoder::new(Compression::Off, Arc::new(DeltaCache::new(1 << 20)));
    for _ in 0..100 {
        assert!(!encoder.wants(false) && !encoder.wants(true));
        let waited = Duration::from_millis(2);
        let spent = Spent {
            waited,
            ..Spent::default()
        };
        encoder.sent(262_144, spent, Duration::ZERO);
    }
}

#[test]
fn a_page_sent_again_is_sent_as_what_changed() {
    let cache = Arc::new(DeltaCache::new(1 << 20));
    let mut encoder = Encoder::new(Compression::Lz4, Arc::clone(&cache));
    let mut receiver = Receiver::default();
    let gpas = addresses(100, 64);
    let mut bytes = random(7, 64);
    send(&mut encoder, &mut receiver, &gpas, &bytes, false);
    assert!(cache.is_empty());
    assert_eq!(send(&mut encoder, &mut receiver, &gpas, &bytes, true), 64 * PAGE);
    assert_eq!(cache.len(), 64);
    for version in 0..5 {
        for page in bytes.chunks_mut(PAGE) {
            page[64 * version..64 * version + 8].copy_from_slice(&[0xa5; 8]);
        }
        let sent = send(&mut encoder, &mut receiver, &gpas, &bytes, true);
        assert!(sent < 64 * 100, "version {version}: {sent}");
    }
    let counts = encoder.saved();
    assert_eq!(counts.delta_pages, 5 * 64);
    assert!(counts.delta_saved_bytes > 5 * 64 * 3900);
}

#[test]
fn a_page_that_went_past_the_cache_is_not_sent_as_a_difference() {
    let cache = Arc::new(DeltaCache::new(1 << 20));
    let mut encoder = Encoder::new(Compression::Lz4, Arc::clone(&cache));
    let mut receiver = Receiver::default();
    let gpas = addresses(60, 10);
    send(&mut encoder, &mut receiver, &gpas, &random(1, 10), true);
    let raw = random(2, 3);
    for (page, gpa) in raw.chunks(PAGE).zip(&gpas[3..6]) {
        receiver.0.insert(*gpa, page.to_vec());
    }
    cache.forget(gpas[3], 3);
    assert_eq!(cache.len(), 7);
    let mut staged = random(1, 10);
    staged[3 * PAGE..6 * PAGE].copy_from_slice(&raw);
    let expected = staged.clone();
    let encoded = encoder.encode(
        Batch {
            gpas: &gpas,
            bytes: &mut staged,
        },
        true,
    );
    assert_eq!(encoded.delta, 0b11_1100_0111);
    receiver.receive(&gpas, &encoded);
    for (gpa, page) in gpas.iter().zip(expected.chunks(PAGE)) {
        assert!(receiver.0[gpa] == page);
    }
    // A page of a first pass that is staged goes past it too.
    send(&mut encoder, &mut receiver, &gpas, &random(3, 10), false);
    assert!(cache.is_empty());
}

#[test]
fn the_cache_is_bounded_and_keeps_what_a_pass_over_more_would_push_out() {
    let pages = 512;
    let cache = DeltaCache::new(pages * PAGE);
    let mut hits = 0;
    for pass in 0..8 {
        for first in (0..4 * pages).step_by(64) {
            let gpas = addresses(first as u64, 64);
            let (known, _) = cache.exchange(&gpas, &mut random(first as u64 + 1, 64));
            hits += if pass > 0 { known.count_ones() as usize } else { 0 };
            assert!(cache.len() <= pages);
        }
    }
    assert!(hits > 7 * pages / 2, "{hits} of at best {}", 7 * pages);
    let held = cache.bytes();
    assert!(held <= pages * PAGE);
}

#[test]
fn a_cache_for_a_small_guest_is_small_and_for_a_large_one_bounded() {
    let capacity = |bytes| DeltaCache::for_guest(bytes).capacity() * PAGE;
    assert_eq!(capacity(2 << 20), 128 << 10);
    assert_eq!(capacity(1 << 30), 64 << 20);
    assert_eq!(capacity(1 << 42), 64 << 20);
    assert_eq!(capacity(4096), 0);
}

#[test]
fn encoders_of_several_workers_share_a_cache() {
    let cache = Arc::new(DeltaCache::new(300 * PAGE));
    let rounds = 30;
    std::thread::scope(|scope| {
        for worker in 0..4u64 {
            let cache = Arc::clone(&cache);
            scope.spawn(move || {
                let policy = if worker % 2 == 0 {
                    Compression::Lz4
                } else {
                    Compression::Zstd
                };
                let mut encoder = Encoder::new(policy, Arc::clone(&cache));
                let mut receiver = Receiver::default();
                // Pages of the workers lie in the same groups.
                let gpas: Vec<u64> = (0..64).map(|page| (page * 4 + worker) * 4096).collect();
                let mut bytes = random(worker + 9, 64);
                for round in 0..rounds {
                    bytes[round * 100] ^= 0xff;
                    send(&mut encoder, &mut receiver, &gpas, &bytes, true);
                    if round % 7 == 3 {
                        let zeros = vec![0; PAGE];
                        receiver.0.insert(gpas[5], zeros);
                        cache.forget(gpas[5], 1);
                    }
                }
                assert!(encoder.saved().delta_pages > 0);
            });
        }
    });
    assert!(cache.len() <= 300);
}

#[test]
fn a_payload_of_another_length_or_kind_is_refused() {
    let bytes = text(3, 4);
    let mut encoder = Encoder::new(Compression::Zstd, Arc::new(DeltaCache::new(0)));
    let mut staged = bytes.clone();
    let gpas = addresses(0, 4);
    let encoded = encoder.encode(
        Batch {
            gpas: &gpas,
            bytes: &mut staged,
        },
        false,
    );
    let payload = encoded.payload.to_vec();
    for pages in [0, 1, 3, 5] {
        let mut out = vec![0; pages * PAGE];
        assert!(
            decode(Encoding::Zstd, &payload, &mut out).is_err(),
            "{pages} pages"
        );
        assert!(
            decode(Encoding::Raw, &bytes, &mut out).is_err(),
            "{pages} pages, raw"
        );
    }
    let mut out = vec![0; 4 * PAGE];
    assert!(decode(Encoding::Lz4, &payload, &mut out).is_err());
    assert!(Encoding::try_from(3).is_err());
    assert!(decode(Encoding::Zstd, &payload, &mut out).is_ok());
    assert!(out == bytes);
}

fn page_bytes() -> impl Strategy<Value = Vec<u8>> {
    (0u64..1000, 0u8..4, 1usize..8).prop_map(|(seed, kind, pages)| match kind {
        0 => random(seed, pages),
        1 => text(seed, pages),
        2 => zero_rich(seed, pages),
        _ => page_tables(seed, pages),
    })
}

fn encoding() -> impl Strategy<Value = Encoding> {
    prop_oneof![Just(Encoding::Raw), Just(Encoding::Lz4), Just(Encoding::Zstd)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_encoded_is_decoded(bytes in page_bytes(), zstd in any::<bool>(), resent in any::<bool>()) {
        let policy = if zstd { Compression::Zstd } else { Compression::Lz4 };
        let mut encoder = Encoder::new(policy, Arc::new(DeltaCache::new(1 << 18)));
        let gpas = addresses(3, bytes.len() / PAGE);
        let mut receiver = Receiver::default();
        send(&mut encoder, &mut receiver, &gpas, &bytes, resent);
        send(&mut encoder, &mut receiver, &gpas, &bytes, true);
        send(&mut encoder, &mut receiver, &gpas, &bytes, true);
    }

    /// Any mix of staged and direct sends of changing pages, through a cache too small for them.
    #[test]
    fn versions_arrive_in_order_whatever_is_cached(
        steps in proptest::collection::vec((0u64..24, 1usize..8, 0u8..4, any::<u64>()), 1..60)
    ) {
        let cache = Arc::new(DeltaCache::new(16 * PAGE));
        let mut encoder = Encoder::new(Compression::Lz4, Arc::clone(&cache));
        let mut receiver = Receiver::default();
        let mut memory = random(5, 32);
        let first = addresses(0, 32);
        send(&mut encoder, &mut receiver, &first, &memory, false);
        for (page, pages, kind, value) in steps {
            let at = usize::try_from(page).unwrap() * PAGE;
            let range = at..at + pages * PAGE;
            for (i, chunk) in memory[range.clone()].chunks_mut(PAGE).enumerate() {
                if kind == 1 { chunk.copy_from_slice(&random(value | 1, 1)); }
                chunk[i * 8..i * 8 + 8].copy_from_slice(&value.to_le_bytes());
            }
            let gpas = addresses(page, pages);
            if kind == 2 {
                cache.forget(gpas[0], pages as u64);
                for (gpa, chunk) in gpas.iter().zip(memory[range].chunks(PAGE)) {
                    receiver.0.insert(*gpa, chunk.to_vec());
                }
            } else {
                send(&mut encoder, &mut receiver, &gpas, &memory[range], kind != 3);
            }
        }
    }

    #[test]
    fn crafted_payloads_are_refused_or_fill_exactly(
        payload in proptest::collection::vec(any::<u8>(), 0..600), encoding in encoding(), pages in 0usize..5
    ) {
        let mut out = vec![0; pages * PAGE];
        let _ = decode(encoding, &payload, &mut out);
    }

    #[test]
    fn damaged_payloads_do_no_harm(
        bytes in page_bytes(), zstd in any::<bool>(), at in any::<proptest::sample::Index>(), with in any::<u8>(), cut in any::<bool>()
    ) {
        let policy = if zstd { Compression::Zstd } else { Compression::Lz4 };
        let mut encoder = Encoder::new(policy, Arc::new(DeltaCache::new(0)));
        let mut staged = bytes.clone();
        let gpas = addresses(0, bytes.len() / PAGE);
        let encoded = encoder.encode(Batch { gpas: &gpas, bytes: &mut staged }, false);
        let mut payload = encoded.payload.to_vec();
        let at = at.index(payload.len());
        if cut { payload.truncate(at) } else { payload[at] = with }
        let mut out = vec![0; bytes.len()];
        let result = decode(encoded.encoding, &payload, &mut out);
        prop_assert!(!cut || result.is_err());
    }
}

/// Prints speed and ratio of each method on several kinds of data: `cargo test --release -p shoal-vmm speeds -- --ignored
/// --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speeds_and_ratios() {
    let (pages, batches) = (64, 64);
    println!(
        "{:12} {:7} {:>11} {:>7} {:>11}",
        "data", "method", "encode MB/s", "ratio", "decode MB/s"
    );
    for (name, make) in [
        ("random", random as fn(u64, usize) -> Vec<u8>),
        ("zero-rich", zero_rich),
        ("text", text),
        ("page tables", page_tables),
        ("zeros", |_, pages| vec![0; pages * PAGE]),
    ] {
        let data: Vec<_> = (0..batches).map(|seed| make(seed * 77 + 1, pages)).collect();
        for method in [Method::Lz4, Method::Zstd1, Method::Zstd3] {
            let mut compressors = Compressors::default();
            let (mut encoding, mut decoding, mut sent) = (Duration::ZERO, Duration::ZERO, 0);
            let mut out = vec![0; pages * PAGE];
            for batch in &data {
                let start = Instant::now();
                let length = compressors.compress(method, batch);
                encoding += start.elapsed();
                sent += length.unwrap_or(batch.len());
                if let Some(length) = length {
                    let start = Instant::now();
                    decode(method.encoding(), compressors.output(length), &mut out).unwrap();
                    decoding += start.elapsed();
                }
            }
            let bytes = data.len() * pages * PAGE;
            let rate = |took: Duration| bytes as f64 / took.as_secs_f64() / 1e6;
            println!(
                "{name:12} {:7} {:>11.0} {:>7.3} {:>11.0}",
                format!("{method:?}"),
                rate(encoding),
                sent as f64 / bytes as f64,
                rate(decoding)
            );
        }
    }
    let cache = DeltaCache::new(64 << 20);
    let mut bytes = random(3, pages);
    let start = Instant::now();
    for round in 0..batches {
        cache.exchange(&addresses(round % 8 * 64, pages), &mut bytes);
    }
    let rate = (pages * PAGE) as f64 * batches as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!("delta cache: {rate:.0} MB/s");
}
