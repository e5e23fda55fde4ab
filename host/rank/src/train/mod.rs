//! Training: [`Run`] is the one implementation of what a turn of the loop does, for every rank count, recipe and method.
//! A recipe calls it; it never calls a recipe.

mod agree;
pub mod batch;
pub mod evaluate;
mod lockstep;
pub mod open;
mod placement;
pub mod run;
pub mod step;

pub use batch::Which;
pub use lockstep::{Place, Work};
pub use open::{Inputs, Opened, Start, Tokens};
pub use run::{Loss, Over, Run};
