//! A dialogue and its summary, as torchtune's `SummarizeTemplate` words it.

use host_sdk::prelude::*;

#[derive(Default)]
struct Summarize {
    input: usize,
    /// A prompt to be completed has none.
    output: Option<usize>,
}

impl Template for Summarize {
    fn configure(&mut self, columns: &[String]) -> Result<()> {
        let index = |name: &str| columns.iter().position(|column| column == name);
        self.input = index("input").ok_or_else(|| {
            Error::new(format!("no column `input` among {}", columns.join(", "))).hint("name it in `column_map`")
        })?;
        self.output = index("output");
        Ok(())
    }

    fn render(&mut self, row: Row) -> Result<Vec<Message>, RowError> {
        let input = row.cell(self.input).ok_or("the row has no `input`")?;
        let mut messages = vec![Message::user(["Summarize this dialogue:\n", input, "\n---\nSummary:\n"])];
        if let Some(output) = self.output.and_then(|output| row.cell(output)) {
            messages.push(Message::assistant([output]));
        }
        Ok(messages)
    }
}

host_sdk::template!(Summarize);
