//! GGUF, llama.cpp's model file, as a source of Hugging Face folders: header, tensors, vocabulary.
//!
//! Owns the format and nothing of what is written from it (that is [`crate::import`]). The file is read with positioned
//! reads, a bounded piece at a time, not memory-mapped: a map is `unsafe`, and each byte is needed once only. Every
//! count, length and offset is a stranger's word, so it is held against the size of the file before anything is
//! allocated or read.

mod dequant;
mod header;
mod llama;
mod tokenizer;

pub use dequant::{TensorType, dequantise};
pub use header::{Gguf, TensorInfo, Value};
pub use llama::{LlamaShape, TensorTarget};
pub use tokenizer::Vocabulary;

#[cfg(test)]
pub mod fixture;
