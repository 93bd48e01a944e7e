//! LZ4 blocks and zstd frames over whole batches.

use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};

use super::choice::Method;
use super::{Encoding, PAGE};

/// A batch that does not shrink by this part is sent as it is.
const LEAST_GAIN: usize = 32;
const SAMPLE_PAGES: usize = 4;

/// Why a payload was refused. It came from outside.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    /// An encoding that this version does not know.
    #[error("encoding {0} of a batch is unknown")]
    UnknownEncoding(u8),
    /// Damaged or crafted.
    #[error("a batch of {length} bytes is not valid {encoding:?}")]
    Malformed {
        /// As it said.
        encoding: Encoding,
        /// Of the payload.
        length: usize,
    },
    /// Not the pages that were announced.
    #[error("a batch in {encoding:?} holds {actual} bytes, and its pages need {expected}")]
    Length {
        /// As it said.
        encoding: Encoding,
        /// By its pages.
        expected: usize,
        /// By its payload.
        actual: usize,
    },
}

/// Buffers and contexts of one worker, made when first needed.
#[derive(Default)]
pub(super) struct Compressors {
    output: Vec<u8>,
    zstd: Option<(i32, Compressor<'static>)>,
}

impl std::fmt::Debug for Compressors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressors")
            .field("output", &self.output.len())
            .finish_non_exhaustive()
    }
}

impl Compressors {
    /// Compresses into the output buffer; the length, or nothing if it is not worth it.
    pub(super) fn compress(&mut self, method: Method, bytes: &[u8]) -> Option<usize> {
        let limit = bytes.len() - bytes.len() / LEAST_GAIN;
        let room = lz4_flex::block::get_maximum_output_size(bytes.len());
        if self.output.len() < room {
            self.output.resize(room, 0);
        }
        let length = match method {
            Method::Raw => None,
            Method::Lz4 => lz4_flex::block::compress_into(bytes, &mut self.output).ok(),
            // The limit as room: zstd gives up as soon as it is exceeded.
            Method::Zstd1 => self.zstd(1, bytes, limit),
            Method::Zstd3 => self.zstd(3, bytes, limit),
        };
        length.filter(|&length| length < limit)
    }

    fn zstd(&mut self, level: i32, bytes: &[u8], limit: usize) -> Option<usize> {
        let (present, compressor) = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert((level, Compressor::new(level).ok()?)),
        };
        if *present != level {
            compressor.set_compression_level(level).ok()?;
            *present = level;
        }
        compressor
            .compress_to_buffer(bytes, &mut self.output[..limit])
            .ok()
    }

    /// Whether any of a few pages, spread over the batch, shrinks.
    pub(super) fn sample_shrinks(&mut self, method: Method, bytes: &[u8]) -> bool {
        let pages = bytes.len() / PAGE;
        let step = pages.div_ceil(SAMPLE_PAGES).max(1);
        (0..pages).step_by(step).any(|page| {
            self.compress(method, &bytes[page * PAGE..(page + 1) * PAGE])
                .is_some()
        })
    }

    pub(super) fn output(&self, length: usize) -> &[u8] {
        &self.output[..length]
    }
}

thread_local! {
    static ZSTD: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decodes a payload into exactly `out`. Allocates nothing by what the payload says.
///
/// # Errors
/// If it is damaged, or holds fewer or more bytes. `out` may have been written to then.
pub fn decode(encoding: Encoding, payload: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    let malformed = || CodecError::Malformed {
        encoding,
        length: payload.len(),
    };
    let expected = out.len();
    let actual = match encoding {
        Encoding::Raw => {
            if payload.len() == expected {
                out.copy_from_slice(payload);
            }
            payload.len()
        }
        Encoding::Lz4 => lz4_flex::block::decompress_into(payload, out).map_err(|_| malformed())?,
        Encoding::Zstd => ZSTD.with_borrow_mut(|context| {
            let decompressor = match context {
                Some(decompressor) => decompressor,
                none => none.insert(Decompressor::new().map_err(|_| malformed())?),
            };
            decompressor
                .decompress_to_buffer(payload, out)
                .map_err(|_| malformed())
        })?,
    };
    if actual == expected {
        Ok(())
    } else {
        Err(CodecError::Length {
            encoding,
            expected,
            actual,
        })
    }
}
