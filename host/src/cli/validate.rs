//! `host validate`: everything `run` does before it starts a worker.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{check, hub_data, shipped, ui};
use crate::config::Notice;
use crate::config::plan::Plan;
use crate::config::resolve;
use crate::error::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  host validate my.yaml
  host validate my.yaml epochs=3 model.lora_rank=16
  host validate my.yaml --recipe my_recipe.rhai
  host validate --json my.yaml | jq .plan.train.optimizer

All mistakes are shown at once, each with its line and column. When there are none, the files are
looked at too: model folder, weights, tokenizer, data, guests, output folder. Of a data
set on the hub only what is cached is seen: nothing is fetched.";

/// Checks a config and the files it names
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The config's file, or a name that `host ls` lists
    config: String,

    /// Changes to the config: `key=value`, `~key`
    #[arg(value_name = "OVERRIDE")]
    overrides: Vec<String>,

    /// The recipe it is for, which may have keys of its own: a file, or a name that `host ls` lists
    #[arg(long, value_name = "RECIPE")]
    recipe: Option<String>,

    /// Print the verdict, the resolved plan, notices and mistakes as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let around = shipped::surroundings();
    let path = shipped::find_config(&args.config, &around);
    let recipe = args.recipe.as_ref().map(|name| super::run::find_guest(name, &around)).transpose()?;
    let verdict = verdict(&path, &args.overrides, recipe.unwrap_or_default(), &around);
    if args.json {
        ui::out(&to_json(&path, &verdict)?)?;
        return verdict.map(|_| ());
    }
    let (_, notices) = verdict?;
    ui::notices(&notices);
    ui::out("Config is well-formed!")
}

fn verdict(
    path: &Path,
    overrides: &[String],
    recipe: PathBuf,
    around: &resolve::Surroundings<'_>,
) -> Result<(Plan, Vec<Notice>)> {
    let config = shipped::load_config(path, overrides, around)?;
    let (mut plan, mut notices) = if config.is_generation() {
        let resolved = resolve::generate(&config, around)?;
        (Plan::Generate(Box::new(resolved.plan)), resolved.notices)
    } else {
        // Which recipe it will be for is not in a config: an empty path where nobody says.
        let resolved = resolve::train(&config, &recipe, around)?;
        (Plan::Train(Box::new(resolved.plan)), resolved.notices)
    };
    notices.extend(check::check(&plan, &config)?);
    notices.extend(hub_data::settle(&mut plan, &config, false)?);
    Ok((plan, notices))
}

fn to_json(path: &Path, verdict: &Result<(Plan, Vec<Notice>)>) -> Result<String> {
    let value = match verdict {
        Ok((plan, notices)) => {
            let notices: Vec<_> = notices
                .iter()
                .map(|notice| json!({"message": notice.message, "location": notice.location.to_string()}))
                .collect();
            json!({"config": path, "valid": true, "plan": plan, "notices": notices, "errors": []})
        }
        Err(error) => {
            let errors: Vec<_> = std::iter::once(error).chain(&error.others).map(error_json).collect();
            json!({"config": path, "valid": false, "plan": null, "notices": [], "errors": errors})
        }
    };
    serde_json::to_string_pretty(&value).map_err(|error| Error::bug("the plan is not JSON").cause(error))
}

fn error_json(error: &Error) -> serde_json::Value {
    json!({
        "message": error.message,
        "locations": error.locations,
        "causes": error.causes,
        "hints": error.hints,
    })
}
