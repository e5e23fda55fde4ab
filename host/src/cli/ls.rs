//! `host ls`: the recipes and configs that come with it, in torchtune's columns, what the guests among them say of
//! themselves, and what is not there yet.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{shipped, ui};
use crate::config::registry::{self, Component, NOT_YET, NotYet, RECIPES, Recipe, Role, components};
use crate::config::resolve::Surroundings;
use crate::error::{Error, Result};
use crate::guest;

const EXAMPLES: &str = "\
Examples:
  host ls
  host ls lora_finetune_distributed
  host ls --json | jq -r '.[] | select(.not_yet | not) | .configs[].name'";

/// Lists the recipes, configs and templates that come with it, and those that are not there yet
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Only this recipe
    recipe: Option<String>,

    /// Print JSON, with the path of each file
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let around = shipped::surroundings();
    let recipes = match &args.recipe {
        None => RECIPES,
        Some(name) => registry::recipe(name).map_or(&[][..], std::slice::from_ref),
    };
    let is_asked = |entry: &&NotYet| args.recipe.as_ref().is_none_or(|name| entry.recipe == name);
    let not_yet: Vec<&NotYet> = NOT_YET.iter().filter(is_asked).collect();
    if let (Some(name), true, true) = (&args.recipe, recipes.is_empty(), not_yet.is_empty()) {
        let error = Error::config(format!("there is no recipe `{name}`"));
        return Err(match registry::similar_recipe(name) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint("`host ls` lists the names"),
        });
    }
    // Of all that comes with it, if no recipe is asked for.
    let templates: Vec<&Component> = match args.recipe {
        None => components::ALL.iter().filter(|it| it.role == Role::Template && it.refused.is_none()).collect(),
        Some(_) => vec![],
    };
    if args.json {
        let rows = recipes.iter().map(|recipe| to_json(recipe, &around));
        let later = not_yet
            .into_iter()
            .map(|entry| json!({"recipe": entry.recipe, "configs": entry.configs, "not_yet": entry.road}));
        let templates = templates.into_iter().map(|template| template_json(template, &around));
        let rows: Vec<_> = rows.chain(later).chain(templates).collect();
        let text =
            serde_json::to_string_pretty(&rows).map_err(|error| Error::bug("a list is not JSON").cause(error))?;
        return ui::out(&text);
    }
    let mut lines = vec![];
    if !recipes.is_empty() {
        lines.push(row("RECIPE", "CONFIG"));
    }
    for recipe in recipes {
        let configs = configs(recipe, &around);
        if configs.is_empty() {
            lines.push(row(recipe.name, "<>"));
        }
        for (index, (config, _)) in configs.iter().enumerate() {
            lines.push(row(if index == 0 { recipe.name } else { "" }, config));
        }
    }
    let guests = recipes.iter().map(|recipe| ("recipe", recipe.name, about(recipe, &around)));
    let guests = guests.chain(templates.iter().map(|template| {
        let path = around.find_guest("templates", template.name);
        ("template", template.name, path.map_or_else(String::new, |path| said_by(&path)))
    }));
    let guests: Vec<_> = guests.filter(|(.., about)| !about.is_empty()).collect();
    if !guests.is_empty() {
        lines.extend((!lines.is_empty()).then(String::new));
        lines.push(format!("{:<39} ABOUT", "NAME"));
    }
    lines.extend(guests.iter().map(|(kind, name, about)| format!("{:<39} {about}", format!("{name} ({kind})"))));
    if !not_yet.is_empty() {
        lines.extend((!lines.is_empty()).then(String::new));
        lines.push(format!("{:<39} {:<39} ROAD", "NOT YET", "CONFIG"));
    }
    let mut above = "";
    for entry in not_yet {
        for (index, config) in entry.configs.iter().enumerate() {
            let recipe = if entry.recipe == above { "" } else { entry.recipe };
            let road = if index == 0 { entry.road } else { "" };
            lines.push(format!("{recipe:<39} {config:<39} {road}").trim_end().to_owned());
            above = entry.recipe;
        }
    }
    ui::out(&lines.join("\n"))
}

fn row(recipe: &str, config: &str) -> String {
    format!("{recipe:<39} {config:<39}").trim_end().to_owned()
}

/// The configs of a recipe that are really there.
fn configs(recipe: &Recipe, around: &Surroundings<'_>) -> Vec<(&'static str, PathBuf)> {
    let found = recipe.configs.iter().map(|name| (*name, shipped::find_config(name, around)));
    found.filter(|(_, path)| path.is_file()).collect()
}

/// What a recipe does.
fn about(recipe: &Recipe, around: &Surroundings<'_>) -> String {
    match (recipe.doc, recipe.guest.and_then(|guest| around.find_guest("recipes", guest))) {
        (Some(doc), _) => doc.to_owned(),
        (None, Some(path)) => said_by(&path),
        (None, None) => String::new(),
    }
}

/// The first sentence of what a guest says of itself.
fn said_by(path: &Path) -> String {
    match guest::metadata(path) {
        Ok(metadata) => {
            let said = metadata.description.unwrap_or_default();
            said.split_inclusive(". ").next().unwrap_or_default().trim_end_matches(['.', ' ']).to_owned()
        }
        Err(error) => error.message,
    }
}

fn template_json(template: &Component, around: &Surroundings<'_>) -> serde_json::Value {
    let path = around.find_guest("templates", template.name);
    let about = path.as_deref().map(said_by);
    json!({"template": template.name, "about": about, "aliases": template.aliases, "path": path, "configs": []})
}

fn to_json(recipe: &Recipe, around: &Surroundings<'_>) -> serde_json::Value {
    let configs: Vec<_> =
        configs(recipe, around).into_iter().map(|(name, path)| json!({"name": name, "path": path})).collect();
    json!({
        "recipe": recipe.name,
        "about": about(recipe, around),
        "aliases": recipe.aliases,
        "path": recipe.guest.and_then(|guest| around.find_guest("recipes", guest)),
        "configs": configs,
    })
}
