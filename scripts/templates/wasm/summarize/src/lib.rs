//! `Summarize this dialogue:` before what is asked, `Summary:` after it, as torchtune's `SummarizeTemplate` words it.

use host_sdk::prelude::*;

#[derive(Default)]
struct Summarize;

impl Template for Summarize {
    fn configure(&mut self, _settings: &Settings, _columns: &[String]) -> Result<Vec<String>> {
        Ok(vec!["messages".into()])
    }

    fn render(&mut self, row: Row) -> Result<Vec<Message>, RowError> {
        let wrapped = row.into_messages().into_iter().map(|message| match message.role {
            Role::User => message.wrap("Summarize this dialogue:\n", "\n---\nSummary:\n"),
            _ => message,
        });
        Ok(wrapped.collect())
    }
}

host_sdk::template!(Summarize);

host_sdk::metadata! {r#"
description = "`Summarize this dialogue:` before what is asked, `Summary:` after it, as torchtune's `SummarizeTemplate` words it."
"#}
