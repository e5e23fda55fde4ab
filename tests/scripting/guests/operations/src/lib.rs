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
        "minimum" => x.minimum(&twice)?,
        "maximum" => x.maximum(&twice)?,
        "add_scalar" => x.add_scalar(1.5)?.mul(x)?,
        "mul_scalar" => x.mul_scalar(1.5)?,
        "pow_scalar" => positive.pow_scalar(1.5)?,
        "clamp" => x.clamp(-0.1, 0.2)?,
        "neg" => x.neg()?,
        "abs" => x.abs()?,
        "sign" => x.sign()?.mul(x)?,
        "sqrt" => positive.sqrt()?,
        "reciprocal" => positive.reciprocal()?,
        "exp" => x.exp()?,
        "expm1" => x.expm1()?,
        "log" => positive.log()?,
        "log1p" => positive.log1p()?,
        "relu" => x.relu()?,
        "sigmoid" => x.sigmoid()?,
        "log_sigmoid" => x.log_sigmoid()?,
        "softplus" => x.softplus()?,
        "tanh" => x.tanh()?,
        "softmax" => x.softmax(0)?.mul(x)?,
        "log_softmax" => x.log_softmax(0)?.mul(x)?,
        "logsumexp" => x.logsumexp(0)?,
        "sum" => x.mul(x)?.sum()?,
        "mean" => x.mul(x)?.mean()?,
        "max" => x.max()?,
        "min" => x.min()?,
        "sum_dim" => x.sum_dim(0)?.log_sigmoid()?,
        "mean_dim" => x.mean_dim(0)?.log_sigmoid()?,
        "max_dim" => x.max_dim(1)?,
        "min_dim" => x.min_dim(1)?,
        "argmax" => x.argmax(1)?.to_float()?.unsqueeze(1)?.mul(x)?,
        "cumsum" => x.cumsum(0)?.mul(x)?,
        "matmul" => x.matmul(&x.unsqueeze(-1)?)?,
        "gather" => x.gather(1, &labels.unsqueeze(1)?)?,
        "index_select" => x.index_select(1, labels)?,
        "select" => x.select(1, -2)?,
        "narrow" => x.narrow(1, -3, 2)?,
        "cat" => x.cat(&positive, 1)?,
        "unsqueeze" => x.unsqueeze(1)?.mul(x)?,
        "squeeze" => x.unsqueeze(0)?.squeeze(0)?.logsumexp(1)?,
        "reshape" => x.reshape(&[-1, 1])?.mul(&x.flatten()?)?,
        "expand" => x.unsqueeze(0)?.expand(&[2, x.shape()[0], x.shape()[1]])?,
        "transpose" => x.transpose(0, 1)?.logsumexp(0)?,
        "flatten" => x.flatten()?.logsumexp(0)?,
        "eq" => x.eq(&x.relu()?)?.to_float()?.mul(x)?,
        "ne" => x.ne(&x.relu()?)?.to_float()?.mul(x)?,
        "lt" => x.lt(&twice)?.to_float()?.mul(x)?,
        "le" => x.le(&twice)?.to_float()?.mul(x)?,
        "gt" => x.gt(&twice)?.to_float()?.mul(x)?,
        "ge" => x.ge(&twice)?.to_float()?.mul(x)?,
        "eq_scalar" => x.sign()?.eq_scalar(1.0)?.to_float()?.mul(x)?,
        "lt_scalar" => x.lt_scalar(0.1)?.to_float()?.mul(x)?,
        "gt_scalar" => x.gt_scalar(0.1)?.to_float()?.mul(x)?,
        "logical_and" => x.gt_scalar(0.0)?.logical_and(&x.lt_scalar(0.2)?)?.to_float()?.mul(x)?,
        "logical_or" => x.lt_scalar(0.0)?.logical_or(&x.gt_scalar(0.2)?)?.to_float()?.mul(x)?,
        "logical_not" => x.gt_scalar(0.0)?.logical_not()?.to_float()?.mul(x)?,
        "choose" => x.gt_scalar(0.0)?.choose(x, &positive)?,
        "masked_fill" => x.masked_fill(&x.gt_scalar(0.1)?, 0.5)?,
        "to_float" => labels.to_float()?.unsqueeze(1)?.mul(x)?,
        "to_int" => x.mul_scalar(10.0)?.to_int()?.to_float()?.mul(x)?,
        "to_bool" => labels.to_bool()?.to_float()?.unsqueeze(1)?.mul(x)?,
        "detach" => x.detach()?.mul(x)?,
        "item" => x.mul_scalar(x.mul(x)?.mean()?.item()?)?,
        "numbers" => x.mul_scalar(x.numbers()?[1])?,
        "full" => host_sdk::full(&[x.shape()[0], 1], 0.5)?.mul(x)?,
        "arange" => host_sdk::arange(x.shape()[1])?.to_float()?.mul(x)?,
        "from_numbers" => host_sdk::from_numbers(&[0.5, 1.0])?.sum()?.mul(x)?,
        other => return Err(format!("no operation `{other}`").into()),
    })
}

host_sdk::recipe!(main);
