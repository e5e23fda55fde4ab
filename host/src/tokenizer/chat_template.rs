//! The Jinja chat template that a checkpoint brings along, rendered as transformers renders it.
//!
//! The template is a stranger's text: it gets the messages and the names of the special tokens, no file and no clock, and a
//! limit on its steps. `strftime_now` always says 26 July 2024, the day that Llama's templates fall back on: a template
//! that writes the date would otherwise make other tokens of the same rows tomorrow, and a resumed run would go on with
//! other data than it began with.

use std::io;

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error as JinjaError, ErrorKind, context};
use serde::Serialize;
use serde_json::Value as Json;

use super::side_files::read_json;
use crate::config::plan::TokenizerPlan;
use crate::data::Call;
use crate::error::{Error, Result};

/// Steps of one rendering; a conversation of a thousand turns takes a hundredth of it.
const FUEL: u64 = 10_000_000;

#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// What tokenizer_config.json says beside the template: `bos_token` and the like.
    variables: serde_json::Map<String, Json>,
}

/// A message as templates know it. What it does not have is not there: templates ask for that.
#[derive(Clone, Debug, Serialize)]
pub struct ChatMessage {
    pub role: &'static str,
    /// None beside calls, as in what OpenAI's servers send.
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// Of a tool's answer: which call it answers, and whose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A call as templates know it.
#[derive(Clone, Debug, Serialize)]
pub struct ToolCall {
    pub id: String,
    pub r#type: &'static str,
    pub function: Call,
}

impl ChatTemplate {
    pub fn read(plan: &TokenizerPlan) -> Result<Self> {
        let folder = plan.path.parent().unwrap_or("".as_ref());
        let config_path = plan.tokenizer_config.clone().unwrap_or_else(|| folder.join("tokenizer_config.json"));
        let config = read_json(&config_path)?.unwrap_or(Json::Null);
        // Newer checkpoints keep it in a file of its own, which wins where the config names no other.
        let file = folder.join("chat_template.jinja");
        let named = plan.tokenizer_config.as_ref().and_then(|_| in_config(&config));
        let (path, source) = match std::fs::read_to_string(&file) {
            _ if named.is_some() => (config_path, named.unwrap_or_default()),
            Ok(source) => (file, source),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let source = in_config(&config).ok_or_else(|| {
                    Error::config(format!("there is no chat template beside `{}`", plan.path.display()))
                        .cause(format!("`{}` has no `chat_template`", config_path.display()))
                        .hint("a base model has none; `_component_: hf_tokenizer` with a `prompt_template` needs none")
                })?;
                (config_path, source)
            }
            Err(error) => {
                return Err(Error::config(format!("cannot read `{}`", file.display())).cause(error));
            }
        };
        let mut environment = Environment::new();
        // As transformers sets Jinja up.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| strftime(format));
        environment.add_filter("tojson", to_json);
        environment.set_fuel(Some(FUEL));
        environment.add_template_owned("chat_template", source.clone()).map_err(|error| {
            Error::config(format!("the chat template in `{}` cannot be read", path.display())).cause(one_line(&error))
        })?;
        let mut variables = serde_json::Map::new();
        for (key, value) in config.as_object().into_iter().flatten() {
            match value {
                Json::Object(token) => {
                    if let Some(text) = token.get("content").filter(|_| key.ends_with("_token")) {
                        variables.insert(key.clone(), text.clone());
                    }
                }
                Json::Array(_) => {}
                scalar => drop(variables.insert(key.clone(), scalar.clone())),
            }
        }
        variables.remove("chat_template");
        Ok(Self { environment, source, variables })
    }

    /// Everything that decides what is rendered.
    pub fn source(&self) -> String {
        format!("{}\0{}", self.source, Json::Object(self.variables.clone()))
    }

    /// The text of a conversation, with the beginning of an answer where one is asked for; or why there is none.
    pub fn render(&self, messages: &[ChatMessage], opens_answer: bool) -> Result<String, String> {
        let template = self.environment.get_template("chat_template").map_err(|error| one_line(&error))?;
        let given = context! {
            messages => messages,
            add_generation_prompt => opens_answer,
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let variables = Value::from_serialize(&self.variables);
        template.render(context! { ..given, ..variables }).map_err(|error| one_line(&error))
    }
}

/// One template, or several by name.
fn in_config(config: &Json) -> Option<String> {
    match config.get("chat_template")? {
        Json::String(source) => Some(source.clone()),
        Json::Array(templates) => {
            let default = templates.iter().find(|template| template["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

fn one_line(error: &JinjaError) -> String {
    let line = error.line().map(|line| format!("line {line} of the chat template: ")).unwrap_or_default();
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    format!("{line}{detail}")
}

/// `json.dumps(…, ensure_ascii=False)`: not Jinja's own, which escapes what HTML minds.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, JinjaError> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let text = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut text = vec![];
            let written = value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter));
            written.map_err(|error| JinjaError::new(ErrorKind::BadSerialization, error.to_string()))?;
            String::from_utf8_lossy(&text).into_owned()
        }
        None => python_json(value),
    };
    // Safe: not to be escaped again.
    Ok(Value::from_safe_string(text))
}

/// What Python's `json.dumps(value, ensure_ascii=False)` writes: the JSON that models have learnt to write and to read.
pub fn python_json(value: &impl Serialize) -> String {
    struct Python;
    impl serde_json::ser::Formatter for Python {
        fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
            if first { Ok(()) } else { writer.write_all(b", ") }
        }
        fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
            if first { Ok(()) } else { writer.write_all(b", ") }
        }
        fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
            writer.write_all(b": ")
        }
        fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
            let scientific = format!("{value:e}");
            let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
            match exponent.parse::<i32>() {
                Ok(exponent) if !(-4..16).contains(&exponent) => {
                    let sign = if exponent < 0 { '-' } else { '+' };
                    write!(writer, "{digits}e{sign}{:02}", exponent.abs())
                }
                _ => write!(writer, "{value:?}"),
            }
        }
    }
    let mut text = vec![];
    // Fails for no value that is made of JSON.
    let written = value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, Python));
    written.map(|()| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
}

/// Friday, 26 July 2024, midnight.
fn strftime(format: &str) -> Result<String, JinjaError> {
    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        text += match letters.next() {
            Some('d') => "26",
            Some('m') => "07",
            Some('y') => "24",
            Some('Y') => "2024",
            Some('b') => "Jul",
            Some('B') => "July",
            Some('a') => "Fri",
            Some('A') => "Friday",
            Some('H' | 'M' | 'S') => "00",
            Some('%') => "%",
            other => {
                let what = format!("`strftime_now` knows no `%{}`", other.map(String::from).unwrap_or_default());
                return Err(JinjaError::new(ErrorKind::InvalidOperation, what));
            }
        };
    }
    Ok(text)
}
