//! The config as a recipe sees it: what the file does not say has its default, and components their own names.

use serde_json::{Map, Value};

use super::super::registry::{self, Class, Key, Type};
use super::super::yaml::{self, Node, Tree};

/// A section with the defaults of `keys`. Keys that nothing here knows, such as a guest's, are as they stand.
pub fn filled(node: &Node, keys: &'static [Key]) -> Value {
    section(Some(node), &[keys])
}

fn section(node: Option<&Node>, groups: &[&'static [Key]]) -> Value {
    let entries = node.map_or(&[][..], Node::entries);
    let mut map: Map<String, Value> = entries
        .iter()
        .map(|entry| {
            let key = registry::find(groups, &entry.key);
            (entry.key.clone(), key.map_or_else(|| plain(&entry.value), |key| value(&entry.value, key)))
        })
        .collect();
    for key in
        groups.iter().flat_map(|group| group.iter()).filter(|key| !map.contains_key(key.name)).collect::<Vec<_>>()
    {
        // What is refused is not there at all.
        if let (Some(default), false) = (key.default, matches!(key.class, Class::Refused(_))) {
            let default = match key.ty {
                Type::Section(keys) => section(None, &[keys]),
                _ => to_json(yaml::plain(default)),
            };
            map.insert(key.name.to_owned(), default);
        }
    }
    Value::Object(map)
}

fn value(node: &Node, key: &Key) -> Value {
    match (key.ty, &node.tree) {
        (Type::Section(keys), Tree::Map(_)) => section(Some(node), &[keys]),
        (Type::Component(_) | Type::Components(_), Tree::Map(_)) => component(node),
        (Type::Components(_), Tree::List(items)) => Value::Array(items.iter().map(component).collect()),
        _ => plain(node),
    }
}

fn component(node: &Node) -> Value {
    let found = node.entry("_component_").and_then(|entry| registry::component(entry.value.as_str()?));
    let Some(component) = found else { return plain(node) };
    let mut filled = section(Some(node), component.keys);
    filled["_component_"] = component.name.into();
    filled
}

fn plain(node: &Node) -> Value {
    to_json(node.to_value())
}

fn to_json(value: serde_yaml::Value) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}
