//! YAML text to a tree in which every key and value knows its line and column.
//!
//! Owns syntax: anchors (copied, within a budget), duplicate keys, nesting depth. Knows no key of ours. Scalars are typed
//! by `serde_yaml`, so that a file and an override on the command line read alike; the events come from `saphyr-parser`
//! because `serde_yaml` keeps no positions.

use std::collections::HashMap;
use std::path::Path;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Tag};
use serde_yaml::Value;

use super::COMMAND_LINE;
use crate::error::{Error, Result};

/// Nesting a config may have; torchtune's have 3.
const MAX_DEPTH: usize = 64;
/// Most [`Node::weight`] of one config, aliases and interpolations copied: keeps a small file from becoming a large tree.
pub const MAX_WEIGHT: usize = 100_000;

/// Where a key or value was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Line and column, from 1.
    File {
        line: usize,
        column: usize,
    },
    CommandLine,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub tree: Tree,
    pub mark: Mark,
}

#[derive(Clone, Debug)]
pub enum Tree {
    /// Null, bool, number or string.
    Scalar(Value),
    List(Vec<Node>),
    Map(Vec<Entry>),
    /// A value already reported as wrong; nothing more is said about it.
    Broken,
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub key: String,
    pub key_mark: Mark,
    pub value: Node,
}

impl Node {
    pub fn scalar(value: Value, mark: Mark) -> Self {
        Self { tree: Tree::Scalar(value), mark }
    }

    pub fn map(mark: Mark) -> Self {
        Self { tree: Tree::Map(vec![]), mark }
    }

    /// Returns the entries of a mapping; none for anything else.
    pub fn entries(&self) -> &[Entry] {
        match &self.tree {
            Tree::Map(entries) => entries,
            _ => &[],
        }
    }

    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries().iter().find(|entry| entry.key == key)
    }

    /// Returns the value of a key, or the item of a list.
    pub fn child(&self, name: &str) -> Option<&Node> {
        match &self.tree {
            Tree::Map(_) => self.entry(name).map(|entry| &entry.value),
            Tree::List(items) => items.get(name.parse::<usize>().ok()?),
            _ => None,
        }
    }

    /// Returns the node at a dotted path (`a.b`, `a.0`).
    pub fn at(&self, path: &str) -> Option<&Node> {
        path.split('.').try_fold(self, |node, name| node.child(name))
    }

    pub fn as_str(&self) -> Option<&str> {
        match &self.tree {
            Tree::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    pub fn is_null(&self) -> bool {
        matches!(self.tree, Tree::Scalar(Value::Null))
    }

    pub fn is_map(&self) -> bool {
        matches!(self.tree, Tree::Map(_))
    }

    /// Says what this is, for `found …` in messages.
    pub fn describe(&self) -> String {
        match &self.tree {
            Tree::Scalar(Value::Null) => "null".into(),
            Tree::Scalar(Value::Bool(value)) => format!("`{value}`"),
            Tree::Scalar(Value::Number(value)) => format!("the number `{value}`"),
            Tree::Scalar(Value::String(text)) => format!("the text `{}`", shorten(text)),
            Tree::Scalar(_) | Tree::Broken => "a value that cannot be read".into(),
            Tree::List(_) => "a list".into(),
            Tree::Map(_) => "a mapping".into(),
        }
    }

    /// Returns the number of values below and including this one, a long text counted as several.
    pub fn weight(&self) -> usize {
        1 + match &self.tree {
            Tree::Scalar(Value::String(text)) => text.len() / 64,
            Tree::List(items) => items.iter().map(Node::weight).sum(),
            Tree::Map(entries) => entries.iter().map(|entry| entry.value.weight()).sum(),
            _ => 0,
        }
    }

    pub fn to_value(&self) -> Value {
        match &self.tree {
            Tree::Scalar(value) => value.clone(),
            Tree::List(items) => Value::Sequence(items.iter().map(Node::to_value).collect()),
            Tree::Map(entries) => Value::Mapping(
                entries.iter().map(|entry| (Value::String(entry.key.clone()), entry.value.to_value())).collect(),
            ),
            Tree::Broken => Value::Null,
        }
    }
}

/// Cuts a text for a message, on a character boundary.
fn shorten(text: &str) -> String {
    let mut chars = text.chars();
    let start: String = chars.by_ref().take(80).collect();
    let start = start.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'");
    if chars.next().is_some() { format!("{start}…") } else { start }
}

/// Types a plain scalar as `serde_yaml` does; `None` is null, as torchtune's configs write it.
pub fn plain(text: &str) -> Value {
    if text == "None" {
        return Value::Null;
    }
    // Only short text of these letters can be anything else than text; `12 # a` and `&a` are not read as YAML would.
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "+-._~".contains(c);
    if text.len() <= 64
        && text.chars().all(is_plain)
        && !["---", "..."].contains(&text)
        && let Ok(value @ (Value::Null | Value::Bool(_) | Value::Number(_))) = serde_yaml::from_str(text)
    {
        return value;
    }
    Value::String(text.to_owned())
}

/// Reads a config file's text: one document whose root is a mapping.
pub fn parse_config(text: &str, file: &Path) -> Result<Node> {
    let root = parse(text, file)?;
    if root.is_map() {
        return Ok(root);
    }
    let found = if root.is_null() { "nothing".into() } else { root.describe() };
    Err(locate(Error::config(format!("a config is a mapping of keys to values, found {found}")), file, root.mark)
        .hint("start from one of the files `host ls` lists"))
}

/// Reads one YAML document.
pub fn parse(text: &str, file: &Path) -> Result<Node> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut builder = Builder { file, stack: vec![], anchors: HashMap::new(), weight: 0, root: None, documents: 0 };
    for item in Parser::new_from_str(text) {
        match item {
            Ok((event, span)) => builder.event(event, span.start)?,
            Err(error) => return Err(not_yaml(text, file, *error.marker(), error.info())),
        }
    }
    Ok(builder.root.unwrap_or(Node::scalar(Value::Null, Mark::File { line: 1, column: 1 })))
}

