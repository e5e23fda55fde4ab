//! `host ls`: the recipes and configs that come with it, in torchtune's columns.

use std::path::PathBuf;

use serde_json::json;

use super::{shipped, ui};
use crate::config::registry::{self, RECIPES, Recipe};
use crate::config::resolve::Surroundings;
use crate::error::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  host ls
  host ls lora_finetune_distributed
  host ls --json | jq -r '.[].configs[].name'";

/// Lists the recipes and configs that come with it
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
        Some(name) => {
            let recipe = registry::recipe(name).ok_or_else(|| {
                let error = Error::config(format!("there is no recipe `{name}`"));
                match registry::similar_recipe(name) {
                    Some(near) => error.hint(format!("did you mean `{near}`?")),
                    None => error.hint("`host ls` lists the names"),
                }
            })?;
            std::slice::from_ref(recipe)
        }
    };
    if args.json {
        let rows: Vec<_> = recipes.iter().map(|recipe| to_json(recipe, &around)).collect();
        let text =
            serde_json::to_string_pretty(&rows).map_err(|error| Error::bug("a list is not JSON").cause(error))?;
        return ui::out(&text);
    }
    let mut lines = vec![row("RECIPE", "CONFIG")];
    for recipe in recipes {
        let configs = configs(recipe, &around);
        if configs.is_empty() {
            lines.push(row(recipe.name, "<>"));
        }
        for (index, (config, _)) in configs.iter().enumerate() {
            lines.push(row(if index == 0 { recipe.name } else { "" }, config));
        }
    }
    ui::out(&lines.join("\n"))
}

fn row(recipe: &str, config: &str) -> String {
    format!("{recipe:<40}{config:<40}").trim_end().to_owned()
}

/// The configs of a recipe that are really there.
fn configs(recipe: &Recipe, around: &Surroundings<'_>) -> Vec<(&'static str, PathBuf)> {
    let found = recipe.configs.iter().map(|name| (*name, shipped::find_config(name, around)));
    found.filter(|(_, path)| path.is_file()).collect()
}

fn to_json(recipe: &Recipe, around: &Surroundings<'_>) -> serde_json::Value {
    let configs: Vec<_> =
        configs(recipe, around).into_iter().map(|(name, path)| json!({"name": name, "path": path})).collect();
    json!({
        "recipe": recipe.name,
        "about": recipe.doc,
        "aliases": recipe.aliases,
        "path": if recipe.is_guest { around.find_guest("recipes", recipe.name) } else { None },
        "configs": configs,
    })
}
