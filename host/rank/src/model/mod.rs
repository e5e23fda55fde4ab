//! Models, built from a checkpoint's `config.json` by checkpoint name. Families know no rank, no dtype switch, no adapter
//! and no device; [`builder`] is the one seam that knows adapters and formats.

pub mod builder;
pub mod cache;
pub mod layers;
pub mod llama;
pub mod rope;
pub mod weights;

pub use cache::KvCache;
pub use layers::{Forward, Linear};
pub use llama::Llama;
pub use rope::Rope;
pub use weights::Weights;
