//! YAML to [`plan`]: imports nothing of ours but the error type.
//!
//! [`yaml`] (text to a tree with positions) → [`overrides`] → [`interpolate`] → [`verify`] (against the closed
//! [`registry`]) → [`resolve`] (to a plan). Each stage leaves what it found wrong and lets the next go on, so that a person
//! sees every mistake at once. [`check`] looks at the files a plan names; nothing before it reads any but the config.

mod guests;
mod interpolate;
pub mod limits;
pub mod metadata;
mod overrides;
pub mod plan;
pub mod registry;
pub mod resolve;
mod section;
pub mod suggest;
mod verify;
mod yaml;

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Location, Result};
use yaml::{Mark, Node, Tree};

/// A config longer than this is something else: torchtune's are 4 KB.
const MAX_BYTES: u64 = 1 << 20;

/// What a location says of something that is in no file.
const COMMAND_LINE: &str = "command line";

/// Something to know about a config that is fine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub message: String,
    pub location: Location,
}

impl Notice {
    /// Of something on the command line.
    pub fn command_line(message: String) -> Self {
        Self { message, location: Location { file: COMMAND_LINE.into(), line: None, column: None } }
    }
}

/// A config after overrides and interpolation, with the mistakes found so far.
#[derive(Clone, Debug)]
pub struct Config {
    pub path: PathBuf,
    pub overrides: Vec<String>,
    /// Overrides applied, interpolations as they are written.
    written: Node,
    root: Node,
    mistakes: Vec<Error>,
    /// Top-level keys that are the recipe's own.
    recipe_keys: Vec<String>,
    /// Of the mistakes, how many are overrides that could not be applied; they come first.
    not_applied: usize,
}

impl Config {
    /// Reads a config file. An error here means there is no config to look at; other mistakes wait for `resolve`.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        Self::parse(&read(path)?, path, overrides)
    }

    pub fn parse(text: &str, path: &Path, overrides: &[String]) -> Result<Self> {
        let mut root = yaml::parse_config(text, path)?;
        let mut mistakes = overrides::apply(&mut root, overrides);
        let not_applied = mistakes.len();
        let written = root;
        let (root, broken) = interpolate::resolve(&written);
        mistakes.extend(broken.into_iter().map(|mistake| {
            let error = yaml::locate(Error::config(mistake.message), path, mistake.mark);
            mistake.hint.into_iter().fold(error, Error::hint)
        }));
        Ok(Self {
            path: path.to_owned(),
            overrides: overrides.to_vec(),
            written,
            root,
            mistakes,
            recipe_keys: vec![],
            not_applied,
        })
    }

    /// Returns the config as YAML, overrides applied and interpolations replaced.
    pub fn to_yaml(&self) -> String {
        // Every tree is made of YAML's own values, so this cannot fail; an empty text would be seen at once.
        serde_yaml::to_string(&self.root.to_value()).unwrap_or_default()
    }

    /// The config as YAML for a person; `resolved` with every interpolation replaced, which must then be possible.
    pub fn print(&self, resolved: bool, sort: bool) -> Result<String> {
        let counting = if resolved { self.mistakes.len() } else { self.not_applied };
        if let Some(error) = Error::all(self.mistakes[..counting].to_vec()) {
            return Err(error);
        }
        let mut value = if resolved { &self.root } else { &self.written }.to_value();
        if let (true, serde_yaml::Value::Mapping(map)) = (sort, &mut value) {
            let mut entries: Vec<_> = std::mem::take(map).into_iter().collect();
            entries.sort_by(|(left, _), (right, _)| left.as_str().cmp(&right.as_str()));
            map.extend(entries);
        }
        serde_yaml::to_string(&value).map_err(|error| Error::bug("a config is not YAML").cause(error))
    }

    /// Says whether this is for `generate`: it has a prompt and nothing to train with.
    pub fn is_generation(&self) -> bool {
        (self.has("prompt") || self.has("max_new_tokens")) && !self.is_training()
    }

    pub fn is_training(&self) -> bool {
        self.has("dataset") || self.has("optimizer")
    }

    /// Says whether a dotted key is written in the config.
    pub fn has(&self, path: &str) -> bool {
        self.root.at(path).is_some()
    }

    /// The dotted paths of the components of a key that may hold one or a list of them.
    pub fn sections(&self, key: &'static str) -> impl Iterator<Item = String> {
        let (count, is_list) = match self.root.at(key) {
            Some(Node { tree: Tree::List(items), .. }) => (items.len(), true),
            _ => (1, false),
        };
        (0..count).map(move |index| if is_list { format!("{key}.{index}") } else { key.to_owned() })
    }

    /// Returns where a dotted key is written, or the nearest section that would hold it.
    pub fn locate(&self, path: &str) -> Location {
        let mut node = &self.root;
        for name in path.split('.') {
            match node.child(name) {
                Some(child) => node = child,
                None => break,
            }
        }
        self.location(node.mark)
    }

    fn location(&self, mark: Mark) -> Location {
        match mark {
            Mark::File { line, column } => Location { file: self.path.clone(), line: Some(line), column: Some(column) },
            Mark::CommandLine => Location { file: COMMAND_LINE.into(), line: None, column: None },
        }
    }

    fn error(&self, mark: Mark, message: impl Into<String>) -> Error {
        yaml::locate(Error::config(message), &self.path, mark)
    }
}

fn read(path: &Path) -> Result<String> {
    let fail = |why: String| Error::config(format!("cannot read the config `{}`", path.display())).cause(why);
    let metadata = std::fs::metadata(path).map_err(|error| {
        fail(error.to_string())
            .hint("`host ls` lists the configs that come with it; `--config` takes a path or such a name")
    })?;
    if metadata.is_dir() {
        return Err(fail("it is a folder".into()));
    }
    if metadata.len() > MAX_BYTES {
        return Err(fail(format!("it has {} bytes, and a config has at most {MAX_BYTES}", metadata.len())));
    }
    // A device or a pipe has no length to go by.
    let mut bytes = vec![];
    let read = std::fs::File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes));
    read.map_err(|error| fail(error.to_string()))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(fail(format!("it does not end within {MAX_BYTES} bytes")));
    }
    String::from_utf8(bytes).map_err(|error| {
        fail(format!("byte {} is not UTF-8, so it is not a text file", error.utf8_error().valid_up_to()))
    })
}
