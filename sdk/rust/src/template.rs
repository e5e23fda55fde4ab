//! Templates: a trait, and the macro that makes a type the template of a crate.

use std::cell::RefCell;

use crate::bindings::host::sdk::types::{Failure, Setting};
use crate::bindings::template::exports::host::sdk::rows;
use crate::error::into_failure;
use crate::{Error, Result, Settings};

pub use rows::{Message, Outcome, Preference, Role};

/// How rows of data become messages.
///
/// ```ignore
/// use host_sdk::prelude::*;
///
/// #[derive(Default)]
/// struct Echo;
///
/// impl Template for Echo {
///     fn configure(&mut self, _settings: &Settings, _columns: &[String]) -> Result<Vec<String>> {
///         Ok(vec!["input".into()])
///     }
///
///     fn render(&mut self, row: Row) -> Result<Vec<Message>, RowError> {
///         let text = row.get("input").ok_or("no `input`")?;
///         Ok(vec![Message::user([text]), Message::assistant([text])])
///     }
/// }
///
/// host_sdk::template!(Echo);
/// ```
pub trait Template: Default {
    /// Called once, before any row, with the other keys of the template's section, and the columns there are: those of the
    /// config, and `messages`, the row as a conversation. Gives back those that [`Template::render`] reads.
    fn configure(&mut self, settings: &Settings, columns: &[String]) -> Result<Vec<String>>;

    /// The messages of one row, or why it has none.
    fn render(&mut self, row: Row) -> Result<Vec<Message>, RowError> {
        let _ = row;
        Err("the template makes no single conversation".into())
    }

    /// What becomes of one row. For a preference data set's, in place of [`Template::render`], an [`Outcome::Pair`].
    fn outcome(&mut self, row: Row) -> Result<Outcome, RowError> {
        self.render(row).map(Outcome::Keep)
    }
}

/// One row: the values of the columns that [`Template::configure`] gave back.
pub struct Row<'a> {
    columns: &'a [String],
    row: rows::Row,
}

impl Row<'_> {
    /// The row's number in its data set.
    pub fn id(&self) -> i64 {
        self.row.id
    }

    /// The text of a column; `None` where the row has no value, as in a prompt to be completed.
    pub fn get(&self, column: &str) -> Option<&str> {
        let index = self.columns.iter().position(|name| name == column)?;
        self.cell(index)
    }

    /// The text of the column with this index among those [`Template::configure`] gave back.
    pub fn cell(&self, index: usize) -> Option<&str> {
        match self.row.cells.get(index)? {
            rows::Cell::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The row as a conversation; empty unless [`Template::configure`] asked for `messages`.
    pub fn into_messages(self) -> Vec<Message> {
        let messages = self.row.cells.into_iter().find_map(|cell| match cell {
            rows::Cell::Messages(messages) => Some(messages),
            _ => None,
        });
        messages.unwrap_or_default()
    }
}

/// Why a row has no messages.
pub enum RowError {
    /// The template leaves it out on purpose.
    Skip(String),
    /// The row is bad; the config's `on_bad_row` decides.
    Fail(String),
}

impl From<&str> for RowError {
    fn from(reason: &str) -> Self {
        Self::Fail(reason.into())
    }
}

impl From<String> for RowError {
    fn from(reason: String) -> Self {
        Self::Fail(reason)
    }
}

impl Message {
    /// A message whose parts are tokenised each on its own; loss as the config says.
    pub fn new<P: Into<String>>(role: Role, parts: impl IntoIterator<Item = P>) -> Self {
        Self { role, parts: parts.into_iter().map(Into::into).collect(), calls: vec![], train: None }
    }

    /// Sets the scene.
    pub fn system<P: Into<String>>(parts: impl IntoIterator<Item = P>) -> Self {
        Self::new(Role::System, parts)
    }

    /// What is asked.
    pub fn user<P: Into<String>>(parts: impl IntoIterator<Item = P>) -> Self {
        Self::new(Role::User, parts)
    }

    /// What is answered.
    pub fn assistant<P: Into<String>>(parts: impl IntoIterator<Item = P>) -> Self {
        Self::new(Role::Assistant, parts)
    }

    /// What a tool answered.
    pub fn tool<P: Into<String>>(parts: impl IntoIterator<Item = P>) -> Self {
        Self::new(Role::Tool, parts)
    }

    /// Calls a tool after the text: a JSON object, `{"name": "weather", "arguments": {"city": "Ulm"}}`.
    #[must_use]
    pub fn call(mut self, call: impl Into<String>) -> Self {
        self.calls.push(call.into());
        self
    }

    /// The text of all parts.
    pub fn text(&self) -> String {
        self.parts.concat()
    }

    /// Puts a part before the others and one after them; an empty one is left out.
    #[must_use]
    pub fn wrap(mut self, before: &str, after: &str) -> Self {
        if !before.is_empty() {
            self.parts.insert(0, before.into());
        }
        if !after.is_empty() {
            self.parts.push(after.into());
        }
        self
    }

    /// Decides about loss on this message, whatever the config says.
    #[must_use]
    pub fn train(mut self, train: bool) -> Self {
        self.train = Some(train);
        self
    }
}

/// The template of a crate and its columns, once configured.
#[doc(hidden)]
pub struct Rows<T>(RefCell<Option<(T, Vec<String>)>>);

impl<T: Template> Rows<T> {
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(RefCell::new(None))
    }
}

