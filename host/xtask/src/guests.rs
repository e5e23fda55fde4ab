//! Builds and lints the guests: `scripts/` to `recipes/` and `templates/`, the tests' own to `target/guests/`.

use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "wasm32-wasip2";
const TARGET_DIR: &str = "target/guest-build";

/// Builds every guest crate and lays the modules and scripts where configs name them.
pub fn build(root: &Path) -> Result<(), String> {
    cargo(root, &["build"], &[])?;
    let built = root.join(TARGET_DIR).join(TARGET).join("release");
    for (sources, out) in [
        ("scripts/recipes", root.join("recipes")),
        ("scripts/templates", root.join("templates")),
        ("tests/scripting/guests", root.join("target/guests")),
    ] {
        std::fs::create_dir_all(&out).map_err(|error| format!("cannot create `{}`: {error}", out.display()))?;
        let sources = root.join(sources);
        for script in files(&sources)?.iter().filter(|path| path.extension().is_some_and(|name| name == "rhai")) {
            copy(script, &out.join(script.file_name().unwrap_or_default()))?;
        }
        let crates = if sources.join("wasm").is_dir() { sources.join("wasm") } else { sources };
        for guest in files(&crates)?.iter().filter(|path| path.join("Cargo.toml").is_file()) {
            let name = guest.file_name().unwrap_or_default().to_string_lossy().into_owned() + ".wasm";
            copy(&built.join(&name), &out.join(&name))?;
        }
    }
    Ok(())
}

/// Clippy over them, warnings denied.
pub fn lint(root: &Path) -> Result<(), String> {
    cargo(root, &["clippy", "--workspace"], &["--", "-D", "warnings"])
}

/// Runs cargo in the guests' workspace, for their target.
fn cargo(root: &Path, task: &[&str], rest: &[&str]) -> Result<(), String> {
    let workspace = root.join("scripts");
    // No path of this machine goes into a module; the source path that a failure report shows is the repository's.
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    // Cargo names the sources below the workspace's own folder relative to it.
    let inside = |folder: &str| remap(Path::new(folder), &format!("scripts/{folder}"));
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")))
        .ok_or("cannot find Cargo's home: set CARGO_HOME")?;
    let flags =
        [remap(&cargo_home.join("registry/src"), "registry"), remap(root, ""), inside("recipes"), inside("templates")];
    let status = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(task)
        .args(["--quiet", "--release", "--locked", "--target", TARGET, "--manifest-path"])
        .arg(workspace.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(root.join(TARGET_DIR))
        .args(rest)
        .current_dir(&workspace)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env_remove("RUSTFLAGS")
        .status()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    if status.success() {
        return Ok(());
    }
    Err(format!(
        "the guests do not pass `cargo {}`\nhint: if the target is missing, run `rustup target add {TARGET}`",
        task[0]
    ))
}

fn files(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("cannot list `{}`: {error}", dir.display());
    let mut paths = std::fs::read_dir(dir)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    paths.sort();
    Ok(paths)
}

/// Copies under a temporary name, so that nobody reads half a module; leaves an equal file alone.
fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let content = std::fs::read(from).map_err(|error| format!("cannot read `{}`: {error}", from.display()))?;
    if std::fs::read(to).is_ok_and(|current| current == content) {
        return Ok(());
    }
    let failed = |error: std::io::Error| format!("cannot write `{}`: {error}", to.display());
    let temporary = to.with_extension("new");
    std::fs::write(&temporary, content).map_err(failed)?;
    std::fs::rename(&temporary, to).map_err(failed)
}
