//! An author's kit: new guests that build, test and run at once.
//!
//! A new guest's folder needs nothing but this program: the SDK lies inside it ([`SDK`]), as it is in the repository.

mod find;
pub mod tiny;

use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Result};

pub use find::{Found, find_guest};

/// The files of `sdk/`, by their path in it.
const SDK: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/sdk_files.rs"));
/// The versions that the shipped guests are built with: a new guest begins with the same.
const LOCK: &str = include_str!("../../../scripts/Cargo.lock");
/// Where cargo leaves a component, in the folder of its crate.
const BUILT: &str = "target/wasm32-wasip2/release";

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// How batches become a better model
    Recipe,
    /// How a row becomes messages
    Template,
    /// How far scores are from what they should be
    Loss,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Language {
    /// A script, for your own use
    Rhai,
    /// A Wasm component, the form to give to others
    Rust,
}

/// A guest to be made.
#[derive(Clone, Debug)]
pub struct Project {
    pub kind: Kind,
    pub language: Language,
    pub name: String,
    /// Its folder, which is not there yet.
    pub folder: PathBuf,
}

impl Kind {
    pub fn noun(self) -> &'static str {
        match self {
            Self::Recipe => "recipe",
            Self::Template => "template",
            Self::Loss => "loss",
        }
    }

    /// The guest in both languages, and what it is tested with.
    fn sources(self) -> (&'static str, &'static str, Option<&'static str>) {
        macro_rules! sources {
            ($name:literal) => {
                (include_str!(concat!("files/", $name, ".rhai")), include_str!(concat!("files/", $name, ".rs")))
            };
        }
        let ((rhai, rust), rows) = match self {
            Self::Recipe => (sources!("recipe"), None),
            Self::Template => (sources!("template"), Some(include_str!("files/template.jsonl"))),
            Self::Loss => (sources!("loss"), Some(include_str!("files/loss.jsonl"))),
        };
        (rhai, rust, rows)
    }
}

impl Project {
    /// Checks that a name is one for a file, a crate and a guest alike.
    pub fn check_name(name: &str) -> Result<()> {
        let is_plain = name.len() <= 64
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if is_plain && name != "host_sdk" {
            return Ok(());
        }
        Err(Error::config(format!("a guest cannot be called `{}`", name.escape_debug()))
            .hint("its name is lower-case letters, digits and `_`, at most 64"))
    }

    /// The guest's file, once it is built.
    pub fn guest(&self) -> PathBuf {
        match self.language {
            Language::Rhai => self.folder.join(format!("{}.rhai", self.name)),
            Language::Rust => self.folder.join(BUILT).join(format!("{}.wasm", self.name)),
        }
    }

    /// What a new author does next, a command a line.
    pub fn commands(&self) -> Vec<String> {
        let (dir, guest) = (shell_word(&self.folder), shell_word(&self.guest()));
        let config = shell_word(&self.folder.join("config.yaml"));
        let config = format!("--config {config} checkpointer.checkpoint_dir=MODEL");
        let build = match self.language {
            Language::Rhai => None,
            Language::Rust => Some(format!("(cd {dir} && cargo build --release)")),
        };
        let rest = [
            format!("host check {guest}"),
            format!("host test {dir}"),
            format!("host preview {}{config}", self.recipe_flag()),
            format!("host run {} --nproc 2 {config}", self.recipe()),
        ];
        build.into_iter().chain(rest).collect()
    }

    /// The recipe to run it with: itself, if it is one.
    fn recipe(&self) -> String {
        match self.kind {
            Kind::Recipe => shell_word(&self.guest()),
            Kind::Template | Kind::Loss => "lora_distributed".to_owned(),
        }
    }

    fn recipe_flag(&self) -> String {
        match self.kind {
            Kind::Recipe => format!("--recipe {} ", shell_word(&self.guest())),
            Kind::Template | Kind::Loss => String::new(),
        }
    }

    /// Makes the folder, whole or not at all.
    pub fn write(&self) -> Result<()> {
        let shown = self.folder.display();
        if self.folder.symlink_metadata().is_ok() {
            return Err(
                Error::config(format!("`{shown}` is there already")).hint("give another name, or `--dir FOLDER`")
            );
        }
        let parent = match self.folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(parent).path_context("make the folder", parent)?;
        let temporary = tempfile::Builder::new()
            .prefix(".host-new-")
            .tempdir_in(parent)
            .path_context("make a folder in", parent)?;
        let whole = temporary.path().join("guest");
        for (name, content) in self.files() {
            let path = whole.join(name);
            let folder = path.parent().unwrap_or(&whole);
            std::fs::create_dir_all(folder).path_context("make the folder", folder)?;
            std::fs::write(&path, content).path_context("write", &path)?;
        }
        std::fs::rename(&whole, &self.folder).path_context("make the folder", &self.folder)
    }

