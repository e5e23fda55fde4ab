//! A recipe whose loss is one tensor operation, which the config key `recipe.operation` names, or several, which
//! `recipe.program` lists.

use host_sdk::Value;
use host_sdk::prelude::*;

fn main() -> Result<()> {
    let run = open()?;
    let setting = |key: &str| match run.config(key) {
        Ok(Value::Text(text)) => Some(text),
        _ => None,
    };
    let (operation, program) = (setting("recipe.operation"), setting("recipe.program"));
    for step in run.steps() {
        let step = step?;
        for batch in step.batches() {
            let batch = batch?;
            let (x, labels) = (run.model().logits(&batch)?, batch.labels()?);
            let result = match (&operation, &program) {
                (Some(operation), _) => apply(operation, &x, &labels)?,
                (None, Some(program)) => follow(program, x, labels)?,
                (None, None) => return Err("no `recipe.operation`, and no `recipe.program`".into()),
            };
            step.backward(&result.sum()?, 100.0)?;
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
        "sub_scalar" => x.sub_scalar(1.5)?.mul(x)?,
        "rsub_scalar" => x.rsub_scalar(2.0)?.mul(&x.mul_scalar(1.5)?)?,
        "div_scalar" => (x / 4.0)?,
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
        "segment_sum" => x.segment_sum(labels, 11)?.logsumexp(0)?,
        "set_grad_enabled" => host_sdk::no_grad(|| x.mul(x))?.mul(x)?,
        "cumsum" => x.cumsum(0)?.mul(x)?,
        "matmul" => x.matmul(&x.unsqueeze(-1)?)?,
        "gather" => x.gather(1, &labels.unsqueeze(1)?)?,
        "index_select" => x.index_select(1, &labels.add_scalar(1.0)?.sub_scalar(1.0)?)?,
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
        "item" => x.mul_scalar(x.mul(x)?.mean()?.item(Over::Local)?)?,
        "numbers" => x.mul_scalar(x.numbers(Over::Local)?[1])?,
        "full" => host_sdk::full(&[x.shape()[0], 1], 0.5)?.mul(x)?,
        "arange" => host_sdk::arange(x.shape()[1])?.to_float()?.mul(x)?,
        "from_numbers" => host_sdk::from_numbers(&[0.5, 1.0])?.sum()?.mul(x)?,
        other => return Err(format!("no operation `{other}`").into()),
    })
}

/// `name argument argument; name …`: arguments are `t` and the number of a tensor, `i` and an integer, `f` and a float, `l`
/// and integers. Tensors 0 to 2 are `x`, `labels` and `x·x + 1`, the others results in order. The last one's floats, with
/// `x·0`, so that there is a gradient.
fn follow(program: &str, x: Tensor, labels: Tensor) -> Result<Tensor> {
    let positive = x.mul(&x)?.add_scalar(1.0)?;
    let mut tensors = vec![x, labels, positive];
    for line in program.split("; ") {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default();
        let arguments: Vec<&str> = words.collect();
        let result = perform(name, &arguments, &tensors)?;
        tensors.push(result);
    }
    let last = tensors[tensors.len() - 1].to_float()?.sum()?;
    Ok(last.add(&tensors[0].mul_scalar(0.0)?.sum()?)?)
}

fn perform(name: &str, arguments: &[&str], tensors: &[Tensor]) -> Result<Tensor> {
    let rest = |index: usize| &arguments[index][1..];
    let t = |index: usize| &tensors[rest(index).parse::<usize>().unwrap()];
    let i = |index: usize| rest(index).parse::<i64>().unwrap();
    let f = |index: usize| rest(index).parse::<f64>().unwrap();
    let l = |index: usize| rest(index).split(',').map(|size| size.parse().unwrap()).collect::<Vec<i64>>();
    Ok(match name {
        "add" => t(0).add(t(1)),
        "sub" => t(0).sub(t(1)),
        "mul" => t(0).mul(t(1)),
        "div" => t(0).div(t(1)),
        "minimum" => t(0).minimum(t(1)),
        "maximum" => t(0).maximum(t(1)),
        "eq" => t(0).eq(t(1)),
        "ne" => t(0).ne(t(1)),
        "lt" => t(0).lt(t(1)),
        "le" => t(0).le(t(1)),
        "gt" => t(0).gt(t(1)),
        "ge" => t(0).ge(t(1)),
        "logical_and" => t(0).logical_and(t(1)),
        "logical_or" => t(0).logical_or(t(1)),
        "matmul" => t(0).matmul(t(1)),
        "add_scalar" => t(0).add_scalar(f(1)),
        "mul_scalar" => t(0).mul_scalar(f(1)),
        "sub_scalar" => t(0).sub_scalar(f(1)),
        "rsub_scalar" => t(0).rsub_scalar(f(1)),
        "div_scalar" => t(0).div_scalar(f(1)),
        "pow_scalar" => t(0).pow_scalar(f(1)),
        "eq_scalar" => t(0).eq_scalar(f(1)),
        "lt_scalar" => t(0).lt_scalar(f(1)),
        "gt_scalar" => t(0).gt_scalar(f(1)),
        "clamp" => t(0).clamp(f(1), f(2)),
        "neg" => t(0).neg(),
        "abs" => t(0).abs(),
        "sign" => t(0).sign(),
        "sqrt" => t(0).sqrt(),
        "reciprocal" => t(0).reciprocal(),
        "exp" => t(0).exp(),
        "expm1" => t(0).expm1(),
        "log" => t(0).log(),
        "log1p" => t(0).log1p(),
        "relu" => t(0).relu(),
        "sigmoid" => t(0).sigmoid(),
        "log_sigmoid" => t(0).log_sigmoid(),
        "softplus" => t(0).softplus(),
        "tanh" => t(0).tanh(),
        "logical_not" => t(0).logical_not(),
        "to_float" => t(0).to_float(),
        "to_int" => t(0).to_int(),
        "to_bool" => t(0).to_bool(),
        "detach" => t(0).detach(),
        "flatten" => t(0).flatten(),
        "sum" => t(0).sum(),
        "mean" => t(0).mean(),
        "max" => t(0).max(),
        "min" => t(0).min(),
        "softmax" => t(0).softmax(i(1)),
        "log_softmax" => t(0).log_softmax(i(1)),
        "logsumexp" => t(0).logsumexp(i(1)),
        "sum_dim" => t(0).sum_dim(i(1)),
        "mean_dim" => t(0).mean_dim(i(1)),
        "max_dim" => t(0).max_dim(i(1)),
        "min_dim" => t(0).min_dim(i(1)),
        "argmax" => t(0).argmax(i(1)),
        "cumsum" => t(0).cumsum(i(1)),
        "unsqueeze" => t(0).unsqueeze(i(1)),
        "squeeze" => t(0).squeeze(i(1)),
        "segment_sum" => t(0).segment_sum(t(1), i(2)),
        "gather" => t(0).gather(i(1), t(2)),
        "index_select" => t(0).index_select(i(1), t(2)),
        "cat" => t(0).cat(t(1), i(2)),
        "select" => t(0).select(i(1), i(2)),
        "narrow" => t(0).narrow(i(1), i(2), i(3)),
        "transpose" => t(0).transpose(i(1), i(2)),
        "reshape" => t(0).reshape(&l(1)),
        "expand" => t(0).expand(&l(1)),
        "choose" => t(0).choose(t(1), t(2)),
        "masked_fill" => t(0).masked_fill(t(1), f(2)),
        other => return Err(format!("no operation `{other}`").into()),
    }?)
}

host_sdk::recipe!(main);
