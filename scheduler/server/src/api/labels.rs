//! Labels and terms from requests. Every refusal names the field.

use shoal_plan::labels::MOST;
use shoal_plan::{Label, LabelError, Labels, Term};
use tonic::Status;

/// One thing's labels.
pub fn all(field: &'static str, texts: &[String]) -> Result<Labels, Status> {
    Labels::new(list(field, texts)?).map_err(|error| refused(field, &error))
}

/// Labels, changed.
pub fn changed(
    field: &'static str,
    now: &Labels,
    set: &[String],
    remove: &[String],
) -> Result<Labels, Status> {
    let set: Vec<Label> = list(field, set)?;
    now.changed(set, remove).map_err(|error| refused(field, &error))
}

/// Terms of a rule.
pub fn terms(field: &'static str, texts: &[String]) -> Result<Vec<Term>, Status> {
    list(field, texts)
}

fn list<T: std::str::FromStr<Err = LabelError>>(
    field: &'static str,
    texts: &[String],
) -> Result<Vec<T>, Status> {
    if texts.len() > MOST {
        return Err(refused(field, &LabelError::TooMany));
    }
    let parsed = texts.iter().map(|text| text.parse());
    parsed
        .collect::<Result<_, _>>()
        .map_err(|error| refused(field, &error))
}

fn refused(field: &'static str, error: &LabelError) -> Status {
    Status::invalid_argument(format!("{field}: {error}"))
}
