//! What a run leaves on disk: folders in the Hugging Face layout with merged weights, the adapter, and what resuming
//! needs. Written to a temporary name, synced, renamed: a folder that has its name is whole.

pub mod files;
pub mod folder;
pub mod merged;
pub mod resume;
pub mod shards;
mod writer;

pub use folder::Saver;
pub use resume::{Identity, Position, ResumeState};
pub use writer::{Job, Writer, Written};
