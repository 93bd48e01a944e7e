//! The policy that plans are made with: what the scheduler was started with, and over it what operators have set, by name.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use shoal_plan::{Policy, text};
use shoal_proto::cluster::{PolicyField, SchedulingPolicy, SetPolicyRequest};

/// Fields by name, as text.
pub type Fields = BTreeMap<String, String>;

/// A name or a value that the policy does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PolicyTextError(String);

#[derive(Debug)]
struct Current {
    set: Fields,
    whole: Arc<Policy>,
}

/// The policy in memory; the store is written first.
#[derive(Debug)]
pub struct PlannerPolicy {
    base: Policy,
    current: RwLock<Current>,
    /// Held while it is changed.
    pub changing: tokio::sync::Mutex<()>,
}

/// A change that has been checked.
#[derive(Debug)]
pub struct Changed {
    /// All that is set afterwards.
    pub set: Fields,
    whole: Policy,
}

impl PlannerPolicy {
    /// As it was stored, over what the scheduler was started with.
    pub fn new(base: Policy, set: Fields) -> Result<Self, PolicyTextError> {
        let whole = Arc::new(over(&base, &set)?);
        Ok(Self {
            base,
            current: RwLock::new(Current { set, whole }),
            changing: tokio::sync::Mutex::default(),
        })
    }

    /// What holds now.
    pub fn get(&self) -> Arc<Policy> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&current.whole)
    }

    /// Checks a change; nothing is changed.
    pub fn change(&self, request: SetPolicyRequest) -> Result<Changed, PolicyTextError> {
        let mut set = self
            .current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .set
            .clone();
        let names: Fields = text::print_policy_fields(&self.base).into_iter().collect();
        for name in &request.reset {
            if !names.contains_key(name) {
                let name = crate::limits::shorten(name);
                return Err(PolicyTextError(format!("policy: {name}: no such field")));
            }
            set.remove(name);
        }
        set.extend(request.values);
        let whole = over(&self.base, &set)?;
        // As it is printed, so that the same value always reads the same.
        let printed: Fields = text::print_policy_fields(&whole).into_iter().collect();
        for (name, value) in &mut set {
            if let Some(printed) = printed.get(name) {
                value.clone_from(printed);
            }
        }
        Ok(Changed { set, whole })
    }

    /// It differs from what holds.
    pub fn differs(&self, changed: &Changed) -> bool {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.set != changed.set
    }

    /// Shows a change that has been stored.
    pub fn replace(&self, changed: Changed) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        current.set = changed.set;
        current.whole = Arc::new(changed.whole);
    }

    /// All of it, for people.
    pub fn view(&self) -> SchedulingPolicy {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let fields = text::print_policy_fields(&current.whole)
            .into_iter()
            .zip(text::print_policy_fields(&self.base))
            .map(|((name, value), (_, default_value))| PolicyField {
                set: current.set.contains_key(&name),
                name,
                value,
                default_value,
            });
        SchedulingPolicy {
            fields: fields.collect(),
        }
    }
}

fn over(base: &Policy, set: &Fields) -> Result<Policy, PolicyTextError> {
    let fields = set.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    text::set_policy_fields(base, fields).map_err(PolicyTextError)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(values: &[(&str, &str)], reset: &[&str]) -> SetPolicyRequest {
        let owned = |text: &&str| (*text).to_owned();
        SetPolicyRequest {
            values: values
                .iter()
                .map(|(name, value)| (owned(name), owned(value)))
                .collect(),
            reset: reset.iter().map(owned).collect(),
        }
    }

    #[test]
    fn fields_are_set_over_the_start_and_reset_to_it() {
        let base = Policy {
            overcommit: 2.0,
            ..Policy::default()
        };
        let policy = PlannerPolicy::new(base.clone(), Fields::new()).expect("nothing set");
        let changed = policy
            .change(request(
                &[
                    ("n_plus_one", "on"),
                    ("overcommit", "1.50"),
                    ("cool_down", "2000ms"),
                ],
                &[],
            ))
            .expect("good");
        let stored = changed.set.clone();
        policy.replace(changed);
        assert!(policy.get().n_plus_one && policy.get().overcommit == 1.5);
        let again = PlannerPolicy::new(base.clone(), stored).expect("as stored");
        assert_eq!(again.get(), policy.get());
        let shown = again.view().fields;
        let field = |name: &str| shown.iter().find(|field| field.name == name).expect("a field");
        assert_eq!(
            (
                field("overcommit").value.as_str(),
                field("overcommit").default_value.as_str()
            ),
            ("1.5", "2")
        );
        assert_eq!(field("cool_down").value, "2s");
        assert!(field("cool_down").set && !field("detect").set);
        policy.replace(
            policy
                .change(request(&[], &["overcommit", "n_plus_one", "cool_down"]))
                .expect("good"),
        );
        assert_eq!(*policy.get(), base);
    }

    #[test]
    fn what_is_wrong_is_named_and_changes_nothing() {
        let policy = PlannerPolicy::new(Policy::default(), Fields::new()).expect("nothing set");
        for (values, reset, message) in [
            (&[("colour", "red")][..], &[][..], "policy: colour: no such field"),
            (
                &[("overcommit", "much")],
                &[],
                "policy: overcommit: 'much' is not a number from 0",
            ),
            (
                &[("overcommit", "0.5")],
                &[],
                "policy overcommit: must be 1 to 100",
            ),
            (&[], &["colour"], "policy: colour: no such field"),
        ] {
            let error = policy.change(request(values, reset)).expect_err(message);
            assert_eq!(error.to_string(), message);
        }
        assert_eq!(*policy.get(), Policy::default());
    }
}
