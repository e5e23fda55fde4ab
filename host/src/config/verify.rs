//! A config's tree against the registry: unknown keys and components, types, what is refused, what changes nothing.
//!
//! Knows no section by name: everything comes from the rows. What rows cannot say (two keys that need each other) is
//! `resolve`'s.

use serde_yaml::Value;

use super::registry::{self, Class, Component, Key, Role, Type};
use super::suggest;
use super::yaml::{self, Entry, Node, Tree};
use super::{Config, Notice};
use crate::error::Error;

/// What a pass over the tree found.
#[derive(Default)]
pub struct Findings {
    pub errors: Vec<Error>,
    pub notices: Vec<Notice>,
}

/// Checks a whole config against its top-level keys.
pub fn verify(config: &Config, keys: &'static [Key]) -> Findings {
    let mut verifier = Verifier { config, findings: Findings::default() };
    verifier.section(&config.root, &[keys], "", false);
    verifier.findings
}

struct Verifier<'a> {
    config: &'a Config,
    findings: Findings,
}

impl Verifier<'_> {
    fn fail(&mut self, error: Error) {
        self.findings.errors.push(error);
    }

    fn section(&mut self, node: &Node, groups: &[&'static [Key]], path: &str, is_component: bool) {
        for entry in node.entries() {
            if is_component && entry.key == "_component_" {
                continue;
            }
            match registry::find(groups, &entry.key) {
                Some(key) => self.entry(entry, key, &join(path, &entry.key)),
                // Held against the recipe's own words already.
                None if path.is_empty() && self.config.recipe_keys.contains(&entry.key) => {}
                None => self.unknown_key(entry, groups, path),
            }
        }
        for key in groups.iter().flat_map(|group| group.iter()) {
            if key.default.is_none() && node.entry(key.name).is_none() {
                let name = join(path, key.name);
                let example = match key.ty {
                    Type::Component(role) | Type::Components(role) => {
                        format!("`{name}: {{_component_: {}}}`", example(role))
                    }
                    ty => format!("`{name}` is {}", ty.expected()),
                };
                let error = self.config.error(node.mark, format!("the key `{name}` is missing"));
                self.fail(error.hint(format!("{example}: {}", uncapitalise(key.doc))));
            }
        }
    }

    fn unknown_key(&mut self, entry: &Entry, groups: &[&'static [Key]], path: &str) {
        let error = self.config.error(entry.key_mark, format!("unknown key `{}`", join(path, &entry.key)));
        let names =
            || groups.iter().flat_map(|group| group.iter()).filter(|key| !matches!(key.class, Class::Refused(_)));
        let own: &[String] = if path.is_empty() { &self.config.recipe_keys } else { &[] };
        let own = own.iter().map(String::as_str);
        let hint = if entry.key == "<<" {
            "write the keys out, or take a value from elsewhere with `${section.key}`".to_owned()
        } else if let Some(near) = suggest::nearest(&entry.key, names().map(|key| key.name).chain(own)) {
            format!("did you mean `{}`?", join(path, near))
        } else if groups.is_empty() {
            format!("`{path}` takes no further keys")
        } else {
            let is_of_use = |key: &&Key| matches!(key.class, Class::Honoured | Class::OfRecipe);
            let mut known: Vec<_> = names().filter(is_of_use).map(|key| key.name).collect();
            if known.is_empty() {
                known = names().map(|key| key.name).collect();
            }
            let of = if path.is_empty() { "the config".to_owned() } else { format!("`{path}`") };
            format!("keys of {of}: {}", known.join(", "))
        };
        self.fail(error.hint(hint));
    }

    fn entry(&mut self, entry: &Entry, key: &'static Key, path: &str) {
        let node = &entry.value;
        if matches!(node.tree, Tree::Broken) {
            return;
        }
        if let Class::Refused(why) = key.class {
            if !node.is_null() {
                self.fail(
                    self.config
                        .error(entry.key_mark, format!("`{path}` is not supported: {why}"))
                        .hint(format!("leave `{path}` out")),
                );
            }
            return;
        }
        if node.is_null() && key.nullable {
            return;
        }
        if !self.value(node, key, path) {
            return;
        }
        let is_default = key.default.is_some_and(|default| same(&node.to_value(), &yaml::plain(default)));
        match key.class {
            Class::Fixed(why) if !is_default => {
                let default = key.default.unwrap_or("null");
                let message = format!("`{path}` can only be `{default}`: {why}");
                self.fail(self.config.error(node.mark, message).hint(format!("set it to `{default}` or leave it out")));
            }
            Class::Satisfied(why) if !is_default => self.findings.notices.push(Notice {
                message: format!("`{path}` changes nothing here: {why}"),
                location: self.config.location(entry.key_mark),
            }),
            _ => {}
        }
    }

    /// Checks a value's type; says what is wrong and returns false when it does not fit.
    fn value(&mut self, node: &Node, key: &'static Key, path: &str) -> bool {
        match key.ty {
            Type::Component(role) => return self.component(node, role, path),
            Type::Components(role) => {
                let Tree::List(items) = &node.tree else { return self.component(node, role, path) };
                if items.is_empty() {
                    let error = self.config.error(node.mark, format!("`{path}` is an empty list"));
                    self.fail(error.hint(format!("give at least one {}", role.noun())));
                    return false;
                }
                // Every one is looked at.
                let each = items.iter().enumerate().map(|(index, item)| match item.tree {
                    Tree::Broken => false,
                    _ => self.component(item, role, &join(path, &index.to_string())),
                });
                return each.fold(true, |all, one| all & one);
            }
            Type::Template if node.entry("_component_").is_some() => return self.settings(node, path),
            Type::Section(keys) if node.is_map() => {
                self.section(node, &[keys], path, false);
                return true;
            }
            Type::Settings => return self.finite(node, path),
            _ => {}
        }
        if fits(node, &key.ty) {
            return true;
        }
        if let (Type::TextsOf(names), Tree::List(items)) = (&key.ty, &node.tree) {
            self.items(items, names, path);
            return false;
        }
        let expected = match (key.ty, node.to_value().as_u64()) {
            // Which goes without saying until somebody exceeds it.
            (Type::Count { max, .. }, Some(value)) if value > max => format!("at most {max}"),
            _ => key.ty.expected(),
        };
        let error = self.config.error(node.mark, format!("`{path}` must be {expected}, found {}", node.describe()));
        self.fail(error);
        false
    }

    /// Says which numbers are not finite: what guests are given knows no others.
    fn finite(&mut self, node: &Node, path: &str) -> bool {
        match &node.tree {
            Tree::Scalar(value) if value.as_f64().is_some_and(|value| !value.is_finite()) => {
                let what = format!("`{path}` must be a finite number, found {}", node.describe());
                self.fail(self.config.error(node.mark, what).hint("a recipe can be given a text in its place"));
                false
            }
            Tree::Scalar(_) | Tree::Broken => true,
            Tree::List(items) => {
                let each =
                    items.iter().enumerate().map(|(index, item)| self.finite(item, &join(path, &index.to_string())));
                each.fold(true, |all, one| all & one)
            }
            Tree::Map(entries) => {
                let each = entries.iter().map(|entry| self.finite(&entry.value, &join(path, &entry.key)));
                each.fold(true, |all, one| all & one)
            }
        }
    }

    /// Says which items of a list are none of `names`.
    fn items(&mut self, items: &[Node], names: &'static [&'static str], path: &str) {
        for item in items {
            let text = item.as_str().unwrap_or_default();
            if names.contains(&text) || matches!(item.tree, Tree::Broken) {
                continue;
            }
            let error = self.config.error(item.mark, format!("`{path}` cannot hold {}", item.describe()));
            self.fail(match suggest::nearest(text, names.iter().copied()) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint(format!("it is {}", Type::TextsOf(names).expected())),
            });
        }
    }

    fn component(&mut self, node: &Node, role: Role, path: &str) -> bool {
        let noun = role.noun();
        let example = example(role);
        if !node.is_map() {
            let error =
                self.config.error(node.mark, format!("`{path}` must be a section of keys, found {}", node.describe()));
            self.fail(error.hint(format!("`{path}: {{_component_: {example}}}`")));
            return false;
        }
        let Some(name) = node.entry("_component_") else {
            let error = self.config.error(node.mark, format!("`{path}` has no `_component_`, which names the {noun}"));
            self.fail(error.hint(format!("`{path}._component_: {example}`")));
            return false;
        };
        let Some(text) = name.value.as_str() else {
            if !matches!(name.value.tree, Tree::Broken) {
                let message =
                    format!("`{path}._component_` must name {}, found {}", role.a_noun(), name.value.describe());
                self.fail(self.config.error(name.value.mark, message).hint(format!("`{path}._component_: {example}`")));
            }
            return false;
        };
        if role == Role::Loss && registry::is_guest_path(text) {
            return self.settings(node, path);
        }
        match registry::component(text) {
            Some(component) if component.role == role => self.component_keys(node, name, component, path),
            Some(component) => {
                let message = format!("`{text}` is {}, and `{path}` needs {}", component.role.a_noun(), role.a_noun());
                self.fail(self.config.error(name.value.mark, message).hint(format!("`{path}._component_: {example}`")));
                false
            }
            None => {
                let error =
                    self.config.error(name.value.mark, format!("unknown {noun} `{text}` in `{path}._component_`"));
                let hint = match registry::similar(text, role) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => there_is(role),
                };
                self.fail(error.hint(hint));
                false
            }
        }
    }

    /// A guest's own keys, of which only the guest knows what they mean.
    fn settings(&mut self, node: &Node, path: &str) -> bool {
        let is_single = |entry: &&Entry| matches!(entry.value.tree, Tree::Scalar(_) | Tree::Broken);
        let is_finite = |entry: &Entry| entry.value.to_value().as_f64().is_none_or(f64::is_finite);
        let is_wrong = |entry: &&Entry| !is_single(entry) || !is_finite(entry);
        let found: Vec<&Entry> = node.entries().iter().filter(is_wrong).collect();
        for entry in &found {
            let found = entry.value.describe();
            let what = format!("`{}` must be a text, a flag or a finite number, found {found}", join(path, &entry.key));
            self.fail(self.config.error(entry.value.mark, what).hint("a guest's settings are single values"));
        }
        found.is_empty()
    }

    fn component_keys(&mut self, node: &Node, name: &Entry, component: &'static Component, path: &str) -> bool {
        if let Some(why) = component.refused {
            let message = format!("the {} `{}` is not supported: {why}", component.role.noun(), component.name);
            self.fail(self.config.error(name.value.mark, message).hint(there_is(component.role)));
            return false;
        }
        self.section(node, component.keys, path, true);
        true
    }
}

