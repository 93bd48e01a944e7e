//! Labels, rules and kinds of KVM in records: as the text that people write.

/// Labels separated by commas; empty: none.
pub mod labels {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};
    use shoal_plan::Labels;

    pub fn serialize<S: Serializer>(labels: &Labels, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(labels)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Labels, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(Labels::default());
        }
        text.parse().map_err(D::Error::custom)
    }
}

/// Four lists of terms, and whether the node is to be for the VM alone.
pub mod rules {
    use std::sync::Arc;

    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use shoal_plan::labels::{parse_terms, print_terms};
    use shoal_plan::{LabelError, Rules, Term};

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(default)]
    struct Texts {
        selector: String,
        tolerations: String,
        affinity: String,
        anti_affinity: String,
        exclusive: bool,
    }

    pub fn serialize<S: Serializer>(rules: &Option<Arc<Rules>>, serializer: S) -> Result<S::Ok, S::Error> {
        let texts = rules.as_ref().map(|rules| Texts {
            selector: print_terms(&rules.selector),
            tolerations: print_terms(&rules.tolerations),
            affinity: print_terms(&rules.affinity),
            anti_affinity: print_terms(&rules.anti_affinity),
            exclusive: rules.exclusive,
        });
        texts.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Arc<Rules>>, D::Error> {
        let texts = Option::<Texts>::deserialize(deserializer)?;
        texts.map_or(Ok(None), |texts| read(&texts).map_err(D::Error::custom))
    }

    fn read(texts: &Texts) -> Result<Option<Arc<Rules>>, LabelError> {
        let terms = |text: &str| -> Result<Vec<Term>, LabelError> {
            if text.is_empty() {
                return Ok(Vec::new());
            }
            parse_terms(text)
        };
        let rules = Rules {
            selector: terms(&texts.selector)?,
            tolerations: terms(&texts.tolerations)?,
            affinity: terms(&texts.affinity)?,
            anti_affinity: terms(&texts.anti_affinity)?,
            exclusive: texts.exclusive,
        };
        Ok((!rules.is_empty()).then(|| Arc::new(rules)))
    }
}

/// A kind of KVM; null: not known.
pub mod kvm {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};
    use shoal_plan::KvmKind;

    pub fn serialize<S: Serializer>(kvm: &Option<KvmKind>, serializer: S) -> Result<S::Ok, S::Error> {
        kvm.map(|kvm| kvm.to_string()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<KvmKind>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(D::Error::custom))
            .transpose()
    }
}
