//! Labels of nodes and VMs, and what is asked of them. A label is `key=value`; keys and values are 1 to 63 letters, digits
//! and `._/-`, a value may be empty. So they need no quoting anywhere.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

const LONGEST: usize = 63;
/// Labels of one thing, and terms of one rule.
pub const MOST: usize = 64;

/// Text that is no label, or no term.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// One of its two parts has other characters, or too many.
    #[error("'{0}' is not {1}: keys and values are 1 to 63 letters, digits and ._/-")]
    Form(String, &'static str),
    /// There are too many.
    #[error("more than {MOST} labels")]
    TooMany,
    /// Labels with the same key.
    #[error("'{0}' is there twice")]
    Twice(String),
}

/// A key and its value, which may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Label {
    key: Arc<str>,
    value: Arc<str>,
}

impl Label {
    /// From its parts.
    ///
    /// # Errors
    /// One of them has other characters than allowed.
    pub fn new(key: &str, value: &str) -> Result<Self, LabelError> {
        if is_word(key) && (value.is_empty() || is_word(value)) {
            Ok(Self {
                key: Arc::from(key),
                value: Arc::from(value),
            })
        } else {
            Err(LabelError::Form(cut(&format!("{key}={value}")), "KEY=VALUE"))
        }
    }

    /// What it is about.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What it says.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            f.write_str(&self.key)
        } else {
            write!(f, "{}={}", self.key, self.value)
        }
    }
}

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        Self::new(key, value)
    }
}

/// The labels of one thing, by key. Cloning them is cheap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels(Option<Arc<[Label]>>);

impl Labels {
    /// From single ones.
    ///
    /// # Errors
    /// A key is there twice, or there are too many.
    pub fn new(labels: impl IntoIterator<Item = Label>) -> Result<Self, LabelError> {
        let mut by_key = BTreeMap::new();
        for label in labels {
            if let Some(twice) = by_key.insert(Arc::clone(&label.key), label) {
                return Err(LabelError::Twice(twice.key.to_string()));
            }
        }
        Self::from_map(by_key)
    }

    /// These, with others set and some keys removed.
    ///
    /// # Errors
    /// There would be too many.
    pub fn changed(
        &self,
        set: impl IntoIterator<Item = Label>,
        remove: &[String],
    ) -> Result<Self, LabelError> {
        let own = self.iter().cloned().chain(set);
        let mut by_key: BTreeMap<Arc<str>, Label> =
            own.map(|label| (Arc::clone(&label.key), label)).collect();
        for key in remove {
            by_key.remove(key.as_str());
        }
        Self::from_map(by_key)
    }

    fn from_map(by_key: BTreeMap<Arc<str>, Label>) -> Result<Self, LabelError> {
        if by_key.len() > MOST {
            return Err(LabelError::TooMany);
        }
        let labels: Arc<[Label]> = by_key.into_values().collect();
        Ok(Self((!labels.is_empty()).then_some(labels)))
    }

    /// By key.
    pub fn iter(&self) -> impl Iterator<Item = &Label> {
        self.0.iter().flat_map(|labels| labels.iter())
    }

    /// There is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let found = self.iter().find(|label| &*label.key == key);
        found.map(Label::value)
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        list(f, self.iter())
    }
}

impl FromStr for Labels {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        Self::new(
            text.split(',')
                .map(Label::from_str)
                .collect::<Result<Vec<_>, _>>()?,
        )
    }
}

/// One thing asked of labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Term {
    /// `key`: it is there, with any value.
    Present(Arc<str>),
    /// `key=value`.
    Equals(Label),
    /// `key!=value`: another value, or none.
    Differs(Label),
}

impl Term {
    /// Whether these labels are as asked.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        match self {
            Self::Present(key) => labels.get(key).is_some(),
            Self::Equals(label) => labels.get(&label.key) == Some(&label.value),
            Self::Differs(label) => labels.get(&label.key) != Some(&label.value),
        }
    }

    /// Whether this one label is as asked.
    #[must_use]
    pub fn matches_label(&self, other: &Label) -> bool {
        match self {
            Self::Present(key) => *key == other.key,
            Self::Equals(label) => label == other,
            Self::Differs(label) => label.key == other.key && label.value != other.value,
        }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Present(key) => f.write_str(key),
            Self::Equals(label) => write!(f, "{}={}", label.key, label.value),
            Self::Differs(label) => write!(f, "{}!={}", label.key, label.value),
        }
    }
}

impl FromStr for Term {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let bad = |_| LabelError::Form(cut(text), "KEY, KEY=VALUE or KEY!=VALUE");
        if let Some((key, value)) = text.split_once("!=") {
            return Label::new(key, value).map(Self::Differs).map_err(bad);
        }
        match text.split_once('=') {
            Some((key, value)) => Label::new(key, value).map(Self::Equals).map_err(bad),
            None => Label::new(text, "")
                .map(|label| Self::Present(label.key))
                .map_err(bad),
        }
    }
}

