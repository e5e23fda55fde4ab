//! The guest of a folder, and what its author expects of it.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::BUILT;
use crate::error::{Error, Result, quoted};

/// What `host test` finds.
#[derive(Debug)]
pub struct Found {
    pub file: PathBuf,
    /// `tests/rows.jsonl` of its folder.
    pub rows: Option<PathBuf>,
    /// A source file that was changed since the guest was built.
    pub newer_source: Option<PathBuf>,
}

/// Finds the guest that a path means: a file, or the one of a folder.
pub fn find_guest(path: &Path) -> Result<Found> {
    if path.is_dir() {
        let file = guest_of(path)?;
        return Ok(Found { rows: rows_of(path), newer_source: newer(&path.join("src"), &file), file });
    }
    // A component lies some folders below its crate's.
    let folders = path.ancestors().skip(1).take(4);
    let rows = folders.map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder });
    Ok(Found { file: path.to_owned(), rows: rows.filter_map(rows_of).next(), newer_source: None })
}

fn rows_of(folder: &Path) -> Option<PathBuf> {
    let rows = folder.strip_prefix(".").unwrap_or(folder).join("tests/rows.jsonl");
    rows.is_file().then_some(rows)
}

fn guest_of(folder: &Path) -> Result<PathBuf> {
    let shown = folder.display();
    if folder.join("Cargo.toml").is_file() {
        let name = crate_name(folder)?;
        // As cargo has it.
        let built = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(target) => PathBuf::from(target).join(BUILT.strip_prefix("target/").unwrap_or(BUILT)),
            None => folder.join(BUILT),
        };
        let file = built.join(name.replace('-', "_") + ".wasm");
        return match file.is_file() {
            true => Ok(file),
            false => Err(Error::config(format!("the guest in `{shown}` is not built: no `{}`", file.display()))
                .hint(format!("`(cd {shown} && cargo build --release)` builds it"))),
        };
    }
    let entries = std::fs::read_dir(folder)
        .map_err(|error| Error::config(format!("cannot list the folder `{shown}`")).cause(error))?;
    let is_guest = |path: &PathBuf| path.extension().is_some_and(|suffix| suffix == "rhai" || suffix == "wasm");
    let mut guests: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_guest).collect();
    guests.sort();
    match &guests[..] {
        [guest] => Ok(guest.clone()),
        [] => Err(Error::config(format!("the folder `{shown}` holds no guest"))
            .hint("a guest is a .rhai or .wasm file; `host new` makes a folder with one")),
        several => {
            let names = quoted(several.iter().map(|path| path.display()));
            Err(Error::config(format!("the folder `{shown}` holds several guests"))
                .cause(names)
                .hint("name one of the files"))
        }
    }
}

fn crate_name(folder: &Path) -> Result<String> {
    let path = folder.join("Cargo.toml");
    let cannot =
        |cause: String| Error::config(format!("cannot read the crate's name in `{}`", path.display())).cause(cause);
    let text = std::fs::read_to_string(&path).map_err(|error| cannot(error.to_string()))?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| cannot(error.message().to_owned()))?;
    let name = table.get("package").and_then(|package| package.get("name")?.as_str());
    name.map(str::to_owned).ok_or_else(|| cannot("it has no `package.name`".into()))
}

/// A file directly in `sources` that is newer than `built`.
fn newer(sources: &Path, built: &Path) -> Option<PathBuf> {
    let changed = |path: &Path| -> Option<SystemTime> { std::fs::metadata(path).ok()?.modified().ok() };
    let built = changed(built)?;
    let files = std::fs::read_dir(sources).ok()?.flatten().map(|entry| entry.path());
    files.filter(|path| changed(path).is_some_and(|changed| changed > built)).min()
}
