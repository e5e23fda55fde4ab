//! What crossing the boundary costs. Measurements, not checks:
//! `cargo test --release --test scripting -- --ignored --nocapture --test-threads 1 costs`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use host::config::plan::{
    ColumnPlan, DataFile, DataFormat, DatasetPlan, GuestLimits, OnBadRow, PackingPlan, RowsPlan, TokenizerPlan,
};
use host::data::template::{Cell, MESSAGES, Message, Outcome, Role, Row, RowTemplate, Templates};
use host::tokenizer::Tokenizer;
use host::worker::StopFlag;
use host_rank::script::{Recipe, open_template};
use serde_json::json;

use crate::support::{Linear, guest, run_with};

/// The best of five.
fn best(once: impl FnMut(i32) -> Duration) -> Duration {
    (0..5).map(once).min().unwrap()
}

/// Nanoseconds of a call, by runs of a guest that make many and none.
fn call_nanoseconds(path: &str, what: &str, key: &str, calls: i64) -> f64 {
    let time = |count: i64| {
        best(|_| {
            let recipe = json!({
                "hostile": what, "count": count, "key": key, "text": "x".repeat(1 << 10), "long": "x".repeat(64 << 10),
                "short": "x".repeat(32), "k".repeat(32): 1, "k".repeat(1 << 10): 1, "k".repeat(64 << 10): 1,
            });
            let started = Instant::now();
            let training = Linear::new(json!({ "recipe": recipe }));
            let error = run_with(path, &GuestLimits::default(), training, StopFlag::default()).unwrap_err();
            assert!(error.to_string().contains("before the run was complete"), "{error}");
            started.elapsed()
        })
    };
    time(calls).saturating_sub(time(0)).as_nanos() as f64 / calls as f64
}

