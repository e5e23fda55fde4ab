//! What the data path asks of a template. Scripts implement it; the data path does not know them.

use crate::error::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    System,
    User,
    Assistant,
    /// What a tool answered; the assistant's message before it is the call.
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

/// One turn. Each part is tokenised on its own (parity §5.3: pieces are encoded apart).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub role: Role,
    pub parts: Vec<String>,
    /// Whether the template wants loss on this message; `None` leaves it to `train_on_input`.
    pub train: Option<bool>,
}

/// A row under the expected names (`input`, `output`): `cells[i]` belongs to `columns[i]`; `None` is a value the row
/// does not have (a prompt to be completed).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub id: u64,
    pub cells: Vec<Option<String>>,
}

/// What became of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Keep(Vec<Message>),
    /// The template leaves the row out on purpose.
    Skip(String),
    /// The row is bad: `on_bad_row` decides.
    Fail(String),
}

/// Turns rows into messages, in batches. One value per data worker thread.
pub trait RowTemplate {
    /// Says which columns the cells of later rows are, in order.
    fn configure(&mut self, columns: &[String]) -> Result<()>;
    /// One outcome per row, in order. An error is the template's own failure, not a bad row.
    fn render(&mut self, rows: &[Row]) -> Result<Vec<Outcome>>;
}

/// Opens a template once per worker thread.
pub trait OpenTemplate: Sync {
    fn open(&self) -> Result<Box<dyn RowTemplate>>;
    /// Decides the token cache's key: the template's bytes and its settings.
    fn digest(&self) -> String;
}

/// A template whose messages are one text each before they become tokens.
pub struct Joined<T>(pub T);

impl<T: AsRef<dyn OpenTemplate + Send + Sync> + Sync> OpenTemplate for Joined<T> {
    fn open(&self) -> Result<Box<dyn RowTemplate>> {
        Ok(Box::new(JoinedRows(self.0.as_ref().open()?)))
    }

    fn digest(&self) -> String {
        format!("joined {}", self.0.as_ref().digest())
    }
}

struct JoinedRows(Box<dyn RowTemplate>);

impl RowTemplate for JoinedRows {
    fn configure(&mut self, columns: &[String]) -> Result<()> {
        self.0.configure(columns)
    }

    fn render(&mut self, rows: &[Row]) -> Result<Vec<Outcome>> {
        let mut outcomes = self.0.render(rows)?;
        for outcome in &mut outcomes {
            let Outcome::Keep(messages) = outcome else { continue };
            for message in messages {
                message.parts = vec![message.parts.concat()];
            }
        }
        Ok(outcomes)
    }
}

/// No template: the input is the user's message, the output the assistant's.
pub struct PlainTemplate;

impl OpenTemplate for PlainTemplate {
    fn open(&self) -> Result<Box<dyn RowTemplate>> {
        Ok(Box::new(PlainRows { input: 0, output: None }))
    }

    fn digest(&self) -> String {
        "plain".to_owned()
    }
}

struct PlainRows {
    input: usize,
    output: Option<usize>,
}

impl RowTemplate for PlainRows {
    fn configure(&mut self, columns: &[String]) -> Result<()> {
        let find = |name: &str| columns.iter().position(|column| column == name);
        self.input = find("input").ok_or_else(|| {
            crate::Error::config("the data has no column for `input`")
                .hint("map one: `dataset.column_map.input=<column>`")
        })?;
        self.output = find("output");
        Ok(())
    }

    fn render(&mut self, rows: &[Row]) -> Result<Vec<Outcome>> {
        Ok(rows.iter().map(|row| self.messages(row)).collect())
    }
}

impl PlainRows {
    fn messages(&self, row: &Row) -> Outcome {
        let cell = |index: usize| row.cells.get(index).cloned().flatten();
        let message = |role, text| Message { role, parts: vec![text], train: None };
        let Some(input) = cell(self.input) else { return Outcome::Fail("the row has no `input`".to_owned()) };
        let answer = self.output.and_then(cell).map(|text| message(Role::Assistant, text));
        Outcome::Keep(std::iter::once(message(Role::User, input)).chain(answer).collect())
    }
}
