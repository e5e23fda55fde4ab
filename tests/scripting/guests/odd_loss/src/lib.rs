//! A loss that does what it must not; the key `what` says what.

use std::cell::RefCell;
use std::hint::black_box;

use host_sdk::Value;
use host_sdk::prelude::*;

struct Odd {
    what: String,
    kept: RefCell<Vec<Tensor>>,
}

fn forever() {
    let mut turns = 0u64;
    loop {
        turns = black_box(turns + 1);
    }
}

impl Loss for Odd {
    fn configure(settings: &Settings) -> Result<Self> {
        let Some(Value::Text(what)) = settings.get("what") else { return Err("no `what`".into()) };
        match what.as_str() {
            "loops_in_configure" => forever(),
            "traps_in_configure" => panic!("it will not be configured\u{1b}[31m"),
            _ => {}
        }
        Ok(Self { what: what.clone(), kept: RefCell::default() })
    }

    fn compute(&self, logits: &Tensor, labels: &Tensor) -> Result<WeightedLoss> {
        let sum = logits.sum()?;
        let weight = labels.shape()[0] as f64;
        let (sum, weight) = match self.what.as_str() {
            "loops" => {
                forever();
                (sum, weight)
            }
            "weighs_nan" => (sum, f64::NAN),
            "weighs_infinity" => (sum, f64::INFINITY),
            "weighs_less_than_nothing" => (sum, -1.0),
            "gives_a_row" => (logits.sum_dim(0)?, weight),
            "gives_integers" => (labels.sum()?, weight),
            "gives_its_argument" => (logits.detach()?, weight),
            "keeps_a_tensor" => {
                let mut kept = self.kept.borrow_mut();
                kept.push(sum.detach()?);
                // Of an earlier batch, from the second on.
                kept[0].exp()?;
                (sum, weight)
            }
            "hoards" => {
                let mut held = vec![];
                loop {
                    held.push(black_box(vec![1u8; 1 << 20]));
                }
            }
            _ => (sum, weight),
        };
        Ok(WeightedLoss { sum, weight })
    }
}

host_sdk::loss!(Odd);

host_sdk::metadata! {r#"
description = "A loss that does what it must not."

[keys.what]
type = "text"
default = "nothing"
doc = "what"
"#}
