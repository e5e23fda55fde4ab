//! Hugging Face model folders: `config.json` and the safetensors files beside it. Reads headers only; no tensor data.

pub mod config;
pub mod weights;

pub use config::{ModelConfig, RopeScaling};
pub use weights::{TensorEntry, WeightIndex};
