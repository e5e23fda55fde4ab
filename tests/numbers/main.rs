//! The numbers contract: what other implementations recorded, and what may not change a result.

#[path = "../equivalence/mod.rs"]
mod equivalence;
#[path = "../parity/mod.rs"]
mod parity;
#[path = "../support/mod.rs"]
mod support;
