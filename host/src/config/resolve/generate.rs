//! A generation config to a [`GeneratePlan`].

use std::path::Path;

use super::super::Config;
use super::super::plan::{GeneratePlan, PromptPlan};
use super::super::registry::keys::GENERATE;
use super::super::section::{Found, Reader, Reported, Section};
use super::super::yaml::{Mark, Node, Tree};
use super::{Resolved, Surroundings, parts, resolve};
use crate::error::Result;

pub fn generate(config: &Config, around: &Surroundings<'_>) -> Result<Resolved<GeneratePlan>> {
    let config = &config.with_guests(Path::new(""), GENERATE, around.metadata);
    resolve(config, GENERATE, |reader, _| build(reader, around))
}

pub(super) fn build(reader: &Reader<'_>, around: &Surroundings<'_>) -> Found<GeneratePlan> {
    let root = reader.root("generate", GENERATE);
    let model = parts::model(&root, around);
    let tokenizer = parts::tokenizer(&root, around);
    let prompt = prompt(&root);
    let device = parts::device(&root);
    let dtype = parts::dtype(&root);
    let limits = parts::limits(&root);
    let seed = parts::seed(&root, around);
    Ok(GeneratePlan {
        config_path: reader.config.path.clone(),
        overrides: reader.config.overrides.clone(),
        resolved_yaml: reader.config.to_yaml(),
        model: model?,
        tokenizer: tokenizer?,
        prompt: prompt?,
        max_new_tokens: root.get("max_new_tokens")?,
        temperature: root.get("temperature")?,
        top_k: root.get("top_k")?,
        enable_kv_cache: root.get("enable_kv_cache")?,
        echo_prompt: root.get("echo_prompt")?,
        seed: seed?,
        device: device?,
        dtype: dtype?,
        limits: limits?,
    })
}

fn prompt(root: &Section<'_>) -> Found<PromptPlan> {
    let config = root.reader.config;
    let fail_at = |mark: Mark, found: String| {
        let what = format!("`prompt` must be a text, or `user` with perhaps `system`, found {found}");
        let hint = "`prompt: {user: \"…\"}` goes through the tokenizer's prompt template, a text is taken as it is";
        root.reader.fail(config.error(mark, what).hint(hint))
    };
    let empty = |key: &str, node: &Node| {
        let error = config.error(node.mark, format!("`{key}` is empty, so there is nothing to continue"));
        root.reader.fail(error.hint(format!("`{key}='Some text'`")))
    };
    // Missing is said by `verify`, null here.
    let node = root.node("prompt")?.or(config.root.at("prompt")).ok_or(Reported)?;
    if is_blank(node) {
        return Err(empty("prompt", node));
    }
    if let Some(text) = node.as_str() {
        return Ok(PromptPlan::Text(text.to_owned()));
    }
    if let Tree::Scalar(_) | Tree::List(_) | Tree::Broken = node.tree {
        return Err(fail_at(node.mark, node.describe()));
    }
    if let Some(entry) = node.entries().iter().find(|entry| !["system", "user"].contains(&entry.key.as_str())) {
        return Err(fail_at(entry.key_mark, format!("the key `{}`", entry.key)));
    }
    if let Some(user) = node.child("user").filter(|user| is_blank(user)) {
        return Err(empty("prompt.user", user));
    }
    let text = |name: &str| match node.child(name) {
        Some(value) if !value.is_null() => {
            value.as_str().map(str::to_owned).map(Some).ok_or_else(|| (value.mark, describe(name, value)))
        }
        _ => Ok(None),
    };
    match (text("system"), text("user")) {
        (Ok(system), Ok(Some(user))) => Ok(PromptPlan::Messages { system, user }),
        (Ok(_), Ok(None)) => Err(fail_at(node.mark, "no `user`".into())),
        (Err((mark, found)), _) | (_, Err((mark, found))) => Err(fail_at(mark, found)),
    }
}

/// Null, or a text of blanks: what `prompt.user=` leaves, and what a prompt has no tokens of.
fn is_blank(node: &Node) -> bool {
    node.is_null() || node.as_str().is_some_and(|text| text.trim().is_empty())
}

fn describe(name: &str, node: &Node) -> String {
    format!("{} for `{name}`", node.describe())
}
