//! Overrides on the command line: `a.b=value`, `a=component`, `~a.b`.
//!
//! Values are typed as in the file; only what starts like a list, a mapping or a quoted text is read as YAML, so that
//! `prompt=a: b` and `x=#1` need no quoting beyond the shell's. They are applied in the order given.

use std::path::Path;

use serde_yaml::Value;

use super::yaml::{self, Entry, Mark, Node, Tree};
use super::{COMMAND_LINE, registry, suggest};
use crate::error::{Error, Result};

enum Override<'a> {
    Set { path: &'a str, value: Node },
    Delete { path: &'a str },
}

/// Applies overrides to the tree, in order; returns the mistakes.
pub fn apply(root: &mut Node, arguments: &[String]) -> Vec<Error> {
    let mut mistakes = Vec::new();
    let mut replaced = Vec::new();
    for argument in arguments {
        let applied = parse(argument).and_then(|parsed| match parsed {
            Override::Set { path, value } => {
                if value.as_str().is_some() {
                    let section = path.strip_suffix("._component_").unwrap_or(path);
                    replaced.push((section, component_of(root, section)));
                }
                set(root, path, value, argument)
            }
            Override::Delete { path } => delete(root, path, argument),
        });
        mistakes.extend(applied.err());
    }
    // Last, because a key may be deleted that goes with its component.
    for (path, old) in replaced {
        drop_stale(root, path, old.as_deref());
    }
    mistakes
}

/// What a section names as its component, before it is replaced.
fn component_of(root: &mut Node, path: &str) -> Option<String> {
    Some(at_mut(root, path)?.entry("_component_")?.value.as_str()?.to_owned())
}

/// What the file says for a component that the command line replaced stays only where the new one has such a key: an
/// optimizer keeps its `lr`, a data set loses the columns of the old one. What neither knows stays too, to be reported.
/// torchtune keeps all, and stumbles over the rest.
fn drop_stale(root: &mut Node, path: &str, old: Option<&str>) {
    let Some(Tree::Map(entries)) = at_mut(root, path).map(|node| &mut node.tree) else { return };
    let name = entries.iter().find(|entry| entry.key == "_component_").and_then(|entry| entry.value.as_str());
    let Some(new) = name.and_then(registry::component) else { return };
    let old = old.and_then(registry::component);
    if old.is_some_and(|old| old.name == new.name) {
        return;
    }
    entries.retain_mut(|entry| {
        let name = entry.key.as_str();
        if name == "_component_" || entry.key_mark == Mark::CommandLine {
            return true;
        }
        // The names in it are the old data set's.
        if name == "column_map"
            && let Tree::Map(columns) = &mut entry.value.tree
        {
            columns.retain(|column| column.key_mark == Mark::CommandLine);
            return !columns.is_empty();
        }
        let was_of_old = old.is_none_or(|old| old.key(name).is_some());
        let is_of_new = new.key(name).is_some_and(|key| !matches!(key.class, registry::Class::Refused(_)));
        is_of_new || !was_of_old
    });
}

fn fail(argument: &str, message: impl Into<String>) -> Error {
    Error::config(message).at_file(format!("{COMMAND_LINE}: {argument}"))
}

fn parse(argument: &str) -> Result<Override<'_>> {
    if let Some(path) = argument.strip_prefix('~') {
        if path.contains('=') {
            return Err(
                fail(argument, "`~` deletes a key and takes no value").hint(format!("write `~{}`", before(path)))
            );
        }
        check_path(path, argument)?;
        return Ok(Override::Delete { path });
    }
    let Some((path, text)) = argument.split_once('=') else {
        return Err(fail(argument, format!("the override `{argument}` has no `=`"))
            .hint("`key=value` sets a key, `~key` deletes one"));
    };
    check_path(path, argument)?;
    let value = parse_value(path, text).map_err(|cause| {
        fail(argument, format!("the value of `{path}` is not YAML"))
            .cause(cause)
            .hint("quote it for YAML: \"key='[text'\"")
    })?;
    Ok(Override::Set { path, value })
}

fn before(path: &str) -> &str {
    path.split('=').next().unwrap_or(path)
}

fn check_path(path: &str, argument: &str) -> Result<()> {
    if path.split('.').any(|name| name.trim().is_empty()) {
        return Err(
            fail(argument, format!("`{path}` is not a key: keys are names joined by dots")).hint("`optimizer.lr=1e-4`")
        );
    }
    Ok(())
}

