//! A verified config to a plan: cross-field checks and derived values.
//!
//! Pure but for [`Surroundings`], which a test can make up: what stands on the disk decides where a shipped guest or the
//! files of a data folder are, and nothing else. Every part is resolved even when another failed.

mod data;
pub mod data_files;
mod defaults;
mod generate;
mod hardware;
mod parts;
mod placement;
mod train;

use std::path::{Path, PathBuf};

use super::metadata::Metadata;
use super::plan::GuestRef;
use super::registry::Key;
use super::section::{Found, Reader};
use super::verify::verify;
use super::{Config, Notice};
use crate::error::{Error, Result};

pub use generate::generate;
pub use hardware::hardware;
pub use train::train;

/// What a plan takes from outside the config.
pub struct Surroundings<'a> {
    /// Used when the config's seed is null.
    pub seed: u32,
    pub cwd: PathBuf,
    /// Folders that may hold `templates/` and `scripts/`: the working directory, then those around the program.
    pub shipped: Vec<PathBuf>,
    /// The user's cache folder.
    pub cache_dir: Option<PathBuf>,
    pub kind: &'a dyn Fn(&Path) -> Option<FileKind>,
    /// The files below a folder, by their path in it.
    pub files_below: &'a dyn Fn(&Path) -> Vec<String>,
    /// What the guest in a file says of itself; nothing where there is none.
    pub metadata: &'a dyn Fn(&Path) -> Result<Metadata>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    File,
    Folder,
}

/// A plan and what to know about it.
#[derive(Debug)]
pub struct Resolved<P> {
    pub plan: P,
    pub notices: Vec<Notice>,
}

impl Surroundings<'_> {
    fn is_file(&self, path: &Path) -> bool {
        (self.kind)(path) == Some(FileKind::File)
    }

    fn is_folder(&self, path: &Path) -> bool {
        (self.kind)(path) == Some(FileKind::Folder)
    }

    /// Finds a shipped guest: the built module, else its script.
    pub fn find_guest(&self, folder: &str, name: &str) -> Option<PathBuf> {
        let names = [format!("{folder}/{name}.wasm"), format!("scripts/{folder}/{name}.rhai")];
        self.shipped.iter().find_map(|root| {
            names
                .iter()
                .map(|name| if *root == self.cwd { PathBuf::from(name) } else { root.join(name) })
                .find(|path| self.is_file(path))
        })
    }

    /// Returns whether `path` is `folder` or below it, as far as names tell.
    fn is_within(&self, path: &Path, folder: &Path) -> bool {
        normalise(&self.cwd.join(path)).starts_with(normalise(&self.cwd.join(folder)))
    }
}

fn normalise(path: &Path) -> PathBuf {
    use std::path::Component;
    path.components().fold(PathBuf::new(), |mut out, part| {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(out.pop()),
            part => out.push(part),
        }
        out
    })
}

/// Runs a resolver over a config and folds everything that is wrong into one error.
fn resolve<P>(
    config: &Config,
    keys: &'static [Key],
    build: impl FnOnce(&Reader<'_>, &mut Vec<Notice>) -> Found<P>,
) -> Result<Resolved<P>> {
    let findings = verify(config, keys);
    let mut notices = findings.notices;
    let reader = Reader::new(config);
    let plan = build(&reader, &mut notices);
    let mut errors = config.mistakes.clone();
    errors.extend(findings.errors);
    errors.extend(reader.errors.into_inner());
    // In the order a person meets them in the file; those of the command line come first.
    errors.sort_by_key(|error| {
        error.locations.first().map_or((0, 0), |at| (at.line.unwrap_or(0), at.column.unwrap_or(0)))
    });
    match (Error::all(errors), plan) {
        (Some(error), _) => Err(error),
        (None, Ok(plan)) => Ok(Resolved { plan, notices }),
        (None, Err(_)) => Err(Error::bug("a config was refused without a reason").at_file(&config.path)),
    }
}

fn guest(path: PathBuf) -> GuestRef {
    GuestRef { path, settings: serde_json::json!({}) }
}

#[cfg(test)]
mod tests;
