//! The fields of one line.

use std::str::FromStr;

use super::value::{parse_number, parse_size};
use crate::model::BytesPerSecond;

/// The longest line has some forty fields.
const MOST: usize = 64;

pub(super) const SIZE: &str = "a size like 384MiB or bytes";
pub(super) const DURATION: &str = "a duration like 5s or 500ms";
pub(super) const COUNT: &str = "a whole number";
pub(super) const NUMBER: &str = "a number from 0";
pub(super) const NAME: &str = "a name";
pub(super) const LABELS: &str = "KEY=VALUE, separated by commas";
pub(super) const TERMS: &str = "KEY, KEY=VALUE or KEY!=VALUE, separated by commas";

pub(super) fn parse_from_str<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

/// The `KEY=VALUE` of one line. What is not taken in the end was not understood.
pub(super) struct Fields<'a> {
    of: String,
    left: Vec<(&'a str, &'a str)>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(of: &str, words: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let pairs: Result<Vec<(&str, &str)>, String> = words
            .take(MOST + 1)
            .map(|word| {
                word.split_once('=')
                    .ok_or_else(|| format!("{of}: '{}' is not KEY=VALUE", cut(word)))
            })
            .collect();
        Self::from_pairs(of, pairs?.into_iter())
    }

    pub(super) fn from_pairs(
        of: &str,
        pairs: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, String> {
        let mut left: Vec<(&str, &str)> = Vec::new();
        for (key, value) in pairs {
            if left.len() == MOST {
                return Err(format!("{of}: too many fields"));
            }
            if left.iter().any(|(other, _)| *other == key) {
                return Err(format!("{of}: {} is there twice", cut(key)));
            }
            left.push((key, value));
        }
        Ok(Self {
            of: of.to_owned(),
            left,
        })
    }

    /// Sets `value` if the key is there.
    pub(super) fn set<T>(
        &mut self,
        key: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
        value: &mut T,
    ) -> Result<(), String> {
        let Some(index) = self.left.iter().position(|(other, _)| *other == key) else {
            return Ok(());
        };
        let (_, text) = self.left.swap_remove(index);
        let wrong = || format!("{}: {key}: '{}' is not {expected}", self.of, cut(text));
        *value = parse(text).ok_or_else(wrong)?;
        Ok(())
    }

    pub(super) fn required<T>(
        &mut self,
        key: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, String> {
        let mut value = None;
        self.set(key, expected, |text| parse(text).map(Some), &mut value)?;
        value.ok_or_else(|| format!("{}: {key} is missing: {expected}", self.of))
    }

    pub(super) fn number(&mut self, key: &str, value: &mut f64) -> Result<(), String> {
        self.set(key, NUMBER, parse_number, value)
    }

    pub(super) fn rate(&mut self, key: &str, value: &mut BytesPerSecond) -> Result<(), String> {
        self.set(key, SIZE, parse_size, &mut value.0)
    }

    pub(super) fn finish(self) -> Result<(), String> {
        match self.left.first() {
            Some((key, _)) => Err(format!("{}: {}: no such field", self.of, cut(key))),
            None => Ok(()),
        }
    }
}

/// Enough of a value to recognise it by.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(60).collect()
}
