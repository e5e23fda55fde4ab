//! Errors: the host's, with the place in the guest where `?` met them.

use std::fmt;
use std::panic::Location;

use crate::bindings::host::sdk::types;

/// A failed call, or a guest's own reason to stop.
///
/// `?` turns the errors of host calls into this type and notes the line it stands on.
#[derive(Clone, Debug)]
pub struct Error {
    /// What kind of mistake it is.
    pub code: types::Code,
    /// What failed, what was found and what is needed.
    pub message: String,
    /// One action that works.
    pub hint: Option<String>,
    at: &'static Location<'static>,
}

/// A result with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A guest's own error.
    #[track_caller]
    pub fn new(message: impl Into<String>) -> Self {
        Self { code: types::Code::Invalid, message: message.into(), hint: None, at: Location::caller() }
    }

    /// Adds an action that works.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl From<types::Error> for Error {
    #[track_caller]
    fn from(error: types::Error) -> Self {
        Self { code: error.code, message: error.message, hint: error.hint, at: Location::caller() }
    }
}

impl From<&str> for Error {
    #[track_caller]
    fn from(message: &str) -> Self {
        Self::new(message)
    }
}

impl From<String> for Error {
    #[track_caller]
    fn from(message: String) -> Self {
        Self::new(message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)
    }
}

impl std::error::Error for Error {}

#[doc(hidden)]
pub fn into_failure(error: Error) -> types::Failure {
    types::Failure {
        at: Some(format!("{}:{}", error.at.file(), error.at.line())),
        error: types::Error { code: error.code, message: error.message, hint: error.hint },
    }
}
