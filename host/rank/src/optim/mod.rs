//! Optimizers over one flat tensor, and learning rate schedules.

pub mod adamw;
pub mod schedule;

pub use adamw::AdamW;
pub use schedule::Schedule;
