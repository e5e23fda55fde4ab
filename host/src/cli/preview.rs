//! `host preview`: the first rows of a config's data, as the model will see them.

use std::io::IsTerminal;

use super::{check, hub_data, shipped, ui};
use crate::config::plan::{Plan, PreviewPlan, PreviewStyle};
use crate::config::resolve;
use crate::error::{Error, Result};
use crate::launch::{self, LaunchOptions};

const EXAMPLES: &str = "\
Examples:
  host preview --config my.yaml
  host preview --config my.yaml --rows 20 tokenizer.prompt_template=my_template.rhai
  host preview --config my.yaml --validation --json | jq .spans

The text is what the tokens say, special ones included. What carries loss is green; in a file or a pipe it stands in ⟦ ⟧.";

/// Shows what rows become: text, tokens, and which of them carry loss
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Changes to the config: `key=value`, `~key`
    #[arg(value_name = "OVERRIDE")]
    overrides: Vec<String>,

    /// The config's file, or a name that `host ls` lists
    #[arg(long, value_name = "FILE")]
    config: String,

    /// Rows of each data set
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rows: u32,

    /// The rows of `dataset_val`
    #[arg(long)]
    validation: bool,

    /// The recipe the config is for, where it has keys of its own
    #[arg(long, value_name = "RECIPE")]
    recipe: Option<String>,

    /// An object a line: row, spans of text and tokens, whether each carries loss
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let around = shipped::surroundings();
    let config = shipped::load_config(&shipped::find_config(&args.config, &around), &args.overrides, &around)?;
    if config.is_generation() {
        return Err(Error::config("this config is for `generate`, which reads no rows")
            .at_file(&config.path)
            .hint("`host run generate` with `echo_prompt=True` shows its prompt"));
    }
    let recipe = args.recipe.as_ref().map(|name| super::run::find_guest(name, &around)).transpose()?;
    let resolved = resolve::train(&config, &recipe.unwrap_or_default(), &around)?;
    let mut notices = resolved.notices;
    let key = if args.validation { "dataset_val" } else { "dataset" };
    notices.extend(check::check_data(&resolved.plan, key, &config)?);
    let mut plan = Plan::Train(Box::new(resolved.plan));
    notices.extend(hub_data::settle(&mut plan, &config, true)?);
    ui::notices(&notices);
    let Plan::Train(plan) = plan else { return Err(Error::bug("a training plan became another")) };
    let datasets = if args.validation { plan.dataset_val } else { plan.dataset };
    if datasets.is_empty() {
        return Err(Error::config("the config has no `dataset_val`")
            .at_file(&config.path)
            .hint("leave `--validation` out"));
    }
    let style = match (args.json, std::io::stdout().is_terminal()) {
        (true, _) => PreviewStyle::Json,
        (false, true) => PreviewStyle::Colour,
        (false, false) => PreviewStyle::Plain,
    };
    let (tokenizer, limits, rows) = (plan.tokenizer, plan.limits, args.rows as usize);
    let plan = PreviewPlan { datasets, tokenizer, limits, rows, style };
    launch::run(&Plan::Preview(Box::new(plan)), 1, &LaunchOptions::default())
}
