//! `host run`: a recipe and a config to a plan, and the plan to the launcher.

use std::path::{Path, PathBuf};

use super::{check, hub_data, shipped, torchrun, ui};
use crate::config::plan::{Parallel, Plan};
use crate::config::resolve::{self, Surroundings};
use crate::config::{Config, Notice, registry};
use crate::error::{Error, Result};
use crate::launch;

const EXAMPLES: &str = "\
Examples:
  host run recipes/lora_distributed.wasm --nproc 2 --config configs/smollm2/135M_lora_summarize.yaml
  host run lora_distributed --config my.yaml epochs=3 'dataset.split=train[:1000]'
  host run my_recipe.rhai --config my.yaml optimizer=AdamW '~lr_scheduler'
  host run generate --config smollm2/135M_generate prompt.user='Some text'

Overrides: `key=value` sets a key (typed as in YAML; lists as `[a,b]`), `~key` deletes one.
`HOST_LOG` sets the log (such as `debug`).";

/// Runs a recipe with a config
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A recipe's file (.wasm or .rhai), a name that `host ls` lists, or `generate`
    recipe: String,

    /// Changes to the config: `key=value`, `~key`
    #[arg(value_name = "OVERRIDE")]
    overrides: Vec<String>,

    /// The config's file, or a name that `host ls` lists
    #[arg(long, value_name = "FILE")]
    config: String,

    #[command(flatten)]
    torchrun: torchrun::Args,
}

pub fn run(args: &Args) -> Result<()> {
    let flags = args.torchrun.notices()?;
    let options = args.torchrun.options()?;
    let around = shipped::surroundings();
    let recipe = find_recipe(&args.recipe, &around);
    let config = shipped::load_config(&shipped::find_config(&args.config, &around), &args.overrides, &around);
    let (recipe, config) = match (recipe, config) {
        (Ok(recipe), Ok(config)) => (recipe, config),
        (recipe, config) => {
            let errors = [recipe.err(), config.err()];
            return Err(Error::all(errors.into_iter().flatten().collect()).unwrap_or_else(|| Error::bug("no error")));
        }
    };
    let (mut plan, mut notices) = resolve(&recipe, &config, &around)?;
    if let Plan::Train(plan) = &mut plan
        && args.recipe == registry::SHARDED
        && plan.placement.parallel == Parallel::Auto
    {
        plan.placement.parallel = Parallel::Shard;
    }
    check_method(&args.recipe, &plan, &config)?;
    notices.extend(check::check(&plan, &config)?);
    notices.extend(hub_data::settle(&mut plan, &config, true)?);
    if is_first_rank() {
        let apart = args.torchrun.slurm_notice().filter(|_| matches!(plan, Plan::Train(_)));
        notices.splice(0..0, flags.into_iter().chain(apart).map(Notice::command_line));
        ui::notices(&notices);
    }
    let nproc = args.torchrun.nproc(&plan)?;
    let world_size = args.torchrun.world_size(nproc);
    if matches!(plan, Plan::Generate(_)) && world_size > 1 {
        return Err(Error::config(format!("`generate` runs in one process, and {world_size} were asked for"))
            .hint("leave `--nproc` and `--nnodes` out"));
    }
    if let (Some(dir), Some(model)) = (&options.logs.dir, plan.model()) {
        check::check_output(dir, &model.checkpoint_dir, "give another with `--log-dir FOLDER`")?;
    }
    launch::run(&plan, nproc, &options)
}

enum Recipe {
    Guest(PathBuf),
    Generate,
}

/// A file as given, else a shipped recipe by its name or torchtune's.
fn find_recipe(name: &str, around: &Surroundings<'_>) -> Result<Recipe> {
    let path = Path::new(name);
    if path.is_file() {
        return Ok(Recipe::Guest(path.to_owned()));
    }
    match registry::recipe(name) {
        Some(recipe) => match recipe.guest {
            None => Ok(Recipe::Generate),
            Some(guest) => around.find_guest("recipes", guest).map(Recipe::Guest).ok_or_else(|| {
                Error::config(format!(
                    "the recipe `{name}` is not built: no `recipes/{guest}.wasm` here or beside the program"
                ))
                .hint("`cargo xtask build` makes the guests")
            }),
        },
        None if path.is_dir() => {
            Err(Error::config(format!("the recipe `{name}` is a folder, not a .wasm or .rhai file")))
        }
        None if let Some(later) = registry::not_yet(name) => Err(shipped::not_yet("recipe", name, later)),
        None => {
            let error = Error::config(format!("there is no recipe `{name}`"));
            Err(match registry::similar_recipe(name) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint("give the path of a .wasm or .rhai file, or a name that `host ls` lists"),
            })
        }
    }
}

/// The file of a recipe, for a verb that wants a guest.
pub fn find_guest(name: &str, around: &Surroundings<'_>) -> Result<PathBuf> {
    match find_recipe(name, around)? {
        Recipe::Guest(path) => Ok(path),
        Recipe::Generate => Err(Error::config("`generate` is no guest, and has no keys of its own")),
    }
}

fn resolve(recipe: &Recipe, config: &Config, around: &Surroundings<'_>) -> Result<(Plan, Vec<Notice>)> {
    // One line instead of a mistake for each key.
    let wrong_kind = |is_for: &str, hint: &str| {
        Err(Error::config(format!("this config is for {is_for}")).at_file(&config.path).hint(hint))
    };
    match recipe {
        Recipe::Guest(_) if config.is_generation() => {
            return wrong_kind("`generate`", "`host run generate --config …`");
        }
        Recipe::Generate if config.is_training() => {
            return wrong_kind("training", "`generate` needs a `prompt`, see `smollm2/135M_generate`");
        }
        _ => {}
    }
    Ok(match recipe {
        Recipe::Guest(path) => {
            let resolved = resolve::train(config, path, around)?;
            (Plan::Train(Box::new(resolved.plan)), resolved.notices)
        }
        Recipe::Generate => {
            let resolved = resolve::generate(config, around)?;
            (Plan::Generate(Box::new(resolved.plan)), resolved.notices)
        }
    })
}

/// A recipe's name says whether adapters are trained or all weights, and so does the model's; a file's name says nothing.
fn check_method(name: &str, plan: &Plan, config: &Config) -> Result<()> {
    let Plan::Train(plan) = plan else { return Ok(()) };
    if Path::new(name).is_file() {
        return Ok(());
    }
    let Some(recipe) = registry::recipe(name) else { return Ok(()) };
    let has_adapters = plan.model.lora.is_some();
    if recipe.trains_adapters().is_none_or(|wanted| wanted == has_adapters) {
        return Ok(());
    }
    let model = plan.config["model"]["_component_"].as_str().unwrap_or_default();
    let other = recipe.counterpart().map_or(recipe.name, |other| other.name);
    let (what, wanted) = match model.strip_prefix("lora_") {
        Some(whole) => (format!("trains all weights, and the model `{model}` has adapters"), whole.to_owned()),
        None => (format!("trains adapters, and the model `{model}` has none"), format!("lora_{model}")),
    };
    let at = config.locate("model._component_");
    Err(Error::config(format!("the recipe `{name}` {what}"))
        .at(at.file, at.line, at.column)
        .hint(format!("take the recipe `{other}`, or the model `{wanted}`")))
}

/// torchrun starts this program once a rank; one of them is enough to talk.
fn is_first_rank() -> bool {
    std::env::var("RANK").is_ok_and(|rank| rank == "0") || std::env::var_os("RANK").is_none()
}
