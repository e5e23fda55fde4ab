//! `host keys`: every key and component a config may name, and what becomes of each. `configs/REFERENCE.md` is its output.

use std::fmt::Write;

use serde_json::json;

use super::ui;
use crate::config::registry::keys::{GENERATE, HARDWARE, LIMITS, TRAIN};
use crate::config::registry::{self, Class, Component, Key, Role, components};
use crate::config::suggest;
use crate::error::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  host keys                        everything
  host keys alpaca_dataset         one component
  host keys packed                 one key, wherever it is
  host keys --json | jq -r '.[] | select(.name == \"Training\").keys[].name'";

/// Says what a config may contain: every key with its default, and what becomes of it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A component's or a key's name; everything when left out
    name: Option<String>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Keys under a heading.
struct Part {
    heading: String,
    about: String,
    keys: Vec<&'static Key>,
    component: Option<&'static Component>,
}

pub fn run(args: &Args) -> Result<()> {
    let parts = match &args.name {
        None => parts(),
        Some(name) => named(name)?,
    };
    if args.json {
        let text = serde_json::to_string_pretty(&parts.iter().map(to_json).collect::<Vec<_>>());
        return ui::out(&text.map_err(|error| Error::bug("keys are not JSON").cause(error))?);
    }
    let head = if args.name.is_none() { HEAD } else { "" };
    ui::out(format!("{head}{}", parts.iter().map(section).collect::<Vec<_>>().join("\n")).trim_end())
}

const HEAD: &str = "\
<!-- Written by `host keys > configs/REFERENCE.md`; do not edit. -->

# What a config may contain

Every key, and what becomes of it: it is honoured; or it *changes nothing* here, which a notice says once; or *only* one value
is what `host` does; or it is *refused*, with the reason. Nothing else is accepted, and nothing is ignored in silence.
torchtune's dotted paths are names of the same components.

";

fn parts() -> Vec<Part> {
    let top = |heading: &str, about: &str, keys: &'static [Key]| Part {
        heading: heading.to_owned(),
        about: about.to_owned(),
        keys: keys.iter().collect(),
        component: None,
    };
    let mut parts = vec![
        top("Training", "Top-level keys of a config for a recipe.", TRAIN),
        top("Generation", "Top-level keys of a config for `generate`.", GENERATE),
        top("`limits`", "What a guest may use.", LIMITS),
        top("Hardware", "A file of `host plan --hardware`, such as `configs/hardware/mi210x8.yaml`.", HARDWARE),
    ];
    // Models share their keys: one table for all of them.
    let with_adapters = components::ALL.iter().find(|component| component.name.starts_with("lora_"));
    parts.extend(with_adapters.map(|component| Part {
        heading: "Models".to_owned(),
        about: format!(
            "Shapes come from the checkpoint's `config.json`; a name says whether there are adapters. Without `lora_` in \
             front the model has no keys, and all its weights are trained.\n\n{}",
            models().join(", ")
        ),
        keys: component.keys.iter().flat_map(|group| group.iter()).collect(),
        component: None,
    }));
    parts.extend(components::ALL.iter().filter(|component| component.role != Role::Model).map(of_component));
    parts
}

fn models() -> Vec<String> {
    registry::usable(Role::Model).filter(|name| name.starts_with("lora_")).map(|name| format!("`{name}`")).collect()
}

fn of_component(component: &'static Component) -> Part {
    let aliases = component.aliases.iter().map(|alias| format!("`{alias}`")).collect::<Vec<_>>().join(", ");
    let also = if aliases.is_empty() { String::new() } else { format!("\n\nAlso {aliases}.") };
    let about = match component.refused {
        Some(why) => format!("Refused: {why}.{also}"),
        None => format!("{}{also}", component.doc),
    };
    Part {
        heading: format!("`{}`, {}", component.name, component.role.a_noun()),
        about,
        keys: component.keys.iter().flat_map(|group| group.iter()).collect(),
        component: Some(component),
    }
}

/// A component by its name or path, or the keys of a name wherever they are.
fn named(name: &str) -> Result<Vec<Part>> {
    if let Some(component) = registry::component(name) {
        return Ok(vec![of_component(component)]);
    }
    let has = |part: &mut Part| {
        part.keys.retain(|key| key.name == name);
        !part.keys.is_empty()
    };
    let mut found = parts();
    found.retain_mut(has);
    if !found.is_empty() {
        return Ok(found);
    }
    let names = components::ALL.iter().map(|component| component.name);
    let keys = parts().into_iter().flat_map(|part| part.keys).map(|key| key.name);
    let error = Error::config(format!("there is no component and no key `{name}`"));
    Err(match suggest::nearest(name, names.chain(keys)) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint("`host keys` lists them all"),
    })
}

fn section(part: &Part) -> String {
    let mut text = format!("## {}\n\n{}\n", part.heading, part.about.trim());
    if part.keys.is_empty() {
        return text;
    }
    text.push_str("\n| key | value | default | |\n| --- | --- | --- | --- |\n");
    for key in &part.keys {
        let default = key.default.map_or("required".to_owned(), |default| format!("`{default}`"));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| `{}` | {} | {default} | {} |", key.name, key.ty.expected(), becomes(key));
    }
    text
}

fn becomes(key: &Key) -> String {
    let default = key.default.unwrap_or_default();
    match key.class {
        Class::Honoured => key.doc.to_owned(),
        Class::OfRecipe => format!("{} For recipes that ask for it.", key.doc),
        Class::Satisfied(why) | Class::Quiet(why) => format!("{} Changes nothing: {why}.", key.doc),
        Class::Fixed(why) => format!("{} Only `{default}`: {why}.", key.doc),
        Class::Refused(why) => format!("Refused: {why}."),
    }
}

fn to_json(part: &Part) -> serde_json::Value {
    let keys: Vec<_> = part
        .keys
        .iter()
        .map(|key| {
            let (class, why) = match key.class {
                Class::Honoured => ("honoured", None),
                Class::OfRecipe => ("of_recipe", None),
                Class::Satisfied(why) | Class::Quiet(why) => ("changes_nothing", Some(why)),
                Class::Fixed(why) => ("only_default", Some(why)),
                Class::Refused(why) => ("refused", Some(why)),
            };
            json!({"name": key.name, "value": key.ty.expected(), "default": key.default, "nullable": key.nullable,
                "class": class, "why": why, "about": key.doc})
        })
        .collect();
    let component = part.component;
    json!({
        "name": component.map_or(part.heading.trim_matches('`'), |component| component.name),
        "role": component.map(|component| component.role.noun()),
        "aliases": component.map(|component| component.aliases),
        "refused": component.and_then(|component| component.refused),
        "keys": keys,
    })
}
