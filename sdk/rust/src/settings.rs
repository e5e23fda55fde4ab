//! What the config tells a loss or a template.

use crate::bindings::host::sdk::types::Setting;
use crate::{Error, Result, Value};

/// The keys of the section that names the guest, besides `_component_`.
pub struct Settings(Vec<Setting>);

impl Settings {
    #[doc(hidden)]
    pub fn new(settings: Vec<Setting>) -> Self {
        Self(settings)
    }

    /// The value of a key; `None` where the config has none.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|setting| setting.name == name).map(|setting| &setting.value)
    }

    /// A number, or `default` where the config has none.
    ///
    /// # Errors
    /// The key holds something else than a number.
    #[track_caller]
    pub fn number(&self, name: &str, default: f64) -> Result<f64> {
        match self.get(name) {
            None | Some(Value::None) => Ok(default),
            Some(Value::Int(value)) => Ok(*value as f64),
            Some(Value::Num(value)) => Ok(*value),
            Some(_) => Err(Error::new(format!("`{name}` must be a number"))),
        }
    }

    /// A text, or `default` where the config has none.
    ///
    /// # Errors
    /// The key holds something else than a text.
    #[track_caller]
    pub fn text<'a>(&'a self, name: &str, default: &'a str) -> Result<&'a str> {
        match self.get(name) {
            None | Some(Value::None) => Ok(default),
            Some(Value::Text(value)) => Ok(value),
            Some(_) => Err(Error::new(format!("`{name}` must be a text"))),
        }
    }

    /// A flag, or `default` where the config has none.
    ///
    /// # Errors
    /// The key holds something else than a flag.
    #[track_caller]
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None | Some(Value::None) => Ok(default),
            Some(Value::Flag(value)) => Ok(*value),
            Some(_) => Err(Error::new(format!("`{name}` must be a flag"))),
        }
    }
}
