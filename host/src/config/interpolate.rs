//! `${a.b}`: as a whole value (any type) and inside a text (scalars only). Paths count from the root of the config.
//!
//! `\${` is a literal `${`. OmegaConf's resolvers (`${oc.env:HOME}`) and relative paths are refused: a config cannot read
//! the environment.

use serde_yaml::Value;

use super::suggest;
use super::yaml::{Entry, MAX_WEIGHT, Mark, Node, Tree};

/// A mistake in one value, and where that value is written.
pub struct Mistake {
    pub mark: Mark,
    pub message: String,
    pub hint: Option<String>,
}

/// Replaces every interpolation. A value that cannot be resolved becomes [`Tree::Broken`] and a mistake.
pub fn resolve(root: &Node) -> (Node, Vec<Mistake>) {
    let mut resolver = Resolver { root, path: vec![], weight: 0, mistakes: vec![] };
    let node = resolver.node(root);
    (node, resolver.mistakes)
}

struct Resolver<'a> {
    root: &'a Node,
    /// The interpolations being followed, outermost first.
    path: Vec<String>,
    weight: usize,
    mistakes: Vec<Mistake>,
}

type Outcome<T> = Result<T, (String, Option<String>)>;

impl Resolver<'_> {
    fn node(&mut self, node: &Node) -> Node {
        self.weight += 1;
        let tree = match &node.tree {
            Tree::Scalar(Value::String(text)) if text.contains("${") => return self.text(text, node.mark),
            Tree::List(items) => Tree::List(items.iter().map(|item| self.node(item)).collect()),
            Tree::Map(entries) => Tree::Map(
                entries
                    .iter()
                    .map(|entry| Entry { value: self.node(&entry.value), key: entry.key.clone(), ..*entry })
                    .collect(),
            ),
            other => other.clone(),
        };
        Node { tree, mark: node.mark }
    }

    fn text(&mut self, text: &str, mark: Mark) -> Node {
        let tree = self.try_text(text).unwrap_or_else(|(message, hint)| {
            // A broken value is met again through each interpolation that leads to it.
            if !self.mistakes.iter().any(|earlier| earlier.mark == mark && earlier.message == message) {
                self.mistakes.push(Mistake { mark, message, hint });
            }
            Tree::Broken
        });
        Node { tree, mark }
    }

    fn try_text(&mut self, text: &str) -> Outcome<Tree> {
        let mut out = String::new();
        let mut rest = text;
        while let Some(start) = rest.find("${") {
            if let Some(before) = rest[..start].strip_suffix('\\') {
                out.push_str(before);
                out.push_str("${");
                rest = &rest[start + 2..];
                continue;
            }
            out.push_str(&rest[..start]);
            let inner = &rest[start + 2..];
            let end = inner.find('}').ok_or_else(|| {
                (
                    format!("`${{` without `}}` in `{text}`"),
                    Some("close it, or write `\\${` for the characters themselves".into()),
                )
            })?;
            let path = &inner[..end];
            rest = &inner[end + 1..];
            let tree = self.follow(path)?;
            if out.is_empty() && rest.is_empty() && start == 0 && text.starts_with("${") {
                return Ok(tree);
            }
            out.push_str(&scalar_text(&tree, path)?);
            self.weight += out.len() / 64;
            self.check_weight()?;
        }
        out.push_str(rest);
        Ok(Tree::Scalar(Value::String(out)))
    }

    /// Returns what a path stands for, its own interpolations replaced.
    fn follow(&mut self, written: &str) -> Outcome<Tree> {
        let path = normalise(written)?;
        if self.path.contains(&path) {
            let start = self.path.iter().position(|step| *step == path).unwrap_or(0);
            let cycle = self.path[start..].iter().chain([&path]).map(|step| format!("`{step}`")).collect::<Vec<_>>();
            let hint = "give one of them a value of its own".to_owned();
            return Err((format!("`${{{written}}}` leads back to itself: {}", cycle.join(" → ")), Some(hint)));
        }
        let root = self.root;
        let Some(target) = root.at(&path) else {
            return Err(unknown(root, &path));
        };
        self.weight += target.weight();
        self.check_weight()?;
        self.path.push(path);
        let node = self.node(target);
        self.path.pop();
        Ok(node.tree)
    }

    fn check_weight(&self) -> Outcome<()> {
        if self.weight > 2 * MAX_WEIGHT {
            return Err((format!("the interpolations make more than {MAX_WEIGHT} values of this config"), None));
        }
        Ok(())
    }
}

fn normalise(written: &str) -> Outcome<String> {
    let hint = || Some("write the path from the top of the config: `${section.key}`".to_owned());
    let path = written.trim();
    if path.contains(':') {
        return Err((format!("`${{{written}}}` calls a resolver, and a config cannot run anything"), hint()));
    }
    if path.starts_with('.') || path.is_empty() || path.contains("${") {
        return Err((format!("`${{{written}}}` is not a path"), hint()));
    }
    Ok(path.replace('[', ".").replace(']', ""))
}

