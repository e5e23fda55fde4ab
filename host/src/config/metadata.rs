//! What a guest says of itself: name, version, description, licence, and the keys that it reads of a config.
//!
//! It is TOML in static bytes, read without running any of the guest; [`crate::guest`] finds it in a file. Here it is
//! parsed, every mistake at the author's own line, and values are held against the keys.

use std::ops::Range;
use std::path::PathBuf;

use serde::Serialize;
use serde_yaml::Value;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::suggest;
use crate::error::{Error, Result, quoted};

/// The longest metadata of a guest.
pub const MAX_BYTES: usize = 64 << 10;
/// The longest name of a guest or of a key.
const MAX_NAME: usize = 64;

const FIELDS: [&str; 5] = ["name", "version", "description", "license", "keys"];
const KEY_FIELDS: [&str; 7] = ["type", "default", "min", "max", "choices", "required", "doc"];

/// The text of the metadata, and where its author wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub text: String,
    pub file: PathBuf,
    /// Line of `file` that the text begins in.
    pub line: usize,
    /// Columns of `file` before each line of the text.
    pub margin: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Metadata {
    pub name: Option<String>,
    pub version: Option<String>,
    pub description: Option<String>,
    pub license: Option<String>,
    /// The keys that it reads, in its author's order; a guest that names none takes any.
    pub keys: Vec<Key>,
}

/// One key that a guest reads of a config.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Key {
    pub name: String,
    #[serde(rename = "type")]
    pub ty: KeyType,
    pub required: bool,
    pub default: Option<Value>,
    pub min: Option<Value>,
    pub max: Option<Value>,
    /// Empty: any value of the type.
    pub choices: Vec<Value>,
    pub doc: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyType {
    Flag,
    Int,
    Num,
    Text,
}

impl KeyType {
    const ALL: [(&'static str, Self); 4] =
        [("flag", Self::Flag), ("int", Self::Int), ("num", Self::Num), ("text", Self::Text)];

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, ty)| *ty == self).map_or("", |(name, _)| name)
    }

    /// The value as a guest is given it, if it is of this type: a whole number is a number too.
    fn fit(self, value: &Value) -> Option<Value> {
        match self {
            Self::Flag => value.as_bool().map(Value::from),
            Self::Int => value.as_i64().map(Value::from),
            Self::Num => value.as_f64().filter(|number| number.is_finite()).map(Value::from),
            Self::Text => value.as_str().map(Value::from),
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Flag => "`True` or `False`",
            Self::Int => "a whole number",
            Self::Num => "a number",
            Self::Text => "a text",
        }
    }

    fn is_number(self) -> bool {
        matches!(self, Self::Int | Self::Num)
    }
}

impl Key {
    /// The value as the guest is given it; none where it is not what the key takes.
    pub fn fit(&self, value: &Value) -> Option<Value> {
        let value = self.ty.fit(value)?;
        let is_from = self.min.as_ref().is_none_or(|min| !is_below(&value, min));
        let is_to = self.max.as_ref().is_none_or(|max| !is_below(max, &value));
        let is_choice = self.choices.is_empty() || self.choices.contains(&value);
        (is_from && is_to && is_choice).then_some(value)
    }

    /// Says what is needed, for `… must be …`.
    pub fn expected(&self) -> String {
        if !self.choices.is_empty() {
            return format!("one of {}", quoted(self.choices.iter().map(shown)));
        }
        let what = self.ty.expected();
        match (self.min.as_ref().map(shown), self.max.as_ref().map(shown)) {
            (Some(min), Some(max)) => format!("{what} from {min} to {max}"),
            (Some(min), None) => format!("{what}, at least {min}"),
            (None, Some(max)) => format!("{what}, at most {max}"),
            (None, None) => what.to_owned(),
        }
    }
}

impl Metadata {
    /// Settings as a run gives them to a guest: every key that it names, by default where they say nothing.
    pub fn settings(&self, given: &serde_json::Map<String, serde_json::Value>) -> Result<serde_json::Value> {
        let to_json = |value: &Value| serde_json::to_value(value).unwrap_or_default();
        if self.keys.is_empty() {
            return Ok(given.clone().into());
        }
        if let Some(name) = given.keys().find(|name| !self.keys.iter().any(|key| key.name == **name)) {
            let names = quoted(self.keys.iter().map(|key| &key.name));
            return Err(Error::config(format!("the guest has no key `{name}`")).hint(format!("it has {names}")));
        }
        let mut settings = serde_json::Map::new();
        for key in &self.keys {
            let value = match given.get(&key.name).filter(|value| !value.is_null()) {
                Some(value) => serde_yaml::to_value(value).ok().and_then(|value| key.fit(&value)),
                None if key.required => None,
                None => Some(key.default.clone().unwrap_or_default()),
            };
            let value = value.ok_or_else(|| Error::config(format!("`{}` must be {}", key.name, key.expected())))?;
            settings.insert(key.name.clone(), to_json(&value));
        }
        Ok(settings.into())
    }
}

