//! `examples/own_loss/focal.rhai` in Rust.

use host_sdk::prelude::*;

struct Focal {
    gamma: f64,
}

impl Loss for Focal {
    fn configure(settings: &Settings) -> Result<Self> {
        Ok(Self { gamma: settings.number("gamma", 2.0)? })
    }

    fn compute(&self, logits: &Tensor, labels: &Tensor) -> Result<WeightedLoss> {
        let log_p = logits.log_softmax(-1)?.gather(-1, &labels.unsqueeze(-1)?)?.squeeze(-1)?;
        let unsure = log_p.exp()?.rsub_scalar(1.0)?;
        let sum = unsure.pow_scalar(self.gamma)?.mul(&log_p)?.sum()?.neg()?;
        Ok(WeightedLoss { sum, weight: labels.shape()[0] as f64 })
    }
}

host_sdk::loss!(Focal);

host_sdk::metadata! {r#"
description = "Focal loss: tokens that the model is sure of count less."

[keys.gamma]
type = "num"
default = 2.0
min = 0.0
doc = "how much less; 0 is cross-entropy"
"#}
