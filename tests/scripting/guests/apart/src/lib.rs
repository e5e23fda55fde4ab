//! A recipe that does something else on one rank, the one whose labels have the largest sum; `recipe.apart` says what.

use host_sdk::prelude::*;
use host_sdk::{Value, from_numbers};

fn main() -> Result<()> {
    let run = open()?;
    let Value::Text(what) = run.config("recipe.apart")? else { return Err("no `recipe.apart`".into()) };
    let model = run.model();
    let mut was_largest = false;
    for step in run.steps() {
        let step = step?;
        let mut sums: Vec<Tensor> = vec![];
        for batch in step.batches() {
            let batch = batch?;
            if what == "computes" && was_largest {
                model.logits(&batch)?;
            }
            let loss = model.loss(&batch)?;
            step.backward(&loss.sum, loss.weight)?;
            sums.push(batch.labels()?.to_float()?.sum()?);
        }
        let first = sums.pop().ok_or("no batch")?;
        let sum = sums.iter().try_fold(first, |sum, more| &sum + more)?;
        was_largest = sum.item(Over::Max)? == sum.item(Over::Local)?;
        match what.as_str() {
            "leaves" if was_largest => return Ok(()),
            "reads" if was_largest => drop(sum.item(Over::Sum)?),
            "reads_more" => {
                let mine: &[f64] = if was_largest { &[1.0, 2.0] } else { &[1.0] };
                from_numbers(mine)?.numbers(Over::Mean)?;
            }
            _ => {}
        }
        step.finish()?;
    }
    if what == "reads_at_the_end" && was_largest {
        from_numbers(&[1.0])?.item(Over::Sum)?;
    }
    Ok(())
}

host_sdk::recipe!(main);
