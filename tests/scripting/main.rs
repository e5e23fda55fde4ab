//! Guests against the real engines, with a training run small enough to follow by hand.
//!
//! The guests are built by `cargo xtask build`.

mod corpus;
mod costs;
mod files;
mod handmade;
mod handmade_templates;
mod hostile;
mod isolate;
mod languages;
mod losses;
mod memory;
mod operations;
mod properties;
mod recipes;
mod rhai_limits;
mod state;
mod support;
mod surface;
mod templates;

#[path = "../support/config.rs"]
mod config_world;
#[path = "../../host/xtask/src/sdk_gen.rs"]
mod sdk_gen;
