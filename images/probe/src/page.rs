//! What a page holds: its own number and generation, a check word, and a body that follows from them.

/// A page as 64-bit words.
pub type Page = [u64; 512];

/// Words made at a time. Eight independent generators let the compiler use vector instructions.
const LANES: usize = 8;

/// What text is made of: five bits tell a word of eight bytes.
#[rustfmt::skip]
const VOCABULARY: [[u8; 8]; 32] = [
    *b"address ", *b"boundary", *b"capacity", *b"channel ", *b"counter ", *b"deferred",
    *b"delivery", *b"descend ", *b"distance", *b"element ", *b"eventual", *b"fragment",
    *b"hardware", *b"identity", *b"instance", *b"interval", *b"journal ", *b"latency ",
    *b"machine ", *b"mapping ", *b"migrate ", *b"network ", *b"offline ", *b"outcome ",
    *b"packets ", *b"physical", *b"process ", *b"release ", *b"schedule", *b"segment ",
    *b"transfer", *b"workload",
];

/// How a page is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// No two pages alike, no page ever twice the same, and nothing for a compressor to find.
    Random,
    /// Zeros; a page that has been dirtied carries its header.
    Zero,
    /// Words of English, and every eighth one random: what a compressor halves at least, and does not make vanish.
    Text,
}

/// A page's number and how often it has been dirtied; all that it holds follows from these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Its number, counted over all the memory the probe uses.
    pub number: u64,
    /// 0 when filled, one more each time it is dirtied.
    pub generation: u64,
}

/// The first word of a page that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Which word.
    pub word: usize,
    /// What it should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
}

/// The words of one page, `LANES` at a time.
struct Words {
    lanes: [u64; LANES],
    header: Option<[u64; 3]>,
    text: bool,
}

impl Words {
    fn new(identity: Identity, pattern: Pattern) -> Self {
        let check = mix(identity.number ^ mix(identity.generation));
        let header = Some([identity.number, identity.generation, check]);
        match pattern {
            Pattern::Random | Pattern::Text => Self {
                lanes: core::array::from_fn(|lane| mix(check.wrapping_add(lane as u64)) | 1),
                header,
                text: pattern == Pattern::Text,
            },
            Pattern::Zero => Self {
                lanes: [0; LANES],
                header: header.filter(|_| identity.generation > 0),
                text: false,
            },
        }
    }

    #[inline(always)]
    fn next(&mut self) -> [u64; LANES] {
        // Marsaglia's xorshift: a lane of zero stays zero, any other never becomes zero.
        for lane in &mut self.lanes {
            *lane ^= *lane << 13;
            *lane ^= *lane >> 7;
            *lane ^= *lane << 17;
        }
        let mut words = self.lanes;
        if self.text {
            for word in &mut words[..LANES - 1] {
                *word = u64::from_le_bytes(VOCABULARY[(*word >> 40) as usize % VOCABULARY.len()]);
            }
        }
        if let Some(header) = self.header.take() {
            words[..3].copy_from_slice(&header);
        }
        words
    }
}

/// Writes the whole page.
pub fn write(page: &mut Page, identity: Identity, pattern: Pattern) {
    let mut words = Words::new(identity, pattern);
    for chunk in page.as_chunks_mut::<LANES>().0 {
        *chunk = words.next();
    }
}

/// Checks the whole page.
///
/// # Errors
/// The first word that differs.
pub fn check(page: &Page, identity: Identity, pattern: Pattern) -> Result<(), Mismatch> {
    let mut words = Words::new(identity, pattern);
    for (index, chunk) in page.as_chunks::<LANES>().0.iter().enumerate() {
        let expected = words.next();
        let difference = expected
            .iter()
            .zip(chunk)
            .fold(0, |all, (expected, found)| all | (expected ^ found));
        if difference != 0 {
            return Err(first_difference(index * LANES, &expected, chunk));
        }
    }
    Ok(())
}

#[cold]
fn first_difference(start: usize, expected: &[u64; LANES], found: &[u64; LANES]) -> Mismatch {
    let lane = (0..LANES - 1)
        .find(|&lane| expected[lane] != found[lane])
        .unwrap_or(LANES - 1);
    Mismatch {
        word: start + lane,
        expected: expected[lane],
        found: found[lane],
    }
}

/// A bijection of 64-bit words that leaves no visible pattern (the finalizer of Steele's splitmix64).
fn mix(mut word: u64) -> u64 {
    word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const SOME: Identity = Identity {
        number: 17,
        generation: 3,
    };

    #[test]
    fn what_is_written_checks() {
        for pattern in [Pattern::Random, Pattern::Zero, Pattern::Text] {
            let mut page = [0xaa; 512];
            write(&mut page, SOME, pattern);
            assert_eq!(check(&page, SOME, pattern), Ok(()));
        }
    }

    #[test]
    fn every_single_word_counts() {
        for pattern in [Pattern::Random, Pattern::Zero, Pattern::Text] {
            let mut page = [0; 512];
            write(&mut page, SOME, pattern);
            for word in 0..page.len() {
                page[word] ^= 1 << (word % 64);
                let mismatch = check(&page, SOME, pattern).expect_err("one bit is wrong");
                assert_eq!((mismatch.word, mismatch.found), (word, page[word]));
                page[word] ^= 1 << (word % 64);
            }
        }
    }

    #[test]
    fn another_page_or_generation_does_not_check() {
        for pattern in [Pattern::Random, Pattern::Text] {
            let mut page = [0; 512];
            write(&mut page, SOME, pattern);
            for other in [
                Identity { number: 18, ..SOME },
                Identity {
                    generation: 2,
                    ..SOME
                },
            ] {
                assert!(check(&page, other, pattern).is_err());
            }
        }
    }

    #[test]
    fn text_is_seven_words_of_the_vocabulary_and_one_of_noise() {
        let mut page = [0; 512];
        write(&mut page, SOME, Pattern::Text);
        let known: HashSet<_> = VOCABULARY.map(u64::from_le_bytes).into_iter().collect();
        assert_eq!(known.len(), VOCABULARY.len());
        let (mut seen, mut noise) = (HashSet::new(), HashSet::new());
        for (index, word) in page.iter().enumerate().skip(3) {
            assert_eq!(known.contains(word), index % LANES != LANES - 1, "word {index}");
            if known.contains(word) {
                seen.insert(*word);
            } else {
                noise.insert(*word);
            }
        }
        assert_eq!((seen.len(), noise.len()), (VOCABULARY.len(), 512 / LANES));
    }

    #[test]
    fn a_filled_zero_page_is_zero_and_random_words_never_repeat() {
        let fresh = |number| Identity {
            number,
            generation: 0,
        };
        let mut page = [1; 512];
        write(&mut page, fresh(5), Pattern::Zero);
        assert!(page.iter().all(|&word| word == 0));
        let mut seen = HashSet::new();
        for number in 0..50 {
            write(&mut page, fresh(number), Pattern::Random);
            for word in &page[3..] {
                assert!(*word != 0 && seen.insert(*word));
            }
        }
    }
}