/// What crossing the boundary costs with nothing, texts, lists and tensors. `cargo xtask bench` reads these lines.
#[test]
#[ignore = "a measurement"]
fn crossings() {
    let dir = tempfile::tempdir().unwrap();
    let script = |name: &str, call: &str| {
        let path = dir.path().join(name);
        let text = format!(
            "let run = host::open(); let step = run.next_step(); let batch = step.next_batch();
             let labels = batch.labels(); let key = run.config(\"recipe.key\");
             for i in 0..run.config(\"recipe.count\") {{ {call}; }}"
        );
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let keys = [32, 1 << 10, 64 << 10].map(|length| format!("recipe.{}", "k".repeat(length)));
    for (told, what, call, key, calls) in [
        ("a call without work", "calls", "batch.num_labels", "", 300_000),
        ("32 B to the guest", "asks", "run.config(key)", "recipe.short", 100_000),
        ("1 KB to the guest", "asks", "run.config(key)", "recipe.text", 100_000),
        ("64 KB to the guest", "asks", "run.config(key)", "recipe.long", 10_000),
        ("32 B to the host", "asks", "run.config(key)", &keys[0], 100_000),
        ("1 KB to the host", "asks", "run.config(key)", &keys[1], 100_000),
        ("64 KB to the host", "asks", "run.config(key)", &keys[2], 10_000),
        ("a tensor operation (detach)", "operates", "labels.detach()", "", 100_000),
    ] {
        let script = script(&format!("{what}.rhai"), call);
        for (front, path) in [("Wasm", "target/guests/hostile.wasm"), ("Rhai", &script)] {
            println!("crossing: {told}, {front}: {:.0} ns", call_nanoseconds(path, what, key, calls));
        }
    }
    for (front, path) in [("Wasm", "templates/summarize.wasm"), ("Rhai", "templates/summarize.rhai")] {
        // What an assistant says stays as it is: it goes in and comes out again.
        let parts = vec!["a text of a list".to_owned(); 1000];
        let messages = vec![Message { parts, ..Message::of(Role::Assistant, "") }];
        let rows = vec![Row { id: 0, cells: vec![Cell::Messages(messages)] }; 200];
        let template = open_template(&guest(path), &GuestLimits::default()).unwrap().open().unwrap();
        println!(
            "crossing: 1,000 texts to a template and back, {front}: {:.0} ns",
            1e9 / rows_per_second(template, &rows)
        );
    }
}

/// Up to 20,000 conversations: `document` and `summary` of a JSONL file, which `cargo xtask bench` names, or made up.
fn template_rows_of(file: Option<std::ffi::OsString>) -> Vec<Row> {
    const ROWS: usize = 20_000;
    let row = |(id, [asked, answered]): (usize, [String; 2])| {
        let messages = vec![Message::of(Role::User, asked), Message::of(Role::Assistant, answered)];
        Row { id: id as u64, cells: vec![Cell::Messages(messages)] }
    };
    let Some(file) = file else {
        let text = "a line of a dialogue, as long as lines are. ".repeat(25);
        let made_up = |id| [format!("{id} {text}"), "a summary of about one line, which is short".into()];
        return (0..ROWS).map(made_up).enumerate().map(row).collect();
    };
    let text = std::fs::read_to_string(file).unwrap();
    let parsed = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let cells = parsed.map(|row| ["document", "summary"].map(|name| row[name].as_str().unwrap().to_owned()));
    cells.take(ROWS).enumerate().map(row).collect()
}

#[test]
#[ignore = "a measurement"]
fn template_rows() {
    let rows = template_rows_of(std::env::var_os("HOST_TEMPLATE_ROWS"));
    let size = |cell: &Cell| match cell {
        Cell::Messages(messages) => messages.iter().flat_map(|message| &message.parts).map(String::len).sum(),
        _ => 0,
    };
    let bytes = rows.iter().flat_map(|row| &row.cells).map(size).sum::<usize>() / rows.len();
    println!("native: {:.0} rows/s of {bytes} bytes", rows_per_second(Box::new(Native), &rows));
    for path in ["templates/summarize.wasm", "templates/summarize.rhai"] {
        let template = open_template(&guest(path), &GuestLimits::default()).unwrap().open().unwrap();
        println!("{path}: {:.0} rows/s of {bytes} bytes", rows_per_second(template, &rows));
    }
}

/// What `templates/summarize` does, in the host: as fast as a template can be.
struct Native;

impl RowTemplate for Native {
    fn configure(&mut self, columns: &[String]) -> host::Result<Vec<String>> {
        Ok(columns.to_vec())
    }

    fn renew(&mut self) -> host::Result<()> {
        Ok(())
    }

    fn render(&mut self, rows: Vec<Row>) -> host::Result<Vec<Outcome>> {
        let wrap = |mut message: Message| {
            if message.role == Role::User {
                message.parts.insert(0, "Summarize this dialogue:\n".into());
                message.parts.push("\n---\nSummary:\n".into());
            }
            message
        };
        let keep = |mut row: Row| match row.cells.pop() {
            Some(Cell::Messages(messages)) => Outcome::Keep(messages.into_iter().map(wrap).collect()),
            _ => Outcome::Fail("the row is no conversation".into()),
        };
        Ok(rows.into_iter().map(keep).collect())
    }
}

fn rows_per_second(mut template: Box<dyn RowTemplate>, rows: &[Row]) -> f64 {
    template.configure(&[MESSAGES.into()]).unwrap();
    // In batches of the data path's size.
    let once = |_| {
        let batch = |rows: &[Row]| {
            let rows = rows.to_vec();
            let started = Instant::now();
            template.render(rows).unwrap();
            started.elapsed()
        };
        rows.chunks(256).map(batch).sum()
    };
    rows.len() as f64 / best(once).as_secs_f64()
}

/// What it costs to look whether a template keeps something between rows: once in as many rows as are rendered here.
#[test]
#[ignore = "a measurement"]
fn probes() {
    const ROWS: usize = 1024;
    let rows: Vec<Row> = template_rows_of(None).into_iter().take(ROWS).collect();
    for path in ["templates/summarize.wasm", "templates/summarize.rhai"] {
        for isolated in [false, true] {
            let mut template = crate::isolate::opened(path, &GuestLimits::default(), isolated).unwrap();
            let mut probe = || {
                let started = Instant::now();
                template.renew().unwrap();
                template.configure(&[MESSAGES.into()]).unwrap();
                template.render(rows[..1].to_vec()).unwrap();
                started.elapsed()
            };
            let probe = (0..20).map(|_| probe()).min().unwrap().as_secs_f64();
            let whole = ROWS as f64 / rows_per_second(template, &rows);
            let [probe, whole] = [probe, whole].map(|seconds| seconds * 1e3);
            println!("{path}, isolated {isolated}: {probe:.3} ms a probe, {whole:.2} ms {ROWS} rows");
        }
    }
}

/// What `isolate: true` costs beside the same template in the worker's own process.
#[test]
#[ignore = "a measurement"]
fn isolation() {
    let rows = template_rows_of(None);
    for path in ["templates/summarize.wasm", "templates/summarize.rhai"] {
        for isolated in [false, true, false, true] {
            let started = Instant::now();
            let template = crate::isolate::opened(path, &GuestLimits::default(), isolated).unwrap();
            let start = started.elapsed().as_secs_f64() * 1e3;
            let speed = rows_per_second(template, &rows);
            println!("{path}, isolated: {isolated}: {speed:.0} rows/s, started in {start:.0} ms");
        }
    }
}

/// From a file of rows to packs, at first and out of the cache: `HOST_DATA_ROWS` and `HOST_DATA_MODEL` say of what.
#[test]
#[ignore = "a measurement"]
fn data_path() {
    let [rows, model] =
        ["HOST_DATA_ROWS", "HOST_DATA_MODEL"].map(|name| PathBuf::from(std::env::var_os(name).unwrap()));
    let cache = tempfile::tempdir().unwrap();
    let column =
        |(name, column): (&str, &str)| ColumnPlan { name: name.into(), column: column.into(), optional: false };
    let plan = DatasetPlan {
        files: vec![DataFile { split: "train".into(), path: rows }],
        format: DataFormat::Jsonl,
        hub: None,
        split: "train".into(),
        rows: RowsPlan::Columns {
            columns: [("input", "document"), ("output", "summary")].map(column).into(),
            template: None,
        },
        new_system_prompt: None,
        train_on_input: false,
        on_bad_row: OnBadRow::Error,
        packing: Some(PackingPlan { max_seq_len: 512, split_across_pack: false }),
        cache_dir: cache.path().into(),
    };
    let tokenizer_plan = TokenizerPlan { max_seq_len: Some(512), ..TokenizerPlan::plain(model.join("tokenizer.json")) };
    for _ in 0..2 {
        let started = Instant::now();
        let tokenizer = Tokenizer::of(&tokenizer_plan).unwrap();
        let prompt = open_template(&guest("templates/summarize.wasm"), &GuestLimits::default()).unwrap();
        let templates = [Templates { own: None, prompt: Some(prompt) }];
        let data = host::data::prepare(std::slice::from_ref(&plan), &tokenizer_plan, &tokenizer, &templates).unwrap();
        println!("packed in {} s: {} packs", started.elapsed().as_secs_f64(), data.len());
    }
}

#[test]
#[ignore = "a measurement"]
fn loading() {
    for path in ["recipes/lora_distributed.wasm", "recipes/lora_distributed.rhai"] {
        for _ in 0..2 {
            let started = Instant::now();
            Recipe::load(&guest(path), &GuestLimits::default()).unwrap();
            println!("load {path}: {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
        }
    }
}
