//! The worker: everything that touches a tensor. Links libtorch; started by the launcher, one process per rank.
//!
//! Arrows point one way: `script → train → {data, model, trained, optim, checkpoint, metrics} → dist → ffi`. `train`
//! offers [`train::Run`] and never calls a guest.

pub mod adapter;
pub mod checkpoint;
pub mod device;
pub mod dist;
pub mod flat;
pub mod generate;
pub mod logits;
pub mod metrics;
pub mod model;
pub mod optim;
pub mod preview;
pub mod script;
pub mod shard;
pub mod torch;
pub mod train;
pub mod trained;
