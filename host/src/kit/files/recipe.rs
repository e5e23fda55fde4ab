//! LoRA fine-tuning with cross-entropy, and a little of the squared normaliser, which keeps scores small ("z-loss").

use host_sdk::{Value, prelude::*};

fn main() -> Result<()> {
    let run = open()?; // model, adapter, data, optimizer, schedule as the config says
    let Value::Num(z_loss) = run.config("z_loss")? else { return Err(Error::new("`z_loss` is no number")) };
    // Epochs, accumulation, resume and limits are inside.
    for step in run.steps() {
        let step = step?;
        for batch in step.batches() {
            let batch = batch?;
            let logits = run.model().logits(&batch)?;
            let of_label = logits.gather(-1, &batch.labels()?.unsqueeze(-1)?)?.squeeze(-1)?;
            let log_z = logits.logsumexp(-1)?;
            let cross_entropy = (&log_z - &of_label)?.sum()?;
            let penalty = (&(&log_z * &log_z)?.sum()? * z_loss)?;
            step.backward(&(&cross_entropy + &penalty)?, batch.num_labels() as f64)?;
        }
        step.finish()?; // reduce, clip, optimizer, schedule, log, checkpoint
    }
    Ok(())
}

host_sdk::recipe!(main);

host_sdk::metadata! {r#"
description = "LoRA fine-tuning with cross-entropy and a little of the squared normaliser (z-loss)."
version = "0.1.0"

[keys.z_loss]
type = "num"
default = 0.0001
min = 0.0
doc = "how much the squared normaliser counts; 0 is cross-entropy alone"
"#}
