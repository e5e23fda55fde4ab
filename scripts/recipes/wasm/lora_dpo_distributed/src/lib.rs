//! Direct preference optimisation (DPO), on any number of ranks: of two answers the better is to become more likely than the
//! worse, compared with the reference, which is the model without its adapters or that of `ref_checkpointer`.

use host_sdk::Value;
use host_sdk::prelude::*;

/// The summed loss of pairs. `chosen` and `rejected` are logarithms of how much more likely an answer is than to the reference.
fn preference_loss(kind: &str, chosen: &Tensor, rejected: &Tensor, beta: f64, smoothing: f64) -> Result<Tensor> {
    let gap = (chosen - rejected)?;
    let margin = (&gap * beta)?;
    Ok(match kind {
        "sigmoid" => {
            let right = (&margin.log_sigmoid()? * (1.0 - smoothing))?;
            let wrong = (&margin.neg()?.log_sigmoid()? * smoothing)?;
            (&right + &wrong)?.neg()?.sum()?
        }
        "hinge" => margin.rsub_scalar(1.0)?.relu()?.sum()?,
        "ipo" => (&gap - 0.5 / beta)?.pow_scalar(2.0)?.sum()?,
        // Each answer against the mean of the other kind in its micro-batch.
        "kto_pair" => {
            let at_least_0 = |x: Tensor| x.clamp(0.0, 1e30);
            let likelier_chosen = (&(chosen - &at_least_0(rejected.mean()?)?)? * beta)?.sigmoid()?;
            let likelier_rejected = (&(&at_least_0(chosen.mean()?)? - rejected)? * beta)?.sigmoid()?;
            let losses = (&likelier_chosen.rsub_scalar(2.0)? - &likelier_rejected)?;
            (&losses.sum()? / 2.0)?
        }
        other => return Err(format!("no preference loss `{other}`").into()),
    })
}

/// Log-probability of every answer: chosen and rejected in turn, a row for each pair.
fn answers(model: &Model, batch: &Batch) -> Result<Tensor> {
    Ok(model.log_probs(batch)?.segment_sum(&batch.segments()?, batch.num_samples())?.reshape(&[-1, 2])?)
}

fn main() -> Result<()> {
    let run = open()?;
    let (model, reference) = (run.model(), run.reference()?);
    let (beta, smoothing) = (run.number("loss.beta")?, run.number("loss.label_smoothing")?);
    let Value::Text(kind) = run.config("loss.loss_type")? else { return Err("`loss.loss_type` must be a text".into()) };

    for step in run.steps() {
        let step = step?;
        for batch in step.batches() {
            let batch = batch?;
            let pairs = batch.num_pairs()? as f64;
            let policy = answers(&model, &batch)?;
            let gained = (&policy - &answers(&reference, &batch)?)?;
            let (chosen, rejected) = (gained.select(1, 0)?, gained.select(1, 1)?);
            step.backward(&preference_loss(&kind, &chosen, &rejected, beta, smoothing)?, pairs)?;

            let margins = (&(&chosen - &rejected)? * beta)?;
            for (name, values) in [
                ("rewards/chosen", (&chosen * beta)?),
                ("rewards/rejected", (&rejected * beta)?),
                ("rewards/accuracies", margins.gt_scalar(0.0)?.to_float()?),
                ("rewards/margins", margins),
                ("log_probs/chosen", policy.select(1, 0)?),
                ("log_probs/rejected", policy.select(1, 1)?),
            ] {
                step.record_metric(name, &values.sum()?, pairs)?;
            }
        }
        step.finish()?;
    }
    Ok(())
}

host_sdk::metadata! {r#"
description = "Direct preference optimisation (DPO), on any number of ranks: the better of two answers becomes more likely"
"#}

host_sdk::recipe!(main);