fn parse_value(path: &str, text: &str) -> Result<Node, String> {
    let text = text.trim();
    // torchtune keeps "00030" a text under this name, whatever it looks like.
    if path.rsplit('.').next().is_some_and(|name| name.contains("max_filename")) {
        return Ok(Node::scalar(Value::String(text.trim_matches(['"', '\'']).to_owned()), Mark::CommandLine));
    }
    if !text.starts_with(['[', '{', '"', '\'']) {
        return Ok(Node::scalar(yaml::plain(text), Mark::CommandLine));
    }
    let mut node =
        yaml::parse(text, Path::new("")).map_err(|error| error.causes.first().unwrap_or(&error.message).clone())?;
    mark_command_line(&mut node);
    Ok(node)
}

fn mark_command_line(node: &mut Node) {
    node.mark = Mark::CommandLine;
    match &mut node.tree {
        Tree::List(items) => items.iter_mut().for_each(mark_command_line),
        Tree::Map(entries) => entries.iter_mut().for_each(|entry| {
            entry.key_mark = Mark::CommandLine;
            mark_command_line(&mut entry.value);
        }),
        Tree::Scalar(_) | Tree::Broken => {}
    }
}

fn set(node: &mut Node, path: &str, value: Node, argument: &str) -> Result<()> {
    let (name, rest) = match path.split_once('.') {
        Some((name, rest)) => (name, Some(rest)),
        None => (path, None),
    };
    let slot = slot(node, name, argument)?;
    match rest {
        Some(rest) => set(slot, rest, value, argument),
        None => {
            replace(slot, value);
            Ok(())
        }
    }
}

/// Returns the place of a key, made when it is not there.
fn slot<'a>(node: &'a mut Node, name: &str, argument: &str) -> Result<&'a mut Node> {
    if node.is_null() || matches!(node.tree, Tree::Broken) {
        *node = Node::map(Mark::CommandLine);
    }
    let found = node.describe();
    match &mut node.tree {
        Tree::List(items) => {
            let num_items = items.len();
            name.parse::<usize>().ok().and_then(|index| items.get_mut(index)).ok_or_else(|| {
                fail(argument, format!("`{name}` is not an item of a list that has {num_items}"))
                    .hint("items count from 0")
            })
        }
        Tree::Map(entries) => {
            let index = entries.iter().position(|entry| entry.key == name).unwrap_or_else(|| {
                let value = Node::scalar(Value::Null, Mark::CommandLine);
                entries.push(Entry { key: name.to_owned(), key_mark: Mark::CommandLine, value });
                entries.len() - 1
            });
            Ok(&mut entries[index].value)
        }
        _ => {
            Err(fail(argument, format!("`{name}` cannot be set below {found}"))
                .hint("give the whole section: `key={…}`"))
        }
    }
}

/// A text put on a section with a `_component_` names another component; everything else replaces what was there.
fn replace(slot: &mut Node, value: Node) {
    if value.as_str().is_some()
        && let Tree::Map(entries) = &mut slot.tree
        && let Some(component) = entries.iter_mut().find(|entry| entry.key == "_component_")
    {
        component.key_mark = Mark::CommandLine;
        component.value = value;
        return;
    }
    *slot = value;
}

fn delete(root: &mut Node, path: &str, argument: &str) -> Result<()> {
    let (parent, name) = path.rsplit_once('.').unwrap_or(("", path));
    let missing = |known: Vec<&str>| {
        let error = fail(argument, format!("`{path}` is not in the config, so it cannot be deleted"));
        match suggest::nearest(name, known) {
            Some(near) if parent.is_empty() => error.hint(format!("did you mean `~{near}`?")),
            Some(near) => error.hint(format!("did you mean `~{parent}.{near}`?")),
            None => error,
        }
    };
    let Some(section) = at_mut(root, parent) else {
        return Err(missing(vec![]));
    };
    match &mut section.tree {
        Tree::Map(entries) => match entries.iter().position(|entry| entry.key == name) {
            Some(index) => drop(entries.remove(index)),
            None => return Err(missing(entries.iter().map(|entry| entry.key.as_str()).collect())),
        },
        Tree::List(items) => match name.parse::<usize>().ok().filter(|index| *index < items.len()) {
            Some(index) => drop(items.remove(index)),
            None => return Err(missing(vec![])),
        },
        _ => return Err(missing(vec![])),
    }
    // A section whose last key goes, goes too.
    if !parent.is_empty() && matches!(&section.tree, Tree::Map(entries) if entries.is_empty()) {
        return delete(root, parent, argument);
    }
    Ok(())
}

