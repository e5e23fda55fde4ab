//! Asks for an answer in one line.

use host_sdk::prelude::*;

#[derive(Default)]
struct Guest;

impl Template for Guest {
    // The columns that `render` reads; `messages` would be the row as a conversation.
    fn configure(&mut self, _settings: &Settings, _columns: &[String]) -> Result<Vec<String>> {
        Ok(vec!["input".into(), "output".into()])
    }

    fn render(&mut self, row: Row) -> Result<Vec<Message>, RowError> {
        let input = row.get("input").ok_or("the row has no `input`")?;
        let mut messages = vec![Message::user([format!("Answer in one line: {input}")])];
        // A prompt has no answer yet.
        messages.extend(row.get("output").map(|output| Message::assistant([output])));
        Ok(messages)
    }
}

host_sdk::template!(Guest);

host_sdk::metadata! {r#"
description = "Asks for an answer in one line."
version = "0.1.0"
"#}
