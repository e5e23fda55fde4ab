//! The keys that guests read of a config, held against what the guests say of themselves.
//!
//! A loss and a template read the keys of their own section, a recipe those that it names at the top of the config. A guest that names keys
//! is given all of them, each of its type: what the config leaves out has its default, or is null. Of one that names none
//! nothing is known, and any setting goes through.

use std::path::Path;

use super::metadata::{Key, Metadata};
use super::registry::{self, Key as HostKey};
use super::verify::join;
use super::yaml::{Entry, Mark, Node, Tree};
use super::{Config, suggest, yaml};
use crate::error::{Error, Result, quoted};

const COMPONENT: &str = "_component_";
/// Sections that are guests' or hold them.
const NAMES_GUESTS: [&str; 4] = ["loss", "tokenizer", "dataset", "dataset_val"];
/// Keys of data sets and tokenizers that name a template.
const TEMPLATE_KEYS: [&str; 3] = ["prompt_template", "template", "chat_format"];

impl Config {
    /// The config with every key that its guests read, for a recipe; an empty path when there is none yet. What is wrong
    /// joins the mistakes.
    pub(super) fn with_guests(
        &self,
        recipe: &Path,
        host: &'static [HostKey],
        metadata: &dyn Fn(&Path) -> Result<Metadata>,
    ) -> Self {
        let mut config = self.clone();
        if !recipe.as_os_str().is_empty() {
            match metadata(recipe) {
                Ok(metadata) => config.recipe(recipe, host, &metadata),
                Err(error) => config.mistakes.push(error),
            }
        }
        let root = std::mem::replace(&mut config.root, Node::map(Mark::CommandLine));
        config.root = config.sections_of_guests(root, "", metadata);
        config
    }

    /// A tree in which the section of every loss and template, wherever it is, has the keys of its guest.
    fn sections_of_guests(&mut self, mut node: Node, path: &str, metadata: &dyn Fn(&Path) -> Result<Metadata>) -> Node {
        let children: Vec<(String, &mut Node)> = match &mut node.tree {
            Tree::Map(entries) => entries.iter_mut().map(|entry| (entry.key.clone(), &mut entry.value)).collect(),
            Tree::List(items) => items.iter_mut().enumerate().map(|(index, item)| (index.to_string(), item)).collect(),
            _ => vec![],
        };
        for (key, child) in children {
            // What a recipe reads is its own.
            if path.is_empty() && !NAMES_GUESTS.contains(&key.as_str()) {
                continue;
            }
            let path = join(path, &key);
            let taken = std::mem::replace(child, Node::map(Mark::CommandLine));
            *child = match guest_of(&key, &taken).map(|guest| metadata(Path::new(guest))) {
                Some(Ok(metadata)) if metadata.keys.is_empty() => taken,
                Some(Ok(metadata)) => self.section_of_guest(taken, &path, &metadata),
                Some(Err(error)) => {
                    self.mistakes.push(error);
                    taken
                }
                None => self.sections_of_guests(taken, &path, metadata),
            };
        }
        node
    }

    fn recipe(&mut self, recipe: &Path, host: &'static [HostKey], metadata: &Metadata) {
        if metadata.keys.is_empty() {
            return;
        }
        let is_taken = |key: &&Key| host.iter().any(|taken| taken.name == key.name);
        if let Some(key) = metadata.keys.iter().find(is_taken) {
            let what = format!("the recipe `{}` calls a key of its own `{}`", recipe.display(), key.name);
            self.mistakes
                .push(Error::config(what).cause("the host has a key of that name").hint("give it another name"));
            return;
        }
        let settings = self.root.entry("recipe").filter(|entry| !entry.value.is_null()).map(|entry| entry.key_mark);
        if let Some(mark) = settings {
            let names = quoted(metadata.keys.iter().map(|key| &key.name));
            let what = format!("the recipe `{}` names its keys, and reads no `recipe`", recipe.display());
            self.mistakes.push(self.error(mark, what).hint(format!("set them at the top of the config: {names}")));
        }
        self.recipe_keys = metadata.keys.iter().map(|key| key.name.clone()).collect();
        let root = std::mem::replace(&mut self.root, Node::map(Mark::CommandLine));
        self.root = self.filled(root, "", &metadata.keys);
    }

    fn section_of_guest(&mut self, mut section: Node, path: &str, metadata: &Metadata) -> Node {
        // A template's path alone is a section without keys.
        if !section.is_map() {
            let mark = section.mark;
            let name = std::mem::replace(&mut section, Node::map(mark));
            section.tree = Tree::Map(vec![Entry { key: COMPONENT.to_owned(), key_mark: mark, value: name }]);
        }
        for entry in section.entries().iter().filter(|entry| entry.key != COMPONENT) {
            if !metadata.keys.iter().any(|key| key.name == entry.key) {
                let error = self.error(entry.key_mark, format!("unknown key `{}`", join(path, &entry.key)));
                let names = metadata.keys.iter().map(|key| key.name.as_str());
                self.mistakes.push(error.hint(match suggest::nearest(&entry.key, names.clone()) {
                    Some(near) => format!("did you mean `{}`?", join(path, near)),
                    None => format!("keys of this guest: {}", names.collect::<Vec<_>>().join(", ")),
                }));
            }
        }
        self.filled(section, path, &metadata.keys)
    }

    /// A section with each of `keys`: as it is written, converted to its type, or as it is by default.
    fn filled(&mut self, mut section: Node, path: &str, keys: &[Key]) -> Node {
        let mark = section.mark;
        let Tree::Map(entries) = &mut section.tree else { return section };
        for key in keys {
            let name = join(path, &key.name);
            let absent = || Node::scalar(key.default.clone().unwrap_or(serde_yaml::Value::Null), mark);
            let Some(entry) = entries.iter_mut().find(|entry| entry.key == key.name) else {
                if key.required {
                    let error = self.error(mark, format!("the key `{name}` is missing"));
                    self.mistakes.push(error.hint(asks(key, &name)));
                }
                entries.push(Entry { key: key.name.clone(), key_mark: mark, value: absent() });
                continue;
            };
            let found = &entry.value;
            if matches!(found.tree, Tree::Broken) {
                continue;
            }
            if found.is_null() && !key.required {
                entry.value = absent();
                continue;
            }
            let fit = match &found.tree {
                Tree::Scalar(value) => key.fit(value),
                _ => None,
            };
            match fit {
                Some(value) => entry.value.tree = Tree::Scalar(value),
                None => {
                    let what = format!("`{name}` must be {}, found {}", key.expected(), found.describe());
                    let error = yaml::locate(Error::config(what), &self.path, found.mark);
                    self.mistakes.push(match &key.doc {
                        Some(doc) => error.hint(format!("`{name}`: {doc}")),
                        None => error,
                    });
                    entry.value.tree = Tree::Broken;
                }
            }
        }
        section
    }
}

/// The path of the loss or template that a value names.
fn guest_of<'n>(key: &str, node: &'n Node) -> Option<&'n str> {
    let name = node.entry(COMPONENT).map_or(node, |entry| &entry.value).as_str();
    let is_guest = match key {
        "loss" => node.is_map(),
        _ => TEMPLATE_KEYS.contains(&key),
    };
    name.filter(|name| is_guest && registry::is_guest_path(name))
}

fn asks(key: &Key, name: &str) -> String {
    let doc = key.doc.as_ref().map(|doc| format!(": {doc}")).unwrap_or_default();
    format!("`{name}` is {}{doc}", key.expected())
}