/// Both are of one type by then.
fn is_below(value: &Value, other: &Value) -> bool {
    match (value.as_i64(), other.as_i64(), value.as_f64(), other.as_f64()) {
        (Some(value), Some(other), ..) => value < other,
        (_, _, Some(value), Some(other)) => value < other,
        _ => false,
    }
}

/// A value as a config writes it.
pub fn shown(value: &Value) -> String {
    match value {
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => "null".into(),
    }
}

/// Reads the metadata; every mistake in it is reported.
pub fn parse(source: &Source) -> Result<Metadata> {
    if source.text.len() > MAX_BYTES {
        let (bytes, file) = (source.text.len(), source.file.display());
        return Err(Error::config(format!("the metadata of `{file}` has {bytes} bytes, and it may have {MAX_BYTES}")));
    }
    let mut parser = Parser { source, mistakes: vec![] };
    let metadata = match DeTable::parse(&source.text) {
        Ok(table) => parser.metadata(table.get_ref()),
        Err(error) => {
            let what = format!("the metadata of `{}` is not TOML", source.file.display());
            let why = error.message().replace('\n', ", ");
            parser.mistakes.push(source.error(error.span().unwrap_or_default(), what).cause(why));
            Metadata::default()
        }
    };
    Error::all(parser.mistakes).map_or(Ok(metadata), Err)
}

impl Source {
    fn error(&self, at: Range<usize>, message: impl Into<String>) -> Error {
        let before = self.text.get(..at.start).unwrap_or(&self.text);
        let line = self.line + before.matches('\n').count();
        let column = self.margin + before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Error::config(message).at(&self.file, Some(line), Some(column))
    }
}

struct Parser<'a> {
    source: &'a Source,
    mistakes: Vec<Error>,
}

