//! `cargo xtask test`: what has to hold before a change goes in.
//!
//! Each check runs even when one before it failed; the tests come last, so that their own summaries end the output.

use std::path::Path;

use crate::shell::{Failure, Result, cargo, run as run_command};
use crate::{build, deny, guests, libtorch, sdk_gen};

pub fn run(root: &Path) -> Result<()> {
    build::run(root)?;
    libtorch::fetch_nccl(root)?;
    let checks: [(&str, &dyn Fn() -> Result<()>); 7] = [
        ("format", &|| run_command(cargo(root).args(["fmt", "--all", "--check"]))),
        ("lints", &|| {
            run_command(cargo(root).args("clippy --release --workspace --all-targets -- -D warnings".split(' ')))
        }),
        ("the guests' format", &|| {
            run_command(cargo(root).args("fmt --manifest-path scripts/Cargo.toml --all --check".split(' ')))
        }),
        ("the guests' lints", &|| guests::lint(root).map_err(Failure::new)),
        ("dependencies", &|| deny::check(root)),
        ("the generated SDK", &|| sdk_gen::generate(root, true).map_err(Failure::new)),
        ("tests", &|| run_command(cargo(root).args(["test", "--release", "--workspace", "--no-fail-fast"]))),
    ];
    let mut failed = vec![];
    for (name, check) in checks {
        if let Err(failure) = check() {
            eprintln!("{failure}");
            failed.push(name);
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(Failure::new(format!("failed: {}", failed.join(", ")))) }
}
