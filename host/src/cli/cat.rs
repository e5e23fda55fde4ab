//! `host cat`: a config as it is read.

use super::{shipped, ui};
use crate::config::registry;
use crate::error::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  host cat smollm2/135M_lora_summarize
  host cat my.yaml --sort
  host cat my.yaml epochs=3 --resolved          overrides applied, every `${…}` replaced";

/// Prints a config
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The config's file, or a name that `host ls` lists
    config: String,

    /// Changes to the config: `key=value`, `~key`
    #[arg(value_name = "OVERRIDE")]
    overrides: Vec<String>,

    /// Sort the keys
    #[arg(long)]
    sort: bool,

    /// Replace every `${…}` by what it stands for
    #[arg(long)]
    resolved: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let around = shipped::surroundings();
    let path = shipped::find_config(&args.config, &around);
    if !path.exists() && registry::recipe(&args.config).is_some_and(|recipe| recipe.guest.is_some()) {
        return ui::out(&format!(
            "'{0}' is a recipe, not a config. `host cp {0} {0}.rhai` copies its script, `host ls {0}` lists its configs.",
            args.config
        ));
    }
    if let (false, Some(later)) = (path.exists(), registry::not_yet(&args.config)) {
        return Err(shipped::not_yet("config", &args.config, later));
    }
    if path.extension().is_none_or(|suffix| suffix != "yaml" && suffix != "yml") {
        return Err(Error::config(format!("`{}` is neither a .yaml file nor a config's name", args.config)).hint(
            match registry::similar_config(&args.config) {
                Some(near) => format!("did you mean `{near}`?"),
                None => "`host ls` lists the names".to_owned(),
            },
        ));
    }
    let config = shipped::load_config(&path, &args.overrides, &around)?;
    ui::out(config.print(args.resolved, args.sort)?.trim_end())
}