fn there_is(role: Role) -> String {
    if role == Role::Model {
        let families = registry::model_families().collect::<Vec<_>>().join(", ");
        return format!("models are built of {families}; `host keys` lists their names");
    }
    format!("there is: {}", registry::usable(role).collect::<Vec<_>>().join(", "))
}

fn example(role: Role) -> &'static str {
    match role {
        // What trains, and generates too.
        Role::Model => "lora_llama",
        _ => registry::usable(role).next().unwrap_or("name"),
    }
}

pub fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn uncapitalise(text: &str) -> String {
    let mut chars = text.trim_end_matches('.').chars();
    // "PEFT" and "AdamW" stay as they are.
    match (chars.next(), chars.clone().next()) {
        (Some(first), Some(second)) if second.is_lowercase() => first.to_lowercase().chain(chars).collect(),
        _ => text.trim_end_matches('.').to_owned(),
    }
}

/// Equal as a person reads it: `1` is `1.0`.
fn same(left: &Value, right: &Value) -> bool {
    match (left.as_f64(), right.as_f64()) {
        (Some(left), Some(right)) => left == right,
        _ => left == right,
    }
}

fn fits(node: &Node, ty: &Type) -> bool {
    let scalar = match &node.tree {
        Tree::Scalar(value) => value,
        Tree::List(items) => {
            return match ty {
                Type::Texts => items.iter().all(|item| item.as_str().is_some()),
                Type::TextsOf(names) => {
                    items.iter().all(|item| item.as_str().is_some_and(|text| names.contains(&text)))
                }
                other => matches!(other, Type::Any | Type::Template | Type::Settings),
            };
        }
        Tree::Map(_) => return matches!(ty, Type::Any | Type::Template | Type::Settings),
        Tree::Broken => return true,
    };
    match ty {
        Type::Bool => scalar.is_bool(),
        Type::Count { min, max } => scalar.as_u64().is_some_and(|value| (*min..=*max).contains(&value)),
        Type::Number { min, max } => {
            scalar.as_f64().is_some_and(|value| value.is_finite() && (*min..=*max).contains(&value))
        }
        Type::Text => scalar.as_str().is_some_and(|text| !text.is_empty()),
        Type::OneOf(names) => scalar.as_str().is_some_and(|text| names.contains(&text)),
        Type::Any | Type::Template | Type::Settings => true,
        Type::Texts | Type::TextsOf(_) | Type::Section(_) | Type::Component(_) | Type::Components(_) => false,
    }
}
