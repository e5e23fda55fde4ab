//! Rows to tokens: sources, splits, templates, tokenisation, order and layout. No tensor.
//!
//! [`prepare`] turns the data sets of the plan into [`Tokenized`] samples; [`Order`] says in which order an epoch visits
//! them; [`microbatches`] lays the samples of one optimizer step out for a rank. [`encode_prompt`] shares its rules with
//! training, so that generation asks as training did.

pub mod batches;
pub mod cache;
pub mod calls;
pub mod encode;
pub mod messages;
pub mod order;
pub mod outlook;
pub mod samples;
pub mod source;
pub mod split;
pub mod template;
pub mod tokenize;

#[cfg(test)]
mod tests;

pub use batches::{BatchLayout, MicroBatch, microbatches};
pub use calls::Call;
pub use encode::{Encoder, encode_prompt, encode_text};
pub use order::Order;
pub use outlook::outlook;
pub use samples::{IGNORE_INDEX, Piece, Report, Sample, SampleRef, Tokenized};
pub use source::Place;
pub use tokenize::{Made, prepare, preview};
