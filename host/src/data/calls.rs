//! The tool calls of an assistant's message: what their JSON says, in the forms that data sets and templates have them.
//!
//! A call is data until a format writes it: the tokens around it (`<tool_call>`) are the format's alone, and a special token
//! that its letters spell stays text, whoever wrote them.

use serde::Serialize;
use serde_json::{Map, Value};

use super::source::json_kind;
use crate::tokenizer::{SpecialTokens, python_json};

/// A call of a tool. Written as JSON it is `{"name": …, "arguments": {…}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Call {
    pub name: String,
    pub arguments: Map<String, Value>,
}

impl Call {
    /// Reads a call's text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let value = serde_json::from_str(text).map_err(|error| format!("is no JSON: {error}"))?;
        Self::of(&value)
    }

    /// Reads `{"name": …, "arguments": …}`, or OpenAI's object around it. The arguments may be a text of JSON.
    pub fn of(value: &Value) -> Result<Self, String> {
        let Value::Object(call) = value else { return Err(format!("is {}, not an object", json_kind(value))) };
        if let Some(function) = call.get("function") {
            return Self::of(function);
        }
        let lacks = |key: &str| {
            let keys: Vec<&str> = call.keys().map(String::as_str).collect();
            format!("has no `{key}`; its keys are `{}`", keys.join("`, `"))
        };
        let name = match call.get("name") {
            Some(Value::String(name)) if !name.is_empty() => name.clone(),
            Some(Value::String(_)) => return Err("has an empty `name`".to_owned()),
            Some(other) => return Err(format!("has {} for its `name`, where a text is needed", json_kind(other))),
            None => return Err(lacks("name")),
        };
        let parsed: Value;
        let arguments = match call.get("arguments").ok_or_else(|| lacks("arguments"))? {
            // What calls without arguments have instead.
            Value::String(text) if text.is_empty() => &Value::Null,
            Value::String(text) => {
                parsed =
                    serde_json::from_str(text).map_err(|error| format!("has `arguments` that are no JSON: {error}"))?;
                &parsed
            }
            other => other,
        };
        match arguments {
            Value::Null => Ok(Self { name, arguments: Map::new() }),
            Value::Object(arguments) => Ok(Self { name, arguments: arguments.clone() }),
            other => Err(format!("has {} for its `arguments`, where an object is needed", json_kind(other))),
        }
    }

    /// As models that were trained on `json.dumps` know it, the arguments under `key`.
    pub fn json(&self, key: &str) -> String {
        let name = python_json(&self.name);
        format!("{{\"name\": {name}, \"{key}\": {}}}", python_json(&self.arguments))
    }

    /// Marks the special tokens that its texts spell.
    pub fn mark(&mut self, special: &SpecialTokens) {
        special.mark(&mut self.name);
        let mut arguments = Value::Object(std::mem::take(&mut self.arguments));
        special.mark_json(&mut arguments);
        if let Value::Object(arguments) = arguments {
            self.arguments = arguments;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_the_same_call() {
        let expected = r#"{"name": "f", "arguments": {"b": 1, "a": ["é", null, 1e-07, 1e+16, 0.5, {}]}}"#;
        for text in [
            expected,
            r#"{"arguments":{"b":1,"a":["\u00e9",null,0.0000001,1e16,5e-1,{}]},"name":"f","id":"x"}"#,
            r#"{"type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": [\"é\", null, 1e-7, 1e16, 0.5, {}]}"}}"#,
        ] {
            assert_eq!(Call::parse(text).unwrap().json("arguments"), expected);
        }
        for text in [r#"{"name": "f", "arguments": ""}"#, r#"{"name": "f", "arguments": null}"#] {
            assert_eq!(Call::parse(text).unwrap().json("parameters"), r#"{"name": "f", "parameters": {}}"#);
        }
    }

    #[test]
    fn what_is_no_call_says_why() {
        for (text, expected) in [
            ("f()", "is no JSON: expected ident at line 1 column 2"),
            ("[]", "is a list, not an object"),
            ("{}", "has no `name`; its keys are ``"),
            (r#"{"name": "", "arguments": {}}"#, "has an empty `name`"),
            (r#"{"name": 3, "arguments": {}}"#, "has a number for its `name`, where a text is needed"),
            (r#"{"name": "f", "parameters": {}}"#, "has no `arguments`; its keys are `name`, `parameters`"),
            (r#"{"name": "f", "arguments": [1]}"#, "has a list for its `arguments`, where an object is needed"),
            (
                r#"{"name": "f", "arguments": "x=1"}"#,
                "has `arguments` that are no JSON: expected value at line 1 column 1",
            ),
        ] {
            assert_eq!(Call::parse(text).unwrap_err(), expected);
        }
    }
}
