//! Fine-tuning, on any number of ranks: cross-entropy on the labels of each batch. Adapters are trained, or all weights of a
//! model without them.

use host_sdk::prelude::*;

fn main() -> Result<()> {
    let run = open()?; // model, data, optimizer, schedule as the config says
    let model = run.model();
    // Epochs, accumulation, resume and limits are inside.
    for step in run.steps() {
        let step = step?;
        for batch in step.batches() {
            let loss = model.loss(&batch?)?; // sum and weight; or any tensor expression
            step.backward(&loss.sum, loss.weight)?;
        }
        step.finish()?; // reduce, clip, optimizer, schedule, log, checkpoint
    }
    Ok(())
}

host_sdk::recipe!(main);

host_sdk::metadata! {r#"
description = "Fine-tuning, on any number of ranks: cross-entropy on the labels of each batch. Adapters are trained, or all weights of a model without them."
"#}
