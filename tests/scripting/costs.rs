//! What crossing the boundary costs. Measurements, not checks:
//! `cargo test --release --test scripting -- --ignored --nocapture --test-threads 1 costs`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use host::config::plan::{
    ColumnPlan, DataFile, DataFormat, DatasetPlan, GuestLimits, OnBadRow, PackingPlan, RowsPlan, TokenizerPlan,
};
use host::data::template::{Cell, MESSAGES, Message, Role, Row, RowTemplate, Templates};
use host::tokenizer::Tokenizer;
use host::worker::StopFlag;
use host_rank::script::{Recipe, open_template};
use serde_json::json;

use crate::support::{Linear, guest, run_with};

const CALLS: i64 = 300_000;

/// Time of one run of a guest that makes `count` calls of a kind; the best of three.
fn time(path: &str, what: &str, count: i64) -> Duration {
    let once = || {
        let started = Instant::now();
        let training = Linear::new(json!({ "recipe": { "hostile": what, "count": count } }));
        let error = run_with(path, &GuestLimits::default(), training, StopFlag::default()).unwrap_err();
        assert!(error.to_string().contains("before the run was complete"), "{error}");
        started.elapsed()
    };
    (0..3).map(|_| once()).min().unwrap()
}

fn nanoseconds(path: &str, what: &str) -> f64 {
    let (none, all) = (time(path, what, 0), time(path, what, CALLS));
    all.saturating_sub(none).as_nanos() as f64 / CALLS as f64
}

#[test]
#[ignore = "a measurement"]
fn calls() {
    let dir = tempfile::tempdir().unwrap();
    let script = |name: &str, call: &str| {
        let path = dir.path().join(name);
        let text = format!(
            "let run = host::open(); let step = run.next_step(); let batch = step.next_batch();
             let labels = batch.labels(); let count = run.config(\"recipe.count\");
             for i in 0..count {{ {call}; }}"
        );
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let wasm = "target/guests/hostile.wasm";
    println!("a call without work (num-labels): Wasm {:.0} ns, Rhai {:.0} ns", nanoseconds(wasm, "calls"), {
        nanoseconds(&script("calls.rhai", "batch.num_labels"), "calls")
    });
    println!("a tensor operation (detach): Wasm {:.0} ns, Rhai {:.0} ns", nanoseconds(wasm, "operates"), {
        nanoseconds(&script("operates.rhai", "labels.detach()"), "operates")
    });
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
    for path in ["templates/summarize.wasm", "templates/summarize.rhai"] {
        let template = open_template(&guest(path), &GuestLimits::default()).unwrap().open().unwrap();
        println!("{path}: {:.0} rows/s of {bytes} bytes", rows_per_second(template, &rows));
    }
}

/// The best of five.
fn rows_per_second(mut template: Box<dyn RowTemplate>, rows: &[Row]) -> f64 {
    template.configure(&[MESSAGES.into()]).unwrap();
    let once = |_| {
        let rows = rows.to_vec();
        let started = Instant::now();
        template.render(rows).unwrap();
        started.elapsed()
    };
    rows.len() as f64 / (0..5).map(once).min().unwrap().as_secs_f64()
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
