//! Compression and delta of page batches. Pure: bytes in, bytes out; the caller stages pages and sends.
//!
//! A batch is up to 64 pages that were copied out of guest memory. Pages that were sent before can be sent as the
//! difference to what was sent then ([`delta`]), and the whole batch compressed ([`compress`]), where the measured link
//! and CPU say that it pays ([`choice`]).

pub mod choice;
mod compress;
mod delta;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_proto::vm::Compression;

pub use compress::{CodecError, decode};
pub use delta::{DeltaCache, apply_delta};

use choice::{Chooser, Held, Method, Plan};
use compress::Compressors;

use crate::migration::sched::Spent;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Most pages of a batch: one bit each in [`Encoded::delta`].
pub const MAX_BATCH_PAGES: usize = 64;
/// Below this rate a copy and a comparison cost little beside the link, and pages sent again are always staged for delta.
const SLOW_LINK: f64 = 400e6;
/// Batches after which a delta that found nothing to save is given a rest, and how long that is.
const DELTA_TRIAL: u32 = 64;
const DELTA_REST: u32 = 1024;

/// How the bytes of a batch are encoded, as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As they are.
    Raw = 0,
    /// One LZ4 block.
    Lz4 = 1,
    /// One zstd frame.
    Zstd = 2,
}

impl TryFrom<u8> for Encoding {
    type Error = CodecError;

    fn try_from(value: u8) -> Result<Self, CodecError> {
        match value {
            0 => Ok(Self::Raw),
            1 => Ok(Self::Lz4),
            2 => Ok(Self::Zstd),
            other => Err(CodecError::UnknownEncoding(other)),
        }
    }
}

/// Staged pages: at most [`MAX_BATCH_PAGES`], none of them twice.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Their guest addresses.
    pub gpas: &'a [u64],
    /// Their bytes, one page after another. Pages sent as a difference are replaced by it.
    pub bytes: &'a mut [u8],
}

/// What to send for a batch.
#[derive(Debug)]
pub struct Encoded<'a> {
    /// Of the payload as a whole.
    pub encoding: Encoding,
    /// Never longer than the batch.
    pub payload: &'a [u8],
    /// Bit i: page i is the difference (XOR) to what was sent for it before.
    pub delta: u64,
}

/// Pages by what became of them, and what that saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CodecCounts {
    /// Staged and sent as they were.
    pub raw_pages: u64,
    /// Sent whole in a compressed batch.
    pub compressed_pages: u64,
    /// What compression saved: of a batch with both kinds the share by pages.
    pub compression_saved_bytes: u64,
    /// Sent as a difference.
    pub delta_pages: u64,
    /// What that saved, as above.
    pub delta_saved_bytes: u64,
}

impl CodecCounts {
    /// Adds those of another worker.
    pub fn add(&mut self, other: &Self) {
        self.raw_pages += other.raw_pages;
        self.compressed_pages += other.compressed_pages;
        self.compression_saved_bytes += other.compression_saved_bytes;
        self.delta_pages += other.delta_pages;
        self.delta_saved_bytes += other.delta_saved_bytes;
    }
}

/// Encodes the batches of one worker. The workers of a migration share the cache.
#[derive(Debug)]
pub struct Encoder {
    compression: Compression,
    cache: Arc<DeltaCache>,
    chooser: Chooser,
    compressors: Compressors,
    /// What [`Encoder::wants`] decided for the batch to come.
    plan: Option<(bool, Plan)>,
    /// The last batch did not shrink: look at a few pages of the next before all of it.
    gave_up: bool,
    /// Batches of pages sent again that found pages in the cache but no delta worth sending, and how long to rest.
    vain: u32,
    rest: u32,
    last_sent: Option<Instant>,
    counts: CodecCounts,
}

impl Encoder {
    /// An encoder for one worker.
    #[must_use]
    pub fn new(compression: Compression, cache: Arc<DeltaCache>) -> Self {
        Self {
            compression,
            cache,
            chooser: Chooser::new(compression),
            compressors: Compressors::default(),
            plan: None,
            gave_up: false,
            vain: 0,
            rest: 0,
            last_sent: None,
            counts: CodecCounts::default(),
        }
    }

    /// Whether the next batch is to be staged and encoded; else its pages go out as they are, and are to be forgotten
    /// with [`DeltaCache::forget`]. `resent`: pages of a later pass. With compression `auto` it is mostly false where
    /// compression does not pay, and true now and then to find out.
    pub fn wants(&mut self, resent: bool) -> bool {
        if !self.learns() {
            return false;
        }
        let plan = self.chooser.plan(resent);
        self.plan = Some((resent, plan));
        if resent {
            self.rest = self.rest.saturating_sub(1);
        }
        let for_delta = resent && self.rest == 0 && self.cache.is_enabled() && self.is_link_slow();
        plan.method != Method::Raw || for_delta
    }