fn not_yaml(text: &str, file: &Path, at: Marker, why: &str) -> Error {
    let error = Error::config("the config is not YAML");
    // The parser points at the value before a tab; the person has to find the tab.
    let lines = text.lines().enumerate().skip(at.line().saturating_sub(1));
    let tab = lines.filter(|_| why.contains("tab")).find_map(|(index, line)| {
        let indent = line.len() - line.trim_start().len();
        Some(Mark::File { line: index + 1, column: line[..indent].find('\t')? + 1 })
    });
    match tab {
        Some(mark) => locate(error, file, mark).cause("found a tab in the indentation").hint("indent with spaces"),
        None => locate(error, file, mark(at)).cause(why),
    }
}

pub fn locate(error: Error, file: &Path, mark: Mark) -> Error {
    match mark {
        Mark::File { line, column } => error.at(file, Some(line), Some(column)),
        Mark::CommandLine => error.at_file(COMMAND_LINE),
    }
}

fn mark(marker: Marker) -> Mark {
    Mark::File { line: marker.line(), column: marker.col() + 1 }
}

enum Frame {
    List { mark: Mark, anchor: usize, items: Vec<Node> },
    Map { mark: Mark, anchor: usize, entries: Vec<Entry>, key: Option<(String, Mark)> },
}

struct Builder<'a> {
    file: &'a Path,
    stack: Vec<Frame>,
    anchors: HashMap<usize, Node>,
    weight: usize,
    root: Option<Node>,
    documents: usize,
}

