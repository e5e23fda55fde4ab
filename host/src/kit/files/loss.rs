//! Cross-entropy with label smoothing: a share of the target goes to all tokens alike.

use host_sdk::prelude::*;

struct Guest {
    share: f64,
}

impl Loss for Guest {
    fn configure(settings: &Settings) -> Result<Self> {
        Ok(Self { share: settings.number("share", 0.1)? })
    }

    // `logits` are scores [L, vocabulary], `labels` the tokens that should be there [L].
    fn compute(&self, logits: &Tensor, labels: &Tensor) -> Result<WeightedLoss> {
        let log_p = logits.log_softmax(-1)?;
        let of_label = log_p.gather(-1, &labels.unsqueeze(-1)?)?.squeeze(-1)?;
        let of_all = log_p.mean_dim(-1)?;
        // A sum and what it is a sum over: the host divides once, over micro-batches and ranks.
        let sum = (&(&of_label.sum()? * (self.share - 1.0))? - &(&of_all.sum()? * self.share)?)?;
        Ok(WeightedLoss { sum, weight: labels.shape()[0] as f64 })
    }
}

host_sdk::loss!(Guest);

host_sdk::metadata! {r#"
description = "Cross-entropy with label smoothing: a share of the target goes to all tokens alike."
version = "0.1.0"

[keys.share]
type = "num"
default = 0.1
min = 0.0
max = 1.0
doc = "of the target, what goes to all tokens alike; 0 is cross-entropy"
"#}