type Item<'a, 'i> = (&'a str, Range<usize>, &'a Spanned<DeValue<'i>>);

impl Parser<'_> {
    fn fail(&mut self, at: Range<usize>, message: String, hint: impl Into<String>) {
        self.mistakes.push(self.source.error(at, message).hint(hint));
    }

    fn metadata(&mut self, table: &DeTable<'_>) -> Metadata {
        let mut metadata = Metadata::default();
        for (name, at, value) in in_order(table) {
            match name {
                "name" => metadata.name = self.name(name, value),
                "version" => metadata.version = self.text(name, value),
                "description" => metadata.description = self.text(name, value),
                "license" => metadata.license = self.text(name, value),
                "keys" => {
                    let Some(keys) = value.get_ref().as_table() else {
                        self.wrong_type("keys", value, "a table", "`[keys.gamma]`, then `type = \"num\"`");
                        continue;
                    };
                    metadata.keys = in_order(keys).into_iter().filter_map(|key| self.key(key)).collect();
                }
                _ => self.unknown(name, at, &FIELDS, "metadata"),
            }
        }
        metadata
    }

    fn key(&mut self, (name, at, value): Item<'_, '_>) -> Option<Key> {
        let is_plain = |name: &str| {
            name.len() <= MAX_NAME
                && name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        if !is_plain(name) {
            let what = format!("a key cannot be called `{}`", name.escape_debug());
            let hint = format!("its name is lower-case letters, digits and `_`, at most {MAX_NAME}");
            self.fail(at, what, hint);
            return None;
        }
        let path = |field: &str| format!("keys.{name}.{field}");
        let Some(fields) = value.get_ref().as_table() else {
            self.wrong_type(&format!("keys.{name}"), value, "a table", &format!("`[keys.{name}]`, then `type = …`"));
            return None;
        };
        let fields = in_order(fields);
        let field = |wanted: &str| fields.iter().find(|(name, ..)| *name == wanted).map(|(_, _, value)| *value);
        for (name, at, _) in &fields {
            if !KEY_FIELDS.contains(name) {
                self.unknown(name, at.clone(), &KEY_FIELDS, "a key");
            }
        }
        let names = KeyType::ALL.map(|(name, _)| name);
        let Some(ty) = field("type") else {
            self.fail(at, format!("the key `{name}` has no `type`"), format!("it is one of {}", quoted(names)));
            return None;
        };
        let named = ty.get_ref().as_str();
        let Some((_, ty)) = KeyType::ALL.into_iter().find(|(name, _)| named == Some(*name)) else {
            let expected = format!("one of {}", quoted(names));
            self.wrong_type(&path("type"), ty, &expected, "`type = \"num\"`");
            return None;
        };
        let mut key = Key {
            name: name.into(),
            ty,
            required: false,
            default: None,
            min: None,
            max: None,
            choices: vec![],
            doc: None,
        };
        for (name, bound) in [("min", &mut key.min), ("max", &mut key.max)] {
            if let Some(value) = field(name) {
                match ty.is_number() {
                    true => *bound = self.value(&path(name), value, ty),
                    false => self.fail(
                        value.span(),
                        format!("`{}` bounds a {}, which has no order", path(name), ty.name()),
                        format!("remove `{name}`"),
                    ),
                }
            }
        }
        if let (Some(min), Some(max)) = (&key.min, &key.max)
            && is_below(max, min)
        {
            self.fail(
                at.clone(),
                format!("the key `{name}` is at least {} and at most {}", shown(min), shown(max)),
                "swap `min` and `max`",
            );
        }
        if let Some(value) = field("choices") {
            key.choices = match value.get_ref().as_array() {
                Some(items) if !items.is_empty() => {
                    items.iter().filter_map(|item| self.value(&path("choices"), item, ty)).collect()
                }
                _ => {
                    let expected = format!("a list of {}s", ty.name());
                    self.wrong_type(&path("choices"), value, &expected, "`choices = [\"a\", \"b\"]`");
                    vec![]
                }
            };
        }
        if let Some(value) = field("doc") {
            key.doc = self.text(&path("doc"), value);
        }
        if let Some(value) = field("required") {
            match value.get_ref().as_bool() {
                Some(required) => key.required = required,
                None => self.wrong_type(&path("required"), value, "`true` or `false`", "`required = true`"),
            }
        }
        if let Some(value) = field("default")
            && let Some(default) = self.value(&path("default"), value, ty)
        {
            if key.fit(&default).is_none() {
                let what = format!("`{}` must be {}, found {}", path("default"), key.expected(), shown(&default));
                self.fail(value.span(), what, "a default is what a config may write too");
            }
            key.default = Some(default);
        }
        if key.required && key.default.is_some() {
            let what = format!("the key `{name}` is required and has a default");
            self.fail(at, what, "remove `required` or `default`");
        }
        Some(key)
    }

    /// A value of a key's type.
    fn value(&mut self, path: &str, value: &Spanned<DeValue<'_>>, ty: KeyType) -> Option<Value> {
        let plain = match value.get_ref() {
            DeValue::Boolean(flag) => Value::from(*flag),
            DeValue::Integer(int) => i64::from_str_radix(int.as_str(), int.radix()).map_or(Value::Null, Value::from),
            DeValue::Float(float) => float.as_str().parse::<f64>().map_or(Value::Null, Value::from),
            DeValue::String(text) => Value::from(text.as_ref()),
            _ => Value::Null,
        };
        let fit = ty.fit(&plain);
        match &fit {
            None => self.wrong_type(path, value, ty.expected(), &format!("the key's type is `{}`", ty.name())),
            Some(Value::String(text)) => self.check_text(path, value.span(), text),
            Some(_) => {}
        }
        fit
    }

    fn name(&mut self, path: &str, value: &Spanned<DeValue<'_>>) -> Option<String> {
        let name = self.text(path, value)?;
        if name.is_empty() || name.len() > MAX_NAME {
            let what = format!("`{path}` has {} characters", name.chars().count());
            self.fail(value.span(), what, format!("a name has 1 to {MAX_NAME}"));
        }
        Some(name)
    }

    fn text(&mut self, path: &str, value: &Spanned<DeValue<'_>>) -> Option<String> {
        let Some(text) = value.get_ref().as_str() else {
            let field = path.rsplit('.').next().unwrap_or(path);
            self.wrong_type(path, value, "a text", &format!("`{field} = \"…\"`"));
            return None;
        };
        self.check_text(path, value.span(), text);
        Some(text.trim().to_owned())
    }

    /// It is printed on terminals.
    fn check_text(&mut self, path: &str, at: Range<usize>, text: &str) {
        if let Some(control) = text.chars().find(|c| c.is_control() && *c != '\n') {
            let what = format!("`{path}` holds the control character `{}`", control.escape_unicode());
            self.fail(at, what, "a text is letters, digits and signs");
        }
    }

    fn wrong_type(&mut self, path: &str, value: &Spanned<DeValue<'_>>, expected: &str, hint: &str) {
        let found = match value.get_ref() {
            DeValue::String(text) => format!("the text `{}`", text.chars().take(80).collect::<String>().escape_debug()),
            DeValue::Integer(int) => format!("the number `{int}`"),
            DeValue::Float(float) => format!("the number `{}`", float.as_str()),
            DeValue::Boolean(flag) => format!("`{flag}`"),
            DeValue::Datetime(_) => "a date".to_owned(),
            DeValue::Array(_) => "a list".to_owned(),
            DeValue::Table(_) => "a table".to_owned(),
        };
        self.fail(value.span(), format!("the metadata's `{path}` must be {expected}, found {found}"), hint);
    }

    fn unknown(&mut self, name: &str, at: Range<usize>, known: &[&'static str], of: &str) {
        let what = format!("{of} has no field `{}`", name.escape_debug());
        let hint = match suggest::nearest(name, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("there are {}", quoted(known)),
        };
        self.fail(at, what, hint);
    }
}

/// The entries of a table as they were written; TOML's own order is the alphabet's.
fn in_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<Item<'a, 'i>> {
    let mut items: Vec<_> = table.iter().map(|(key, value)| (key.get_ref().as_ref(), key.span(), value)).collect();
    items.sort_by_key(|(_, at, _)| at.start);
    items
}
