//! The keys of a guest's own section of the config, in the form that each front gives them in.

use std::path::Path;

use host::config::plan::GuestRef;
use host::{Error, Result};
use rhai::Map;
use serde_json::Value as Json;

use super::api::types::{Setting, Value};
use super::guest::World;
use super::rhai::{Convert, Shared};

#[derive(Clone)]
pub struct Settings(Vec<Setting>);

impl Settings {
    pub fn of(guest: &GuestRef, world: World) -> Result<Self> {
        let given = guest.settings.as_object().into_iter().flatten();
        let setting = |(name, value): (&String, &Json)| {
            let value = value_of(value).ok_or_else(|| {
                let what = format!("`{name}` of the {} `{}` is {value}", world.noun(), guest.path.display());
                Error::config(what).hint("a guest's settings are single values: a text, a flag or a number")
            })?;
            Ok(Setting { name: name.clone(), value })
        };
        given.map(setting).collect::<Result<_>>().map(Self)
    }

    pub fn for_component(&self) -> &[Setting] {
        &self.0
    }

    pub fn for_script(&self, shared: &Shared) -> Map {
        let settings = self.0.iter().cloned();
        settings.map(|setting| (setting.name.into(), setting.value.to_rhai(shared))).collect()
    }

    /// An error where a script is given settings and none of its functions takes them.
    pub fn must_be_none(&self, path: &Path, world: World, taker: &str) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let keys = host::error::quoted(self.0.iter().map(|setting| &setting.name));
        let what = format!("the {} `{}` takes no settings, and was given {keys}", world.noun(), path.display());
        Err(Error::config(what).hint(format!("define `{taker}` to take them, or remove the keys")))
    }
}

/// A value of the config as a guest is given it; none of a list or a section.
pub fn value_of(value: &Json) -> Option<Value> {
    Some(match value {
        Json::Null => Value::None,
        Json::Bool(flag) => Value::Flag(*flag),
        Json::String(text) => Value::Text(text.clone()),
        Json::Number(number) => match number.as_i64() {
            Some(int) => Value::Int(int),
            None => Value::Num(number.as_f64()?),
        },
        Json::Array(_) | Json::Object(_) => return None,
    })
}
