//! Model folders: `config.json` and the weight files beside it, safetensors or PyTorch's. Reads headers only; no tensor data.

pub mod config;
mod layers;
mod names;
pub mod torch_file;
pub mod weights;

pub use config::{ModelConfig, RopeScaling, config_folder};
pub use layers::LinearSpec;
pub use weights::{TensorEntry, WeightIndex};