/// What a VM asks of the node it is on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Of the node's labels, each.
    pub selector: Vec<Term>,
    /// Taints of the node that it does not mind.
    pub tolerations: Vec<Term>,
    /// For each of these some other VM on the node is as asked.
    pub affinity: Vec<Term>,
    /// No other VM on the node is as asked by any of these.
    pub anti_affinity: Vec<Term>,
    /// No other VM is on the node.
    pub exclusive: bool,
}

impl Rules {
    /// Nothing is asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.selector.is_empty()
            && self.tolerations.is_empty()
            && self.affinity.is_empty()
            && self.anti_affinity.is_empty()
            && !self.exclusive
    }

    /// The first taint that it minds.
    #[must_use]
    pub fn untolerated<'t>(rules: Option<&Self>, taints: &'t Labels) -> Option<&'t Label> {
        let tolerated = |taint: &Label| {
            rules.is_some_and(|rules| rules.tolerations.iter().any(|term| term.matches_label(taint)))
        };
        taints.iter().find(|taint| !tolerated(taint))
    }
}

/// Terms separated by commas.
///
/// # Errors
/// One of them is not well formed, or there are too many.
pub fn parse_terms(text: &str) -> Result<Vec<Term>, LabelError> {
    let terms: Vec<Term> = text.split(',').map(Term::from_str).collect::<Result<_, _>>()?;
    if terms.len() > MOST {
        return Err(LabelError::TooMany);
    }
    Ok(terms)
}

/// Terms as [`parse_terms`] reads them.
#[must_use]
pub fn print_terms(terms: &[Term]) -> String {
    struct Terms<'a>(&'a [Term]);
    impl fmt::Display for Terms<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            list(f, self.0)
        }
    }
    Terms(terms).to_string()
}

fn list<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: impl IntoIterator<Item = T>) -> fmt::Result {
    for (number, item) in items.into_iter().enumerate() {
        if number > 0 {
            f.write_str(",")?;
        }
        item.fmt(f)?;
    }
    Ok(())
}

fn is_word(text: &str) -> bool {
    (1..=LONGEST).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte))
}

fn cut(text: &str) -> String {
    text.chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_match_as_they_read() {
        let labels: Labels = "zone=a,gpu,app=web".parse().expect("labels");
        assert_eq!(labels.to_string(), "app=web,gpu,zone=a");
        for (term, matches) in [
            ("zone=a", true),
            ("zone=b", false),
            ("zone!=a", false),
            ("zone!=b", true),
            ("disk!=ssd", true),
            ("zone", true),
            ("gpu", true),
            ("gpu=", true),
            ("disk", false),
            ("disk=", false),
        ] {
            let parsed: Term = term.parse().expect(term);
            assert_eq!(parsed.matches(&labels), matches, "{term}");
            assert_eq!(parsed.to_string(), term);
        }
        let taint: Label = "dedicated=db".parse().expect("a label");
        for (term, matches) in [
            ("dedicated", true),
            ("dedicated=db", true),
            ("dedicated=web", false),
        ] {
            assert_eq!(
                term.parse::<Term>().expect(term).matches_label(&taint),
                matches,
                "{term}"
            );
        }
    }

    #[test]
    fn what_is_no_label_is_refused() {
        for text in [
            "",
            "=",
            "=a",
            "a=b=c",
            "a b",
            "ü=1",
            "a=,",
            "!",
            "a,a",
            &"x".repeat(64),
        ] {
            assert!(text.parse::<Labels>().is_err(), "{text}");
        }
        for text in ["", "!=", "a!b", "a!=b!=c", "=b"] {
            assert!(text.parse::<Term>().is_err(), "{text}");
        }
        let many: Vec<String> = (0..65).map(|n| format!("k{n}")).collect();
        assert_eq!(many.join(",").parse::<Labels>(), Err(LabelError::TooMany));
        assert!(parse_terms(&many.join(",")).is_err());
    }

    #[test]
    fn labels_are_changed_by_key() {
        let labels: Labels = "a=1,b=2".parse().expect("labels");
        let set = ["b=3", "c=4"].map(|text| text.parse().expect("a label"));
        let changed = labels.changed(set, &["a".to_owned(), "x".to_owned()]);
        assert_eq!(changed.expect("few").to_string(), "b=3,c=4");
        let none = labels
            .changed([], &["a".to_owned(), "b".to_owned()])
            .expect("none");
        assert!(none.is_empty() && none == Labels::default());
    }
}
