//! What a Rust guest of `host` depends on.
//!
//! A guest is a Wasm component built with `cargo build --target wasm32-wasip2`: a `cdylib` crate that ends with one of the
//! macros here.
//!
//! A *recipe* says what the loss of a batch is; the host does everything else.
//!
//! ```ignore
//! use host_sdk::prelude::*;
//!
//! fn main() -> Result<()> {
//!     let run = host_sdk::open()?; // model, adapter, data, optimizer, schedule as the config says
//!     let model = run.model();
//!     for step in run.steps() {
//!         let step = step?;
//!         for batch in step.batches() {
//!             let loss = model.loss(&batch?)?; // sum and weight; or any tensor expression
//!             step.backward(&loss.sum, loss.weight)?;
//!         }
//!         step.finish()?;
//!     }
//!     Ok(())
//! }
//!
//! host_sdk::recipe!(main);
//! ```
//!
//! A *template* turns rows of data into messages: see [`Template`] and [`template!`]. A *loss* takes the place of
//! cross-entropy in any recipe: see [`Loss`] and [`loss!`].
//!
//! What a guest says of itself, the keys that it reads of a config among it, stands in [`metadata!`].
//!
//! A guest has no files, network, clock, environment or random numbers. What it prints goes to the run's log, and the text
//! of a panic into the report of its failure. Every function is described in `sdk/REFERENCE.md`.

#![deny(missing_docs)]

#[doc(hidden)]
pub mod bindings;
mod error;
mod loss;
mod metadata;
mod ops;
mod recipe;
mod settings;
mod template;

pub use bindings::host::sdk::tensors::{Over, Tensor, WeightedLoss, arange, from_numbers, full, set_grad_enabled};
pub use bindings::host::sdk::training::{Batch, Model, Run, Step, open};
pub use bindings::host::sdk::types::{Code, Error as CallError, Value, log};
pub use error::{Error, Result};
pub use loss::Loss;
pub use ops::no_grad;
pub use recipe::{Batches, Steps};
pub use settings::Settings;
pub use template::{Message, Outcome, Preference, Role, Row, RowError, Template};

/// What nearly every guest uses.
pub mod prelude {
    pub use crate::{
        Batch, Error, Loss, Message, Model, Outcome, Over, Preference, Result, Role, Row, RowError, Run, Settings,
        Step, Template, Tensor, WeightedLoss, open,
    };
}

#[doc(hidden)]
pub mod export {
    pub use crate::error::into_failure;
    pub use crate::loss::Scoring;
    pub use crate::template::{Rows, configure, render};
}
