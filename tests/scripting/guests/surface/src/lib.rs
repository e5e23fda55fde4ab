//! Every function of a run, called once a batch at least, in sums that the numbers show.

use host_sdk::prelude::*;
use host_sdk::{full, log};

fn main() -> Result<()> {
    let run = open()?;
    log(&format!("teaches {:?}", run.config("teacher_model")?));
    let (model, reference, teacher) = (run.model(), run.reference()?, run.teacher()?);
    for step in run.steps() {
        let step = step?;
        let mut total = full(&[], 0.0)?;
        for batch in step.batches() {
            let batch = batch?;
            let (labels, size) = (batch.num_labels(), batch.num_labels() / 2);
            let both = model.logits_part(&batch, 0, size)?.cat(&model.logits_part(&batch, size, labels - size)?, 0)?;
            let student = both.log_softmax(-1)?.gather(1, &batch.labels()?.unsqueeze(1)?)?.squeeze(1)?;
            let others = (&reference.log_probs(&batch)? + &teacher.logits(&batch)?.logsumexp(-1)?)?;
            let samples = (&student - &others)?.segment_sum(&batch.segments()?, batch.num_samples())?;
            let loss = model.loss(&batch)?;
            let squares = (&samples.pow_scalar(2.0)?.sum()? * 0.001)?;
            let sum = (&(&squares + &loss.sum)? - &model.log_probs(&batch)?.sum()?)?;
            step.backward(&sum, loss.weight + batch.num_pairs()? as f64 + batch.num_tokens() as f64)?;
            step.record_metric("samples/of", &samples.sum()?, batch.num_samples() as f64)?;
            total = (&total + &sum.detach()?)?;
        }
        for (name, over) in [("local", Over::Local), ("sum", Over::Sum), ("mean", Over::Mean), ("max", Over::Max)] {
            let read = total.item(over)? + total.unsqueeze(0)?.numbers(over)?[0];
            step.record_metric(&format!("total/{name}"), &full(&[], read)?, 1.0)?;
        }
        step.finish()?;
    }
    Ok(())
}

host_sdk::recipe!(main);
