//! Typed access to a section that `verify` has seen: a key's value, or its row's default.
//!
//! `Err(Reported)` means that `verify` has already said what is wrong; a plan that meets one is not made, and the others
//! go on.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_yaml::Value;

use super::Config;
use super::registry::{self, Component, Key, Type};
use super::verify::join;
use super::yaml::{self, Node, Tree};
use crate::error::Error;

/// A mistake that is already in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reported;

pub type Found<T> = Result<T, Reported>;

/// What `resolve` collects on its way through the sections.
pub struct Reader<'a> {
    pub config: &'a Config,
    pub errors: RefCell<Vec<Error>>,
    /// Every `component.key` read, for the test that compares it with the honoured rows.
    pub read: RefCell<BTreeSet<(&'static str, &'static str)>>,
}

impl<'a> Reader<'a> {
    pub fn new(config: &'a Config) -> Self {
        Self { config, errors: RefCell::default(), read: RefCell::default() }
    }

    pub fn root(&'a self, name: &'static str, keys: &'static [Key]) -> Section<'a> {
        Section { reader: self, node: Some(&self.config.root), path: String::new(), name, groups: Groups::One(keys) }
    }

    pub fn fail(&self, error: Error) -> Reported {
        self.errors.borrow_mut().push(error);
        Reported
    }
}

#[derive(Clone, Copy)]
enum Groups {
    One(&'static [Key]),
    Many(&'static [&'static [Key]]),
}

pub struct Section<'a> {
    pub reader: &'a Reader<'a>,
    node: Option<&'a Node>,
    path: String,
    name: &'static str,
    groups: Groups,
}

impl<'a> Section<'a> {
    fn key(&self, name: &str) -> &'static Key {
        let key = match self.groups {
            Groups::One(keys) => keys.iter().find(|key| key.name == name),
            Groups::Many(groups) => registry::find(groups, name),
        };
        let key = key.unwrap_or_else(|| panic!("`{}` has no row for `{name}`", self.name));
        self.reader.read.borrow_mut().insert((self.name, key.name));
        key
    }

    /// Returns whether this section's component has a row for the key at all.
    pub fn knows(&self, name: &str) -> bool {
        match self.groups {
            Groups::One(keys) => keys.iter().any(|key| key.name == name),
            Groups::Many(groups) => registry::find(groups, name).is_some(),
        }
    }

    /// Returns whether the config says anything of this key, be it null.
    pub fn is_given(&self, name: &str) -> bool {
        self.node.is_some_and(|node| node.child(name).is_some())
    }

    pub fn path(&self, name: &str) -> String {
        join(&self.path, name)
    }

    /// Returns the node of a key, when it is there and not null.
    pub fn node(&self, name: &str) -> Found<Option<&'a Node>> {
        self.key(name);
        match self.node.and_then(|node| node.child(name)) {
            Some(Node { tree: Tree::Broken, .. }) => Err(Reported),
            Some(node) if node.is_null() => Ok(None),
            other => Ok(other),
        }
    }

    /// Returns a key's value, or its default; `Option` for keys that may be null.
    pub fn get<T: FromValue>(&self, name: &str) -> Found<T> {
        let key = self.key(name);
        let value = match (self.node(name)?, key.default) {
            (Some(node), _) => node.to_value(),
            (None, Some(default)) => yaml::plain(default),
            (None, None) => return Err(Reported),
        };
        T::from_value(&value).ok_or(Reported)
    }

    /// Adds a mistake at a key's value.
    pub fn fail(&self, name: &str, message: impl Into<String>, hint: impl Into<String>) -> Reported {
        let mark = self.node.and_then(|node| node.child(name).or(Some(node))).unwrap_or(&self.reader.config.root).mark;
        self.reader.fail(self.reader.config.error(mark, message).hint(hint))
    }

    pub fn component(&self, name: &str) -> Found<Section<'a>> {
        self.optional_component(name)?.ok_or(Reported)
    }

    pub fn optional_component(&self, name: &str) -> Found<Option<Section<'a>>> {
        self.node(name)?.map(|node| self.component_at(name, node, self.path(name))).transpose()
    }

    /// The components of a key that may hold one or a list of them; none where it holds none.
    pub fn components(&self, name: &str) -> Vec<Found<Section<'a>>> {
        match self.node(name) {
            Ok(None) => vec![],
            Ok(Some(Node { tree: Tree::List(items), .. })) => {
                let item = |(index, node): (usize, &'a Node)| {
                    self.component_at(name, node, join(&self.path(name), &index.to_string()))
                };
                items.iter().enumerate().map(item).collect()
            }
            Ok(Some(node)) => vec![self.component_at(name, node, self.path(name))],
            Err(reported) => vec![Err(reported)],
        }
    }

    fn component_at(&self, name: &str, node: &'a Node, path: String) -> Found<Section<'a>> {
        let component = node
            .entry("_component_")
            .and_then(|entry| registry::component(entry.value.as_str()?))
            .filter(|component| component.refused.is_none() && has_role(self.key(name), component))
            .ok_or(Reported)?;
        let groups = Groups::Many(component.keys);
        Ok(Section { reader: self.reader, node: Some(node), path, name: component.name, groups })
    }

    pub fn section(&self, name: &'static str, keys: &'static [Key]) -> Found<Section<'a>> {
        let node = self.node(name)?;
        Ok(Section { reader: self.reader, node, path: self.path(name), name, groups: Groups::One(keys) })
    }

    /// Returns the name of this section's component as the registry spells it.
    pub fn component_name(&self) -> &'static str {
        self.name
    }
}

fn has_role(key: &Key, component: &Component) -> bool {
    matches!(key.ty, Type::Component(role) | Type::Components(role) if role == component.role)
}

/// What a scalar or a list of scalars can be read as.
pub trait FromValue: Sized {
    fn from_value(value: &Value) -> Option<Self>;
}

impl FromValue for bool {
    fn from_value(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl FromValue for u64 {
    fn from_value(value: &Value) -> Option<Self> {
        value.as_u64()
    }
}

impl FromValue for usize {
    fn from_value(value: &Value) -> Option<Self> {
        value.as_u64()?.try_into().ok()
    }
}

impl FromValue for f64 {
    fn from_value(value: &Value) -> Option<Self> {
        value.as_f64()
    }
}

impl FromValue for String {
    fn from_value(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
}

impl FromValue for PathBuf {
    fn from_value(value: &Value) -> Option<Self> {
        value.as_str().map(PathBuf::from)
    }
}

impl FromValue for Vec<String> {
    fn from_value(value: &Value) -> Option<Self> {
        value.as_sequence()?.iter().map(String::from_value).collect()
    }
}

impl<T: FromValue> FromValue for Option<T> {
    fn from_value(value: &Value) -> Option<Self> {
        if value.is_null() { Some(None) } else { T::from_value(value).map(Some) }
    }
}
