//! A recipe that does what it must not; the config key `recipe.hostile` says what.

use std::collections::HashMap;
use std::hint::black_box;

use host_sdk::prelude::*;
use host_sdk::{Value, log};

fn main() -> Result<()> {
    let run = open()?;
    let Value::Text(what) = run.config("recipe.hostile")? else { return Err("no `recipe.hostile`".into()) };
    let model = run.model();
    let step = run.next_step()?.ok_or("no step")?;
    let batch = step.next_batch()?.ok_or("no batch")?;
    match what.as_str() {
        "loops" => loop {
            black_box(batch.num_labels());
        },
        "asks_for_memory" => {
            let mut held = vec![];
            for _ in 0..100 {
                held.push(black_box(vec![1u8; 1 << 30]));
            }
        }
        "panics" => {
            let none: HashMap<i32, i32> = HashMap::new();
            panic!("the map has {} entries\u{1b}[31m", none.len());
        }
        "traps" => std::process::abort(),
        "recurses" => {
            black_box(deeper(black_box(1)));
        }
        "hoards_handles" => {
            let logits = model.logits(&batch)?;
            let mut held = vec![];
            for _ in 0..1_000_000 {
                held.push(logits.detach()?);
            }
        }
        "hoards_models" => {
            let mut held = vec![];
            for _ in 0..1_000_000 {
                held.push(run.model());
            }
        }
        "broadcasts" => {
            // [n] + [n, 1] is [n, n]; a few times, and one more of them is terabytes.
            let mut row = model.logits(&batch)?.sum_dim(0)?;
            for _ in 0..4 {
                row = (&row + &row.unsqueeze(-1)?)?;
            }
            let mut column = row.unsqueeze(-1)?;
            for _ in 0..4 {
                column = column.unsqueeze(-1)?;
            }
            black_box((&row + &column)?);
        }
        "keeps_a_tensor" => {
            let loss = model.loss(&batch)?;
            step.backward(&loss.sum, loss.weight)?;
            while step.next_batch()?.is_some() {}
            step.finish()?;
            log(&format!("{:?}", loss.sum.shape()));
            loss.sum.item(Over::Local)?;
        }
        "bad_weight" => {
            let loss = model.loss(&batch)?;
            step.backward(&loss.sum, f64::NAN)?;
        }
        "no_gradient" => {
            let loss = model.loss(&batch)?;
            step.backward(&loss.sum.detach()?, loss.weight)?;
        }
        "no_sum" => step.backward(&model.logits(&batch)?, 1.0)?,
        "wrong_shapes" => {
            let logits = model.logits(&batch)?;
            logits.matmul(&logits)?;
        }
        "finishes_early" => step.finish()?,
        "leaves_early" => {}
        "steps_twice" => {
            run.next_step()?;
        }
        "opens_twice" => {
            open()?;
        }
        "floods" => {
            for line in 0..20_000 {
                log(&format!("line {line}"));
            }
        }
        "calls" => {
            for _ in 0..count(&run)? {
                black_box(batch.num_labels());
            }
        }
        "operates" => {
            let labels = batch.labels()?;
            for _ in 0..count(&run)? {
                black_box(labels.detach()?);
            }
        }
        "asks" => {
            let Value::Text(key) = run.config("recipe.key")? else { return Err("no `recipe.key`".into()) };
            for _ in 0..count(&run)? {
                black_box(run.config(&key)?);
            }
        }
        "tells" => {
            for index in 0..count(&run)? {
                let told = match run.config(&format!("recipe.v{index}"))? {
                    Value::None => "none".into(),
                    Value::Flag(flag) => format!("flag {flag}"),
                    Value::Int(int) => format!("int {int}"),
                    Value::Num(num) => format!("num {num:?}"),
                    Value::Text(text) => format!("text {text}"),
                };
                // There is no such key: it is how the test hears of it.
                let _ = run.config(&told);
            }
        }
        "names_a_metric" => {
            let Value::Text(name) = run.config("recipe.name")? else { return Err("no `recipe.name`".into()) };
            step.record_metric(&name, &model.logits(&batch)?.sum()?, 1.0)?;
        }
        "gives_up" => {
            let Value::Text(why) = run.config("recipe.name")? else { return Err("no `recipe.name`".into()) };
            return Err(why.into());
        }
        other => return Err(Error::new(format!("unknown `recipe.hostile: {other}`"))),
    }
    Ok(())
}

fn count(run: &Run) -> Result<i64> {
    match run.config("recipe.count")? {
        Value::Int(count) => Ok(count),
        _ => Err("`recipe.count` is no integer".into()),
    }
}

fn deeper(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    if depth == 0 { 0 } else { deeper(depth + 1) + frame[(depth % 64) as usize] }
}

host_sdk::recipe!(main);