#[doc(hidden)]
pub fn configure<T: Template>(
    rows: &Rows<T>,
    settings: Vec<Setting>,
    columns: Vec<String>,
) -> Result<Vec<String>, Failure> {
    let mut template = T::default();
    let columns = template.configure(&Settings::new(settings), &columns).map_err(into_failure)?;
    *rows.0.borrow_mut() = Some((template, columns.clone()));
    Ok(columns)
}

#[doc(hidden)]
pub fn render<T: Template>(rows: &Rows<T>, batch: Vec<rows::Row>) -> Result<Vec<rows::Outcome>, Failure> {
    let mut configured = rows.0.borrow_mut();
    let (template, columns) =
        configured.as_mut().ok_or_else(|| into_failure(Error::new("`render` was called before `configure`")))?;
    let outcome = |row| match template.outcome(Row { columns, row }) {
        Ok(outcome) => outcome,
        Err(RowError::Skip(reason)) => rows::Outcome::Skip(reason),
        Err(RowError::Fail(reason)) => rows::Outcome::Fail(reason),
    };
    Ok(batch.into_iter().map(outcome).collect())
}

/// Makes a type that implements [`Template`] the template of this crate.
#[macro_export]
macro_rules! template {
    ($template:ty) => {
        struct HostSdkTemplate;

        ::std::thread_local! {
            static HOST_SDK_ROWS: $crate::export::Rows<$template> = const { $crate::export::Rows::new() };
        }

        impl $crate::bindings::template::exports::host::sdk::rows::Guest for HostSdkTemplate {
            fn configure(
                settings: ::std::vec::Vec<$crate::bindings::host::sdk::types::Setting>,
                columns: ::std::vec::Vec<::std::string::String>,
            ) -> ::std::result::Result<
                ::std::vec::Vec<::std::string::String>,
                $crate::bindings::host::sdk::types::Failure,
            > {
                HOST_SDK_ROWS.with(|rows| $crate::export::configure(rows, settings, columns))
            }

            fn render(
                batch: ::std::vec::Vec<$crate::bindings::template::exports::host::sdk::rows::Row>,
            ) -> ::std::result::Result<
                ::std::vec::Vec<$crate::bindings::template::exports::host::sdk::rows::Outcome>,
                $crate::bindings::host::sdk::types::Failure,
            > {
                HOST_SDK_ROWS.with(|rows| $crate::export::render(rows, batch))
            }
        }

        $crate::bindings::template::export_template!(HostSdkTemplate with_types_in $crate::bindings::template);
    };
}
