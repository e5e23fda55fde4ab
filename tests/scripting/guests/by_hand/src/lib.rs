//! `lora_distributed` with the cross-entropy written out.

use host_sdk::prelude::*;

fn main() -> Result<()> {
    let run = open()?;
    for step in run.steps() {
        let step = step?;
        for batch in step.batches() {
            let batch = batch?;
            let logits = run.model().logits(&batch)?;
            let labels = batch.labels()?.unsqueeze(-1)?;
            let picked = logits.gather(-1, &labels)?.squeeze(-1)?;
            let losses = (&logits.logsumexp(-1)? - &picked)?;
            step.backward(&losses.sum()?, batch.num_labels() as f64)?;
        }
        step.finish()?;
    }
    Ok(())
}

host_sdk::recipe!(main);
