//! The data sets of a plan that lie on the hub: asked for before a worker starts, so that workers need files only.

use crate::config::plan::{DatasetPlan, Plan};
use crate::config::{Config, Notice};
use crate::error::{Error, Result};
use crate::hub::{Hub, dataset};

/// Writes the files of hub data sets into the plan; those that are not cached are fetched, if they may be. The resolved
/// config gets the commit they are of, so that a run from a checkpoint's own config sees the same rows.
pub fn settle(plan: &mut Plan, config: &Config, may_fetch: bool) -> Result<Vec<Notice>> {
    let Plan::Train(plan) = plan else { return Ok(vec![]) };
    let sections: Vec<(String, &mut DatasetPlan)> = config
        .sections("dataset")
        .zip(&mut plan.dataset)
        .chain(config.sections("dataset_val").zip(&mut plan.dataset_val))
        .filter(|(_, dataset)| dataset.hub.is_some())
        .collect();
    if sections.is_empty() {
        return Ok(vec![]);
    }
    let hub = Hub::from_env(None)?;
    let mut notices: Vec<Notice> = vec![];
    let mut resolved: serde_yaml::Value = serde_yaml::from_str(&plan.resolved_yaml)
        .map_err(|error| Error::bug("the resolved config is not YAML").cause(error))?;
    for (section, dataset) in sections {
        let locate = |key: &str| config.locate(&format!("{section}.{key}"));
        match dataset::settle(dataset, &hub, may_fetch) {
            Ok(None) => {}
            Ok(Some(message)) if notices.iter().any(|notice| notice.message == message) => {}
            Ok(Some(message)) => notices.push(Notice { message, location: locate("source") }),
            Err((key, mut error)) => {
                error.locations.insert(0, locate(key));
                return Err::<_, Error>(error);
            }
        }
        if let Some(pinned) = dataset.hub.as_ref().and_then(|hub| hub.pinned.as_ref()) {
            let place = section.split('.').try_fold(&mut resolved, |value, name| match name.parse::<usize>() {
                Ok(index) => value.get_mut(index),
                Err(_) => value.get_mut(name),
            });
            if let Some(place) = place {
                place["revision"] = pinned.commit.as_str().into();
            }
        }
    }
    plan.resolved_yaml =
        serde_yaml::to_string(&resolved).map_err(|error| Error::bug("the resolved config is not YAML").cause(error))?;
    Ok(notices)
}
