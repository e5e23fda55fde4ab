//! `cargo xtask build`: the two programs and the guests they run.

use std::path::Path;

use crate::shell::{Failure, Result, cargo, run as run_command};
use crate::{guests, setup};

pub fn run(root: &Path) -> Result<()> {
    setup::ensure(root)?;
    // The whole workspace: dependencies then have the features they have in the tests, and are compiled once.
    run_command(cargo(root).args(["build", "--release", "--workspace"]))?;
    guests::build(root).map_err(Failure::new)
}
