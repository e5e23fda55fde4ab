//! `cargo xtask setup`: what has to be on the machine before anything builds.
//!
//! All that is missing and that we cannot fetch ourselves is reported at once, before the first download.

use std::path::Path;

use crate::apt::Apt;
use crate::shell::{Failure, PathContext, Result, capture, command, run as run_command, works};
use crate::{libtorch, shell};

const WASM_TARGET: &str = "wasm32-wasip2";

pub fn run(root: &Path) -> Result<()> {
    if !ensure(root)? {
        println!("set-up: nothing to do ({}, Gloo headers, {WASM_TARGET})", libtorch::describe(root)?);
    }
    Ok(())
}

/// Does what is missing; false when nothing was.
pub fn ensure(root: &Path) -> Result<bool> {
    let libtorch = libtorch::plan(root)?;
    let gloo = !has_gloo(root);
    let wasm = !has_wasm_target(root);
    let checks = [
        check_compiler(std::env::var("CXX").as_deref().unwrap_or("c++")),
        libtorch.as_ref().map_or(Ok(()), libtorch::check_tools),
        if wasm { check_rustup() } else { Ok(()) },
    ];
    Failure::all(checks.into_iter().filter_map(Result::err))?;
    if let Some(plan) = &libtorch {
        libtorch::lay_out(root, plan)?;
    }
    if gloo {
        fetch_gloo(root)?;
    }
    if wasm {
        run_command(command(root, "rustup").args(["target", "add", WASM_TARGET]))?;
    }
    Ok(libtorch.is_some() || gloo || wasm)
}

fn check_compiler(compiler: &str) -> Result<()> {
    if works(compiler, &["--version"]) {
        return Ok(());
    }
    let install = install_hint("g++", "gcc-c++");
    Err(Failure::new(format!("no C++ compiler (`{compiler}` does not run): {install}")))
}

fn check_rustup() -> Result<()> {
    if works("rustup", &["--version"]) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "no `{WASM_TARGET}` target and no rustup to add it: install Rust from https://rustup.rs, or your distribution's package of that target"
    )))
}

fn has_wasm_target(root: &Path) -> bool {
    let sysroot = capture(command(root, "rustc").args(["--print", "sysroot"]));
    sysroot.is_ok_and(|sysroot| Path::new(sysroot.trim()).join("lib/rustlib").join(WASM_TARGET).join("lib").is_dir())
}

/// The command that installs a package here.
pub fn install_hint(debian: &str, fedora: &str) -> String {
    let sudo = if shell::is_root() { "" } else { "sudo " };
    if works("apt-get", &["--version"]) {
        format!("run `{sudo}apt-get update && {sudo}apt-get install -y {debian}`")
    } else if works("dnf", &["--version"]) {
        format!("run `{sudo}dnf install -y {fedora}`")
    } else {
        format!("install what your distribution calls `{debian}`")
    }
}

/// The wheel of libtorch lacks the headers that c10d's Gloo back end includes.
fn has_gloo(root: &Path) -> bool {
    std::env::var_os("HOST_GLOO_INCLUDE").is_some() || root.join(".libtorch/gloo/usr/include/gloo/context.h").is_file()
}

fn fetch_gloo(root: &Path) -> Result<()> {
    let place = root.join(".libtorch/gloo");
    let unpacked = root.join(".libtorch/.gloo-new");
    let _ = std::fs::remove_dir_all(&unpacked);
    std::fs::create_dir_all(&unpacked).path_context("create", &unpacked)?;
    if Path::new("/usr/include/gloo/context.h").is_file() {
        let include = unpacked.join("usr/include");
        std::fs::create_dir_all(&include).path_context("create", &include)?;
        let link = include.join("gloo");
        std::os::unix::fs::symlink("/usr/include/gloo", &link).path_context("link", &link)?;
    } else {
        let missing = || {
            Failure::new("Gloo's headers are missing and there is no apt to fetch them with")
                .hint("install the Gloo headers (`gloo/context.h`) and set HOST_GLOO_INCLUDE to the folder that holds `gloo/`")
        };
        let apt = Apt::open(root)?.ok_or_else(missing)?;
        let package = apt.download("libgloo-dev")?;
        run_command(command(root, "dpkg").arg("-x").arg(&package).arg(".libtorch/.gloo-new"))?;
    }
    let _ = std::fs::remove_dir_all(&place);
    std::fs::rename(&unpacked, &place).path_context("create", &place)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One line, with the command that helps.
    #[test]
    fn a_missing_compiler_is_one_line() {
        assert!(check_compiler("c++").is_ok());
        let failure = check_compiler("no-such-compiler").unwrap_err().to_string();
        assert!(failure.starts_with("error: no C++ compiler (`no-such-compiler` does not run): "), "{failure}");
        assert!(failure.contains(&install_hint("g++", "gcc-c++")) && failure.lines().count() == 1, "{failure}");
    }
}
