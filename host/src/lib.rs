//! `host`, the front and everything that needs no tensor: command line, configuration, data, model files, launcher.
//!
//! Nothing here links libtorch: `ls`, `validate` and `doctor` work without it. The worker (`host-rank`) depends on this
//! library for the plan, the data path and the file formats.

pub mod cli;
pub mod config;
pub mod data;
pub mod doctor;
pub mod error;
pub mod gguf;
pub mod guest;
pub mod hf;
pub mod hub;
pub mod import;
pub mod kit;
pub mod launch;
pub mod libtorch;
pub mod machine;
pub mod panics;
pub mod placement;
pub mod saved;
pub mod tokenizer;
pub mod worker;

pub use error::{Error, Result};