    /// Whether how long frames take decides anything.
    #[must_use]
    pub fn learns(&self) -> bool {
        self.compression != Compression::Off
    }

    /// From here on nothing is compressed to find out whether that pays.
    pub fn try_nothing_new(&mut self) {
        self.chooser.try_nothing_new();
    }

    fn is_link_slow(&self) -> bool {
        self.chooser.link().is_some_and(|link| link < SLOW_LINK)
    }

    /// Encodes a staged batch. The cache takes its pages for sent: if the frame is not, the stream must end.
    ///
    /// # Panics
    /// If the batch has more than [`MAX_BATCH_PAGES`], or its bytes are not as many as its pages need.
    pub fn encode<'a>(&'a mut self, batch: Batch<'a>, resent: bool) -> Encoded<'a> {
        let Batch { gpas, bytes } = batch;
        assert!(
            gpas.len() <= MAX_BATCH_PAGES && bytes.len() == gpas.len() * PAGE,
            "a staged batch"
        );
        let started = Instant::now();
        let planned = self.plan.take().filter(|(class, _)| *class == resent);
        let plan = planned.map_or_else(|| self.chooser.plan(resent), |(_, plan)| plan);
        // A mere try on a fast link is not followed by more that could use what is cached.
        let cached = resent && (!plan.probe || self.is_link_slow());
        let delta = self.exchange(gpas, bytes, cached);

        let mut method = plan.method;
        if method == Method::Raw && delta.count_ones() as usize * 4 >= gpas.len() {
            method = self.chooser.lightest();
        }
        let hopeful = !self.gave_up || delta != 0;
        let length = match method {
            Method::Raw => None,
            _ if hopeful || self.compressors.sample_shrinks(method, bytes) => {
                self.compressors.compress(method, bytes)
            }
            _ => None,
        };
        if method != Method::Raw {
            self.gave_up = length.is_none();
            let sent = length.unwrap_or(bytes.len());
            self.chooser.encoded(
                resent,
                Plan { method, ..plan },
                bytes.len(),
                sent,
                started.elapsed(),
            );
        }
        self.count(gpas.len(), delta, length);
        let bytes: &'a [u8] = bytes;
        let payload = length.map_or(bytes, |length| self.compressors.output(length));
        let encoding = length.map_or(Encoding::Raw, |_| method.encoding());
        Encoded {
            encoding,
            payload,
            delta,
        }
    }

    fn exchange(&mut self, gpas: &[u64], bytes: &mut [u8], cached: bool) -> u64 {
        if !cached || self.compression == Compression::Off || self.rest > 0 {
            for &gpa in gpas {
                self.cache.forget(gpa, 1);
            }
            return 0;
        }
        let (known, delta) = self.cache.exchange(gpas, bytes);
        if delta != 0 {
            self.vain = 0;
        } else if known != 0 {
            self.vain += 1;
            if self.vain == DELTA_TRIAL {
                (self.vain, self.rest) = (0, DELTA_REST);
            }
        }
        delta
    }

    fn count(&mut self, pages: usize, delta: u64, length: Option<usize>) {
        let (pages, delta_pages) = (pages as u64, u64::from(delta.count_ones()));
        let whole = pages - delta_pages;
        let saved = length.map_or(0, |length| pages * PAGE as u64 - length as u64);
        let by_delta = saved * delta_pages / pages.max(1);
        self.counts.delta_pages += delta_pages;
        self.counts.delta_saved_bytes += by_delta;
        if length.is_some() {
            self.counts.compressed_pages += whole;
            self.counts.compression_saved_bytes += saved - by_delta;
        } else {
            self.counts.raw_pages += whole;
        }
    }

    /// To be called after each frame with pages if it [`Self::learns`], whether the frame was encoded here or not: how it was to send it, and how long a
    /// bandwidth cap had held it back before.
    pub fn sent(&mut self, wire_bytes: usize, spent: Spent, held_back: Duration) {
        let now = Instant::now();
        let took = held_back + spent.worked + spent.waited;
        let since_last = self.last_sent.replace(now).map_or(took, |last| now - last);
        let held = Held {
            took,
            waited: held_back + spent.waited,
            since_last: since_last.saturating_sub(spent.lost).max(took),
        };
        self.chooser.sent(wire_bytes, held);
    }

    /// What was done so far.
    #[must_use]
    pub fn saved(&self) -> CodecCounts {
        self.counts
    }
}