impl Builder<'_> {
    fn fail(&self, mark: Mark, message: impl Into<String>) -> Error {
        locate(Error::config(message), self.file, mark)
    }

    fn event(&mut self, event: Event<'_>, at: Marker) -> Result<()> {
        let mark = mark(at);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let node = Node::scalar(self.scalar(&text, style, tag.as_deref(), mark)?, mark);
                self.weight += node.weight();
                self.push(node, anchor)
            }
            Event::Alias(anchor) => {
                let Some(target) = self.anchors.get(&anchor) else {
                    return Err(self.fail(mark, "this alias stands inside its own anchor"));
                };
                let copy = Node { tree: target.tree.clone(), mark };
                self.weight += copy.weight();
                self.push(copy, 0)
            }
            Event::SequenceStart(anchor, tag) => {
                self.open(Frame::List { mark, anchor, items: vec![] }, tag.as_deref(), mark)
            }
            Event::MappingStart(anchor, tag) => {
                self.open(Frame::Map { mark, anchor, entries: vec![], key: None }, tag.as_deref(), mark)
            }
            Event::SequenceEnd | Event::MappingEnd => match self.stack.pop() {
                Some(Frame::List { mark, anchor, items }) => self.push(Node { tree: Tree::List(items), mark }, anchor),
                Some(Frame::Map { mark, anchor, entries, .. }) => {
                    self.push(Node { tree: Tree::Map(entries), mark }, anchor)
                }
                None => Ok(()),
            },
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(self.fail(mark, "a config is one YAML document, found a second one"));
                }
                Ok(())
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => Ok(()),
        }
    }

    fn scalar(&self, text: &str, style: ScalarStyle, tag: Option<&Tag>, mark: Mark) -> Result<Value> {
        self.check_tag(tag, mark)?;
        let is_text = style != ScalarStyle::Plain || tag.is_some_and(|tag| tag.suffix == "str");
        Ok(if is_text { Value::String(text.to_owned()) } else { plain(text) })
    }

    fn check_tag(&self, tag: Option<&Tag>, mark: Mark) -> Result<()> {
        const KNOWN: [&str; 7] = ["str", "int", "float", "bool", "null", "map", "seq"];
        match tag {
            Some(tag) if !tag.is_yaml_core_schema() || !KNOWN.contains(&tag.suffix.as_str()) => Err(self
                .fail(mark, format!("the tag `!{}` has no meaning in a config", tag.suffix))
                .hint("leave the tag out")),
            _ => Ok(()),
        }
    }

    fn open(&mut self, frame: Frame, tag: Option<&Tag>, mark: Mark) -> Result<()> {
        self.check_tag(tag, mark)?;
        if self.stack.len() >= MAX_DEPTH {
            return Err(self.fail(mark, format!("the config nests deeper than {MAX_DEPTH} levels")));
        }
        self.weight += 1;
        self.stack.push(frame);
        Ok(())
    }

    /// Puts a finished node where it belongs: the root, a list, a key or a key's value.
    fn push(&mut self, node: Node, anchor: usize) -> Result<()> {
        if self.weight > MAX_WEIGHT {
            return Err(self.fail(node.mark, format!("the config has more than {MAX_WEIGHT} values, aliases counted")));
        }
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let mark = node.mark;
        match self.stack.last_mut() {
            None => self.root = Some(node),
            Some(Frame::List { items, .. }) => items.push(node),
            Some(Frame::Map { entries, key, .. }) => match key.take() {
                Some((key, key_mark)) => entries.push(Entry { key, key_mark, value: node }),
                None => {
                    let Some(text) = key_text(&node) else {
                        let error = Error::config(format!("a key is a text, found {}", node.describe()));
                        return Err(locate(error, self.file, mark));
                    };
                    if let Some(earlier) = entries.iter().find(|entry| entry.key == text) {
                        let error = Error::config(format!("the key `{text}` stands twice in the same section"));
                        let error = locate(error, self.file, mark);
                        return Err(locate(error, self.file, earlier.key_mark).hint("keep one of the two"));
                    }
                    *key = Some((text, mark));
                }
            },
        }
        Ok(())
    }
}