    /// Every file of it, by its path in the folder.
    fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let (rhai, rust, rows) = self.kind.sources();
        let is_rust = self.language == Language::Rust;
        let mut files = vec![
            ("README.md".into(), self.filled(include_str!("files/README.md"))),
            ("config.yaml".into(), self.filled(include_str!("files/config.yaml"))),
            ("data.jsonl".into(), include_str!("files/data.jsonl").to_owned()),
        ];
        files.extend(rows.map(|rows| ("tests/rows.jsonl".to_owned(), rows.to_owned())));
        if is_rust {
            files.extend([
                ("src/lib.rs".to_owned(), rust.to_owned()),
                ("Cargo.toml".to_owned(), self.filled(include_str!("files/guest.toml"))),
                ("Cargo.lock".to_owned(), registry_packages(LOCK)),
                (".cargo/config.toml".to_owned(), "[build]\ntarget = \"wasm32-wasip2\"\n".to_owned()),
                (".gitignore".to_owned(), "/target\n/out\n".to_owned()),
            ]);
        } else {
            files.extend([
                (format!("{}.rhai", self.name), rhai.to_owned()),
                (".gitignore".to_owned(), "/out\n".to_owned()),
            ]);
        }
        let needed: &[&str] = if is_rust { &["rust/", "wit/"] } else { &["rhai/"] };
        let is_needed = |name: &str| name.ends_with(".md") || needed.iter().any(|folder| name.starts_with(folder));
        let sdk = SDK.iter().filter(|(name, _)| is_needed(name));
        let files = files.into_iter().map(|(name, text): (String, String)| (name.into(), text.into_bytes()));
        files.chain(sdk.map(|(name, content)| (Path::new("sdk").join(name), content.to_vec()))).collect()
    }

    /// A text with what it leaves open filled in: `{{name}}`.
    fn filled(&self, text: &str) -> String {
        let guest = yaml_text(&self.guest());
        let of_kind = |kind: Kind, other: &str| if self.kind == kind { guest.clone() } else { other.to_owned() };
        let tests = match self.kind {
            Kind::Recipe => "`host test` takes three\nsteps with a tiny model.",
            Kind::Template => {
                "`host test` holds\n`tests/rows.jsonl` against the template: rows, and the messages they become."
            }
            Kind::Loss => "`host test` holds\n`tests/rows.jsonl` against the loss: scores, and what they come to.",
        };
        let commands: Vec<String> = self.commands().iter().map(|command| format!("    {command}")).collect();
        let values = [
            ("name", self.name.clone()),
            ("kind", self.kind.noun().to_owned()),
            ("language", if self.language == Language::Rust { "Rust" } else { "Rhai" }.to_owned()),
            ("output_dir", yaml_text(&self.folder.join("out"))),
            ("data", yaml_text(&self.folder.join("data.jsonl"))),
            ("template", of_kind(Kind::Template, "null")),
            ("loss", of_kind(Kind::Loss, "cross_entropy")),
            ("commands", commands.join("\n")),
            ("tests", tests.to_owned()),
        ];
        values.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("{{{{{name}}}}}"), value))
    }
}

/// Whether a path is the same in a shell and in YAML as it is.
fn is_plain(path: &str) -> bool {
    path.chars().all(|c| c.is_alphanumeric() || "/._-".contains(c)) && !path.starts_with('-')
}

fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    if is_plain(&path) { path } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

fn yaml_text(path: &Path) -> String {
    let path = path.display().to_string();
    // JSON's texts are YAML's.
    if is_plain(&path) { path } else { serde_json::Value::from(path).to_string() }
}

/// Of a lock file, what came from a registry; cargo adds the rest, and drops what is not used.
fn registry_packages(lock: &str) -> String {
    let mut blocks = lock.split("\n\n");
    let head = blocks.next().unwrap_or_default();
    let packages = blocks.filter(|block| block.contains("\nsource = "));
    std::iter::once(head).chain(packages).collect::<Vec<_>>().join("\n\n").trim_end().to_owned() + "\n"
}
