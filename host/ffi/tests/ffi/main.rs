//! One binary, because each links libtorch.

mod alloc;
mod attention;
mod autograd;
mod backend;
mod dist;
mod loss;
mod memory;
mod reference;
mod rng;
mod training;
