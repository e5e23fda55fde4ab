//! A recipe whose loss is one tensor operation; the config key `recipe.operation` says which.

use host_sdk::Value;
use host_sdk::prelude::*;

fn main() -> Result<()> {
    let run = open()?;
    let Value::Text(operation) = run.config("recipe.operation")? else { return Err("no `recipe.operation`".into()) };
    for step in run.steps() {
        let step = step?;
        for batch in step.batches() {
            let batch = batch?;
            let (x, labels) = (run.model().logits(&batch)?, batch.labels()?);
            step.backward(&apply(&operation, &x, &labels)?.sum()?, 100.0)?;
        }
        step.finish()?;
    }
    Ok(())
}

/// `x` is `[L, V]`, `labels` `[L]`.
fn apply(operation: &str, x: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let twice = x.mul_scalar(2.0)?;
    let positive = x.mul(x)?.add_scalar(1.0)?;
    Ok(match operation {
        "shape" => x.mul_scalar(x.shape()[1] as f64)?,
        "add" => x.add(&twice)?,
        "sub" => x.sub(&positive)?,
        "mul" => x.mul(&twice)?,
        "div" => x.div(&positive)?,
        "add_scalar" => x.add_scalar(1.5)?.mul(x)?,
        "mul_scalar" => x.mul_scalar(1.5)?,
        "neg" => x.neg()?,
        "exp" => x.exp()?,
        "log" => positive.log()?,
        "log_sigmoid" => x.log_sigmoid()?,
        "log_softmax" => x.log_softmax(0)?.mul(x)?,
        "logsumexp" => x.logsumexp(0)?,
        "sum" => x.mul(x)?.sum()?,
        "mean" => x.mul(x)?.mean()?,
        "sum_dim" => x.sum_dim(0)?.log_sigmoid()?,
        "gather" => x.gather(1, &labels.unsqueeze(1)?)?,
        "unsqueeze" => x.unsqueeze(1)?.mul(x)?,
        "squeeze" => x.unsqueeze(0)?.squeeze(0)?.logsumexp(1)?,
        "matmul" => x.matmul(&x.unsqueeze(-1)?)?,
        "to_float" => labels.to_float()?.unsqueeze(1)?.mul(x)?,
        "detach" => x.detach()?.mul(x)?,
        "item" => x.mul_scalar(x.mul(x)?.mean()?.item()?)?,
        other => return Err(format!("no operation `{other}`").into()),
    })
}

host_sdk::recipe!(main);