fn key_text(node: &Node) -> Option<String> {
    match &node.tree {
        Tree::Scalar(Value::String(text)) => Some(text.clone()),
        Tree::Scalar(Value::Number(number)) => Some(number.to_string()),
        Tree::Scalar(Value::Bool(value)) => Some(value.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        parse(text, Path::new("c.yaml")).unwrap().to_value()
    }

    #[track_caller]
    fn check_error(text: &str, expected: &str) {
        let error = parse_config(text, Path::new("c.yaml")).expect_err("the text should be refused").to_string();
        assert!(error.contains(expected), "expected `{expected}` in:\n{error}");
    }

    #[test]
    fn scalars_are_typed_as_serde_yaml_types_them() {
        for text in [
            "1",
            "-3",
            "3e-4",
            "0x1F",
            "1_000",
            "00030",
            "~",
            "null",
            "True",
            "false",
            ".inf",
            "yes",
            "a b",
            "''",
            "'1'",
            "\"x\\n\"",
            "2024-01-01",
        ] {
            let ours = value(text);
            let theirs: Value = serde_yaml::from_str(text).unwrap();
            assert_eq!(ours, theirs, "{text}");
        }
        assert_eq!(value("None"), Value::Null);
        assert_eq!(value("!!str 5"), Value::String("5".into()));
    }

    #[test]
    fn trees_are_read_as_serde_yaml_reads_them() {
        let text = "a: &x\n  b: [1, two, {c: 3}]\n  d: |\n    text\n    more\ne: *x\nf: >-\n  one\n  two\n1: true\n";
        let theirs: Value = serde_yaml::from_str(&text.replace("1: true", "\"1\": true")).unwrap();
        assert_eq!(value(text), theirs);
    }

    #[test]
    fn every_value_knows_its_place() {
        let root = parse("a: 1\nb:\n  - x\n  -   {c: 2}\n", Path::new("c.yaml")).unwrap();
        assert_eq!(root.at("a").unwrap().mark, Mark::File { line: 1, column: 4 });
        assert_eq!(root.entry("b").unwrap().key_mark, Mark::File { line: 2, column: 1 });
        assert_eq!(root.at("b.1.c").unwrap().mark, Mark::File { line: 4, column: 11 });
    }

    #[test]
    fn what_is_not_a_config_is_refused_with_its_place() {
        check_error("", "found nothing");
        check_error("- a\n", "found a list\n  --> c.yaml:1:1");
        check_error("just words", "found the text `just words`");
        check_error("a: [1, 2", "the config is not YAML\n  --> c.yaml:");
        check_error("a: 1\n\tb: 2\n", "the config is not YAML\n  --> c.yaml:2:");
        check_error(
            "a: 1\nb: 2\na: 3\n",
            "the key `a` stands twice in the same section\n  --> c.yaml:3:1\n  --> c.yaml:1:1",
        );
        check_error("a: 1\n---\nb: 2\n", "found a second one");
        check_error("a: !!python/object:os.system x\n", "the tag `!python/object:os.system` has no meaning");
        check_error("a: !run x\n", "the tag `!run` has no meaning");
        check_error("? [a]\n: 1\n", "a key is a text, found a list");
        check_error("a: &x [*x]\n", "c.yaml:1:");
        check_error("a: *nobody\n", "the config is not YAML");
    }

    #[test]
    fn a_small_text_cannot_become_a_large_tree() {
        let mut laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for (name, earlier) in ('b'..='h').zip('a'..='g') {
            laughs += &format!("{name}: &{name} [{}]\n", vec![format!("*{earlier}"); 10].join(", "));
        }
        check_error(&laughs, "aliases counted");
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(100_000), ["*a"].repeat(1000).join(", "));
        check_error(&long, "aliases counted");
        check_error(&("a: ".to_owned() + &"[".repeat(100_000)), "c.yaml:1:");
    }

    proptest::proptest! {
        #[test]
        fn any_text_gives_a_tree_or_an_error(text in "([a-c*&!\\-?:{}\\[\\], \n\t'\"|>#~<%@]|\\PC){0,60}") {
            let _ = parse_config(&text, Path::new("c.yaml"));
        }
    }
}
