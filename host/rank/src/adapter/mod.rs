//! The trainable delta: what is trainable, where its numbers live, how it is named on disk, how it folds into a weight.

pub mod lora;
pub mod peft;

pub use lora::{LoraAdapter, LoraPair};
