//! What the data path asks of a template. Scripts implement it; the data path does not know them.
//!
//! A template gets a row as the columns of the config, as a conversation (the column [`MESSAGES`]), or both, and gives back
//! messages. One that takes the conversation alone can follow another.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    System,
    User,
    Assistant,
    /// What a tool answered, to a call of the assistant's message before it.
    Tool,
}

impl Role {
    pub const ALL: [Self; 4] = [Self::System, Self::User, Self::Assistant, Self::Tool];

    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// The column that is a row as a conversation.
pub const MESSAGES: &str = "messages";

/// One turn. Each part is tokenised on its own (parity §5.3: pieces are encoded apart).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: Role,
    pub parts: Vec<String>,
    /// The tools that the assistant calls after its text, each a JSON object of `name` and `arguments`.
    pub calls: Vec<String>,
    /// Whether the template wants loss on this message; `None` leaves it to `train_on_input`.
    pub train: Option<bool>,
}

impl Message {
    /// A message of one part.
    pub fn of(role: Role, text: impl Into<String>) -> Self {
        Self { role, parts: vec![text.into()], calls: vec![], train: None }
    }
}

/// One value of a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cell {
    /// The row has none: a prompt to be completed has no answer.
    None,
    Text(String),
    Messages(Vec<Message>),
}

/// A row: a cell for each column that the template asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    pub id: u64,
    pub cells: Vec<Cell>,
}

/// What became of one row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Keep(Vec<Message>),
    /// Of a preference data set's row: the better and the worse conversation.
    Pair([Vec<Message>; 2]),
    /// The template leaves the row out on purpose.
    Skip(String),
    /// The row is bad: `on_bad_row` decides.
    Fail(String),
}

/// Turns rows into messages, in batches. One value per data worker thread.
pub trait RowTemplate {
    /// Says which columns there are; returns those that the cells of later rows should be, in that order.
    fn configure(&mut self, columns: &[String]) -> Result<Vec<String>>;
    /// One outcome per row, in order. An error is the template's own failure, not a bad row.
    fn render(&mut self, rows: Vec<Row>) -> Result<Vec<Outcome>>;
    /// Forgets whatever it knows of earlier rows, as if it had just been opened.
    fn renew(&mut self) -> Result<()>;
}

/// Opens a template once per worker thread.
pub trait OpenTemplate: Sync {
    fn open(&self) -> Result<Box<dyn RowTemplate>>;
    /// Decides the token cache's key: the template's bytes and its settings.
    fn digest(&self) -> String;
    /// For messages: the file it is.
    fn name(&self) -> String;
}

pub type SharedTemplate = Arc<dyn OpenTemplate + Send + Sync>;

/// The templates of a data set, in the order they work.
#[derive(Clone, Default)]
pub struct Templates {
    /// The data set's own.
    pub own: Option<SharedTemplate>,
    /// The tokenizer section's `prompt_template`.
    pub prompt: Option<SharedTemplate>,
}

impl Templates {
    pub fn digest(&self) -> String {
        let digest = |template: &Option<SharedTemplate>| template.as_ref().map(|template| template.digest());
        format!("{:?} {:?}", digest(&self.own), digest(&self.prompt))
    }
}
