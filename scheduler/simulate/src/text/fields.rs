//! `KEY=VALUE` words of a line, each taken once.

use std::ops::RangeInclusive;

use shoal_plan::text::{parse_duration, parse_number, parse_size};

use crate::trace::cut;

pub(super) struct Fields<'a> {
    line: &'static str,
    left: Vec<(&'a str, &'a str)>,
}

impl<'a> Fields<'a> {
    pub fn new(line: &'static str, text: &'a str) -> Result<Self, String> {
        let mut left: Vec<(&str, &str)> = Vec::new();
        for word in text.split_ascii_whitespace() {
            let pair = word.split_once('=');
            let (key, value) = pair.ok_or_else(|| format!("{line}: '{}' is not KEY=VALUE", cut(word)))?;
            if left.iter().any(|(other, _)| *other == key) {
                return Err(format!("{line}: {}: is there twice", cut(key)));
            }
            left.push((key, value));
        }
        Ok(Self { line, left })
    }

    /// What these are fields of.
    pub fn line(&self) -> &'static str {
        self.line
    }

    pub fn take(&mut self, key: &str) -> Option<&'a str> {
        let at = self.left.iter().position(|(other, _)| *other == key)?;
        Some(self.left.swap_remove(at).1)
    }

    fn value(
        &mut self,
        key: &str,
        what: &str,
        parse: impl Fn(&str) -> Option<f64>,
        range: &RangeInclusive<f64>,
    ) -> Result<Option<f64>, String> {
        let Some(text) = self.take(key) else {
            return Ok(None);
        };
        let value = parse(text).filter(|value| range.contains(value));
        value
            .map(Some)
            .ok_or_else(|| format!("{}: {key}: '{}' is not {what}", self.line, cut(text)))
    }

    pub fn number(&mut self, key: &str, range: RangeInclusive<f64>, into: &mut f64) -> Result<(), String> {
        let what = format!("a number of {} to {}", range.start(), range.end());
        if let Some(value) = self.value(key, &what, parse_number, &range)? {
            *into = value;
        }
        Ok(())
    }

    pub fn seconds(&mut self, key: &str, range: RangeInclusive<f64>, into: &mut f64) -> Result<(), String> {
        let what = format!(
            "a duration like 90s or 500ms, of {} s to {} s",
            range.start(),
            range.end()
        );
        let parse = |text: &str| parse_duration(text).map(|duration| duration.as_secs_f64());
        if let Some(value) = self.value(key, &what, parse, &range)? {
            *into = value;
        }
        Ok(())
    }

    /// Bytes, or bytes per second.
    pub fn size(&mut self, key: &str, into: &mut f64) -> Result<(), String> {
        let parse = |text: &str| parse_size(text).map(|size| size as f64);
        let most = (1_u64 << 50) as f64;
        if let Some(value) = self.value(
            key,
            "a size like 512MiB, of at most 1024TiB",
            parse,
            &(0.0..=most),
        )? {
            *into = value;
        }
        Ok(())
    }

    pub fn whole(&mut self, key: &str, range: RangeInclusive<u64>, into: &mut u64) -> Result<(), String> {
        if let Some(text) = self.take(key) {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            let value = text.parse().ok().filter(|value| digits && range.contains(value));
            *into = value.ok_or_else(|| {
                let (line, value) = (self.line, cut(text));
                format!(
                    "{line}: {key}: '{value}' is not a whole number of {} to {}",
                    range.start(),
                    range.end()
                )
            })?;
        }
        Ok(())
    }

    pub fn finish(self) -> Result<(), String> {
        match self.left.first() {
            Some((key, _)) => Err(format!("{}: {}: is no field of it", self.line, cut(key))),
            None => Ok(()),
        }
    }
}
