//! A template that does what it must not; the row says what.

use host_sdk::prelude::*;

#[derive(Default)]
struct Odd {
    before: String,
    /// Rows so far, which no template should count.
    seen: u64,
}

impl Template for Odd {
    fn configure(&mut self, settings: &Settings, columns: &[String]) -> Result<Vec<String>> {
        self.before = settings.text("before", "")?.to_owned();
        if columns.iter().any(|column| column == "refused") {
            return Err(Error::new("column `refused` is refused").hint("rename it"));
        }
        Ok(vec!["input".into()])
    }

    fn render(&mut self, row: Row) -> Result<Vec<Message>, RowError> {
        self.seen += 1;
        match row.get("input").unwrap_or("none") {
            "loops" => loop {
                std::hint::black_box(row.id());
            },
            "panics" => panic!("row {} is odd", row.id()),
            "skips" => Err(RowError::Skip("odd".into())),
            "fails" => Err("bad\nrow".into()),
            "trains" => Ok(vec![Message::system(["s"]).train(true), Message::user(["u", "v"]).train(false)]),
            "hoards" => {
                let mut held = vec![];
                loop {
                    held.push(std::hint::black_box(vec![1u8; 1 << 20]));
                }
            }
            "calls" => {
                let call = r#"{"name": "f", "arguments": {"x": 1}}"#;
                Ok(vec![Message::user(["u"]), Message::assistant(["a"]).call(call).call(call)])
            }
            "counts" => Ok(vec![Message::user([format!("row {}", self.seen)]), Message::assistant(["a"])]),
            text => Ok(vec![Message::user([text]).wrap(&self.before, "")]),
        }
    }

    fn outcome(&mut self, row: Row) -> Result<Outcome, RowError> {
        if row.get("input") != Some("pairs") {
            return self.render(row).map(Outcome::Keep);
        }
        let [chosen, rejected] =
            ["better", "worse"].map(|answer| vec![Message::user(["u"]), Message::assistant([answer])]);
        Ok(Outcome::Pair(Preference { chosen, rejected }))
    }
}

host_sdk::template!(Odd);
