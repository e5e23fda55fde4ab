//! libtorch's errors as ours. What a guest or a file can cause is caught by the fallible calls and gets the sentence of
//! what was being done; maths on shapes proven beforehand uses the panicking calls and reads like maths.

use std::fmt::Display;

use host::{Error, Result};
use tch::Kind;

use host::config::plan::Dtype;

/// Gives an error of libtorch the thing that was being done.
pub trait TorchContext<T> {
    /// `doing` completes the sentence "cannot …".
    fn torch(self, doing: impl Display) -> Result<T>;
}

impl<T, E: Display> TorchContext<T> for std::result::Result<T, E> {
    fn torch(self, doing: impl Display) -> Result<T> {
        self.map_err(|error| {
            let text = error.to_string();
            // The C++ stack that follows the first line is of no use to the person who reads this.
            let first = text.lines().next().unwrap_or_default().to_owned();
            let out_of_memory = text.contains("out of memory") || text.contains("can't allocate memory");
            let error = Error::run(format!("cannot {doing}")).cause(first);
            if out_of_memory {
                error.hint("lower `tokens_per_microbatch` or `tokenizer.max_seq_len`; samples per step stay the same")
            } else {
                error
            }
        })
    }
}

/// The libtorch name of a plan's dtype.
pub fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::Fp32 => Kind::Float,
    }
}
