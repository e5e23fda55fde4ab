//! Before the first step the ranks compare what they opened. Started by hand or on machines without a shared disk, one of
//! them may have another config, other rows or another model, and would add the gradients of another run.

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
    if differences.is_empty() {
        let ranks: Vec<_> = ranks.iter().map(usize::to_string).collect();
        return Err(dist::stopped(format!("rank {} opened something else than rank 0", ranks.join(", "))));
    }
    let error = Error::config(format!("rank {} opened something else than rank 0", group.rank));
    Err(differences.into_iter().fold(error, Error::cause).hint(
        "start every rank with the same config and overrides, over the same files, with the same build of `host`",
    ))
}

/// A line for each fact that is not the same on both sides.
fn differences(theirs: &Facts, ours: &Facts) -> Vec<String> {
    let names: BTreeSet<&String> = theirs.keys().chain(ours.keys()).collect();
    let value = |facts: &Facts, name: &String| facts.get(name).cloned().unwrap_or("not set".into());
    names
        .into_iter()
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
    }
}