fn unknown(root: &Node, path: &str) -> (String, Option<String>) {
    let mut node = root;
    let mut known = String::new();
    for name in path.split('.') {
        match node.child(name) {
            Some(child) => {
                node = child;
                known = format!("{known}{name}.");
            }
            None => {
                let hint = suggest::nearest(name, node.entries().iter().map(|entry| entry.key.as_str()))
                    .map(|near| format!("did you mean `${{{known}{near}}}`?"));
                return (format!("`${{{path}}}` names a key that is not in the config"), hint);
            }
        }
    }
    (format!("`${{{path}}}` names a key that is not in the config"), None)
}

fn scalar_text(tree: &Tree, path: &str) -> Outcome<String> {
    match tree {
        Tree::Scalar(Value::String(text)) => Ok(text.clone()),
        Tree::Scalar(Value::Bool(value)) => Ok(value.to_string()),
        Tree::Scalar(Value::Number(value)) => Ok(value.to_string()),
        Tree::Scalar(_) => Ok("null".into()),
        Tree::List(_) | Tree::Map(_) => Err((
            format!("`${{{path}}}` stands inside a text but is a section or a list"),
            Some("only a whole value can take a section or a list".into()),
        )),
        Tree::Broken => Ok(String::new()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::yaml;
    use super::*;

    fn run(text: &str) -> (Node, Vec<Mistake>) {
        resolve(&yaml::parse(text, Path::new("c.yaml")).unwrap())
    }

    #[track_caller]
    fn check(text: &str, path: &str, expected: &str) {
        let (root, mistakes) = run(text);
        assert!(mistakes.is_empty(), "{}", mistakes[0].message);
        assert_eq!(root.at(path).unwrap().to_value(), serde_yaml::from_str::<Value>(expected).unwrap());
    }

    #[track_caller]
    fn check_error(text: &str, expected: &[&str]) {
        let messages: Vec<_> =
            run(text).1.into_iter().map(|mistake| mistake.message + &mistake.hint.unwrap_or_default()).collect();
        assert_eq!(messages.len(), expected.len(), "{messages:?}");
        for (message, expected) in messages.iter().zip(expected) {
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
    }

    #[test]
    fn a_whole_value_keeps_its_type() {
        check("a: 3\nb: ${a}", "b", "3");
        check("a: {x: [1, 2]}\nb: ${a}", "b", "{x: [1, 2]}");
        check("a: {x: [1, 2]}\nb: ${a.x.1}\nc: ${a.x[0]}", "b", "2");
        check("a: ${b}\nb: ${c}\nc: null", "a", "null");
        check("a: {x: \"${b}\"}\nb: 1\nc: ${a}", "c.x", "1");
    }

    #[test]
    fn inside_a_text_it_becomes_text() {
        check("a: out\nb: ${a}/logs_${c}\nc: 3", "b", "out/logs_3");
        check("a: out\nb: \"${a} \"", "b", "\"out \"");
        check("b: 'cost \\${x}'", "b", "cost ${x}");
        check("a: true\nb: x${a}", "b", "xtrue");
    }

    #[test]
    fn what_leads_nowhere_is_a_mistake() {
        check_error("outpt: 1\nb: ${output}", &["did you mean `${outpt}`?"]);
        check_error("a: {lr: 1}\nb: ${a.rl}", &["names a key that is not in the config"]);
        check_error("a: ${oc.env:HOME}", &["calls a resolver"]);
        check_error("a: ${.b}", &["is not a path"]);
        check_error("a: ${b", &["`${` without `}`"]);
        check_error("a: [1]\nb: x${a}", &["stands inside a text but is a section or a list"]);
        check_error("a: ${b}\nb: ${a}", &["`b` → `a` → `b`", "`a` → `b` → `a`"]);
        check_error("a: ${a}", &["`a` → `a`"]);
        check_error("a: {b: {c: \"${a}\"}}", &["`a` → `a`"]);
        check_error("a: ${b}\nb: ${nobody}", &["`${nobody}`"]);
    }

    #[test]
    fn a_small_text_cannot_become_a_large_tree() {
        let mut text = "v0: [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..9 {
            text += &format!("v{level}: [{}]\n", vec![format!("\"${{v{}}}\"", level - 1); 10].join(", "));
        }
        assert!(run(&text).1.iter().any(|mistake| mistake.message.contains("more than")));
        let mut text = format!("v0: {}\n", "x".repeat(1000));
        for level in 1..9 {
            text += &format!("v{level}: \"{}\"\n", format!("${{v{}}}", level - 1).repeat(10));
        }
        assert!(run(&text).1.iter().any(|mistake| mistake.message.contains("more than")));
    }
}
