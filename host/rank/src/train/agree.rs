//! Before the first step the ranks compare what they opened: config and guests as soon as they meet, while collectives
//! that only one config asks for cannot hang the others yet, then rows and model. Started by hand or on machines without a
//! shared disk, one of them may have others, and would add the gradients of another run.

use std::collections::{BTreeMap, BTreeSet};

use host::{Error, Result};
use serde_json::Value;

use crate::dist::{self, Group};

/// What a rank opened, by a name that a person knows.
pub type Facts = BTreeMap<String, String>;

/// Adds every key of a resolved config, by dotted path.
pub fn add_config(facts: &mut Facts, path: &str, value: &Value) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            add_config(facts, &path, value);
        }),
        value => {
            facts.insert(format!("`{path}`"), value.to_string());
        }
    }
}

/// Fails on every rank when one of them opened something else than rank 0: there with what differs, elsewhere with whom.
pub fn check(group: &Group, facts: &Facts) -> Result<()> {
    let ours = serde_json::to_vec(facts).map_err(|error| Error::bug("facts are not JSON").cause(error))?;
    let theirs = group.from_main(&ours)?;
    let theirs: Facts =
        serde_json::from_slice(&theirs).map_err(|error| Error::bug("facts are not JSON").cause(error))?;
    let differences = differences(&theirs, facts);
    let ranks = group.which(!differences.is_empty())?;
    if ranks.is_empty() {
        return Ok(());
    }
    let what = format!("{} opened something else than rank 0", dist::named(&ranks));
    if differences.is_empty() {
        return Err(dist::stopped(what));
    }
    let error = Error::config(what);
    Err(differences.into_iter().fold(error, Error::cause).hint(
        "start every rank with the same config and overrides, over the same files, with the same build of `host`",
    ))
}

/// A line for each fact that is not the same on both sides; one for a section that one side lacks.
fn differences(theirs: &Facts, ours: &Facts) -> Vec<String> {
    let names: BTreeSet<&String> = theirs.keys().chain(ours.keys()).collect();
    let inside = |name: &str| format!("{}.", name.trim_end_matches('`'));
    let value = |facts: &Facts, name: &String| match facts.get(name) {
        Some(value) => value.clone(),
        None if facts.keys().any(|other| other.starts_with(&inside(name))) => "a section".to_owned(),
        None => "not set".to_owned(),
    };
    let is_in_another = |name: &String| names.iter().any(|other| name.starts_with(&inside(other)));
    names
        .iter()
        .filter(|name| !is_in_another(name))
        .map(|name| (name, value(theirs, name), value(ours, name)))
        .filter(|(_, theirs, ours)| theirs != ours)
        .map(|(name, theirs, ours)| format!("{name}: {theirs} on rank 0, {ours} here"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_keys_and_both_values() {
        let facts = |text: &str| {
            let mut facts = Facts::new();
            add_config(&mut facts, "", &serde_json::from_str(text).unwrap());
            facts
        };
        let one = facts(r#"{"seed": 1, "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "compat": null}"#);
        let other =
            facts(r#"{"seed": 1, "optimizer": {"lr": 0.2, "betas": [0.9, 0.95], "eps": 1e-8}, "compat": null}"#);
        assert_eq!(differences(&one, &one), [""; 0]);
        assert_eq!(
            differences(&one, &other),
            ["`optimizer.eps`: not set on rank 0, 1e-8 here", "`optimizer.lr`: 0.1 on rank 0, 0.2 here"]
        );
        let without = facts(r#"{"seed": 1, "optimizer": null, "compat": null}"#);
        assert_eq!(differences(&one, &without), ["`optimizer`: a section on rank 0, null here"]);
        assert_eq!(differences(&without, &one), ["`optimizer`: null on rank 0, a section here"]);
    }
}