fn at_mut<'a>(node: &'a mut Node, path: &str) -> Option<&'a mut Node> {
    if path.is_empty() {
        return Some(node);
    }
    path.split('.').try_fold(node, |node, name| match &mut node.tree {
        Tree::Map(entries) => entries.iter_mut().find(|entry| entry.key == name).map(|entry| &mut entry.value),
        Tree::List(items) => items.get_mut(name.parse::<usize>().ok()?),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "epochs: 1\nmodel: {_component_: llama, rank: 8}\nfiles: [a, b]\nnested: {one: {two: 2}}\nnothing: null\n\
         data: {_component_: alpaca_dataset, source: x, train_on_input: true, typo: 1, column_map: {input: a}}\n";

    fn applied(arguments: &[&str]) -> Result<Node> {
        let mut root = yaml::parse(CONFIG, Path::new("c.yaml")).unwrap();
        let arguments: Vec<String> = arguments.iter().map(|argument| argument.to_string()).collect();
        Error::all(apply(&mut root, &arguments)).map_or(Ok(root), Err)
    }

    #[track_caller]
    fn check(arguments: &[&str], path: &str, expected: &str) {
        let root = applied(arguments).unwrap();
        let found = root.at(path).map(Node::to_value);
        let expected = (expected != "absent").then(|| serde_yaml::from_str::<Value>(expected).unwrap());
        assert_eq!(found, expected, "{arguments:?}");
    }

    #[track_caller]
    fn check_error(argument: &str, expected: &str) {
        let error = applied(&[argument]).expect_err("the override should be refused").to_string();
        assert!(error.contains(expected), "expected `{expected}` in:\n{error}");
    }

    #[test]
    fn sets_typed_values() {
        check(&["epochs=3"], "epochs", "3");
        check(&["epochs=3e-4"], "epochs", "3e-4");
        check(&["epochs=True"], "epochs", "true");
        check(&["epochs="], "epochs", "null");
        check(&["epochs='3'"], "epochs", "'3'");
        check(&["epochs=\"a = b\""], "epochs", "a = b");
        check(&["epochs=[1, x,{a: 2}]"], "epochs", "[1, x, {a: 2}]");
        check(&["split=train[:2000]"], "split", "'train[:2000]'");
        for text in ["# Title", "12 # foo", "&a", "---", "!!int 3", "..."] {
            check(&[&format!("prompt={text}")], "prompt", &format!("'{text}'"));
        }
        check(&["prompt=note: use #1 = best"], "prompt", "'note: use #1 = best'");
        check(&["a.b.c=1"], "a", "{b: {c: 1}}");
        check(&["nothing.x=1"], "nothing.x", "1");
        check(&["files.1=c"], "files", "[a, c]");
        check(&["x.max_filename=00030"], "x.max_filename", "'00030'");
        check(&["x.max_filename=30"], "x.max_filename", "'30'");
    }

    #[test]
    fn a_text_on_a_component_names_another() {
        check(&["model=other"], "model", "{_component_: other, rank: 8}");
        // What a component that is known has no key for goes; what the command line set stays for `verify` to judge.
        check(&["data=text_completion_dataset"], "data", "{_component_: text_completion_dataset, source: x, typo: 1}");
        check(&["data._component_=wikitext_dataset"], "data", "{_component_: wikitext_dataset, source: x, typo: 1}");
        let kept = "{_component_: chat_dataset, source: x, train_on_input: true, typo: 1}";
        check(&["data=chat_dataset"], "data", kept);
        let mapped =
            "{_component_: instruct_dataset, source: x, train_on_input: true, typo: 1, column_map: {output: b}}";
        check(&["data=instruct_dataset", "data.column_map.output=b"], "data", mapped);
        let same = "{_component_: alpaca_dataset, source: x, train_on_input: true, typo: 1, column_map: {input: a}}";
        check(&["data=alpaca_dataset"], "data", same);
        check(&["model.x=1", "model=lora_llama"], "model", "{_component_: lora_llama, rank: 8, x: 1}");
        check(&["model=lora_llama", "~model.rank"], "model", "{_component_: lora_llama}");
        check(&["model={_component_: other}"], "model", "{_component_: other}");
        check(&["model=null"], "model", "null");
        check(&["nested=text"], "nested", "text");
    }

    #[test]
    fn deletes_a_key_and_the_section_it_empties() {
        check(&["~epochs"], "epochs", "absent");
        check(&["~nested.one.two"], "nested", "absent");
        check(&["~model.rank"], "model", "{_component_: llama}");
        check(&["~files.0"], "files", "[b]");
    }

    #[test]
    fn refuses_what_it_cannot_mean() {
        check_error("epochs", "has no `=`\n  --> command line: epochs\nhint: `key=value` sets a key");
        check_error("=3", "is not a key");
        check_error("a..b=3", "is not a key");
        check_error("~epochs=3", "write `~epochs`");
        check_error("~epoch", "did you mean `~epochs`?");
        check_error("~model.rnk", "did you mean `~model.rank`?");
        check_error("~epochs.deep", "is not in the config");
        check_error("epochs.x=1", "`x` cannot be set below the number `1`");
        check_error("files.7=c", "a list that has 2");
        check_error("epochs=[1", "the value of `epochs` is not YAML");
    }
}
