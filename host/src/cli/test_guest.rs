//! `host test`: a guest, held against what its author expects of it.

use std::path::PathBuf;

use crate::config::Notice;
use crate::config::plan::{Plan, TestPlan};
use crate::error::{Error, IoContext, Location, Result};
use crate::kit;
use crate::launch::{self, LaunchOptions};

use super::ui;

const EXAMPLES: &str = "\
Examples:
  host test my_template
  host test my_loss --accept
  host test my_recipe.rhai z_loss=0.1

The rows of a template or a loss are in `tests/rows.jsonl` of its folder, an object a line:
  {\"row\": {\"input\": \"…\", \"output\": \"…\"}, \"messages\": [{\"role\": \"user\", \"parts\": [\"…\"]}]}
  {\"row\": {…}, \"settings\": {…}, \"skip\": \"why it is left out\"}, or \"fail\"
  {\"logits\": [[1.0, 2.0]], \"labels\": [1], \"settings\": {…}, \"sum\": 0.31, \"weight\": 1.0}
A loss is also held to what every run asks of it: it has a gradient, and comes to the same however its
labels are spread over batches. A recipe takes three steps with a tiny model.";

/// Holds a guest against what its author expects, and shows how much of each limit it used
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A guest's folder, or a .wasm or .rhai file
    guest: PathBuf,

    /// Of a recipe's run, changes to its config: `key=value`, `~key`
    #[arg(value_name = "OVERRIDE")]
    overrides: Vec<String>,

    /// Write what comes of the rows as what is expected
    #[arg(long)]
    accept: bool,

    /// Print what is found as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let guest = kit::find_guest(&args.guest)?;
    let (file, rows) = (guest.file, guest.rows);
    if let Some(newer) = guest.newer_source {
        let message = format!("`{}` is older than its source: build it again", file.display());
        ui::notices(&[Notice { message, location: Location { file: newer, line: None, column: None } }]);
    }
    if args.accept && rows.is_none() {
        return Err(Error::config(format!("`{}` has no rows to accept", args.guest.display()))
            .hint("put rows into `tests/rows.jsonl` of the guest's folder"));
    }
    let scratch = tempfile::Builder::new()
        .prefix("host-test-")
        .tempdir()
        .path_context("create a folder in", std::env::temp_dir())?;
    let plan = TestPlan {
        guest: file,
        rows,
        accept: args.accept,
        scratch: scratch.path().to_owned(),
        overrides: args.overrides.clone(),
        json: args.json,
    };
    launch::run(&Plan::Test(plan), 1, &LaunchOptions::default())
}
