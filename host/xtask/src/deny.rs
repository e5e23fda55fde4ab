//! `cargo xtask deny`: what may be built in, by `deny.toml`: bans, licences, sources, and advisories where they can be had.
//!
//! cargo-deny takes minutes to compile, so that it is not for every change: `cargo xtask test` runs what is installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::shell::{Result, capture, cargo, command, run as run_command};

/// Installs it in `target/tools` where it is missing, and runs it.
pub fn run(root: &Path) -> Result<()> {
    if program(root).is_none() {
        run_command(cargo(root).args("install cargo-deny --locked --root target/tools".split(' ')))?;
    }
    check(root)
}

/// Runs it, or says that it is not there.
pub fn check(root: &Path) -> Result<()> {
    let Some(program) = program(root) else {
        eprintln!("skipped: cargo-deny is not installed (`cargo xtask deny` installs it)");
        return Ok(());
    };
    run_command(command(root, &program).args(["check", "bans", "licenses", "sources"]))?;
    // Its database is a repository of GitHub's; to be without network is no fault of the dependencies.
    if capture(command(root, &program).args(["fetch", "db"])).is_err() {
        eprintln!("skipped: the database of advisories cannot be reached");
        return Ok(());
    }
    run_command(command(root, &program).args(["check", "--disable-fetch", "advisories"]))
}

fn program(root: &Path) -> Option<PathBuf> {
    let works =
        |program: &PathBuf| Command::new(program).arg("--version").output().is_ok_and(|out| out.status.success());
    [root.join("target/tools/bin/cargo-deny"), "cargo-deny".into()].into_iter().find(works)
}
