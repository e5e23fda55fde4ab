//! `host new`: a folder with a guest that builds, tests and runs.

use std::path::PathBuf;

use super::ui;
use crate::error::Result;
use crate::kit::{Kind, Language, Project};

const EXAMPLES: &str = "\
Examples:
  host new template one_line
  host new loss smoothed --dir guests
  host new recipe z_loss --lang rust

The folder holds the guest, tests, a config, a few rows of data and what the SDK has for its language;
nothing else is needed. `sdk/README.md` in it leads from here to a run.";

/// Makes a folder with a new recipe, template or loss
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// What it is for
    kind: Kind,

    /// Its name, and the folder's
    name: String,

    /// The language it is written in
    #[arg(long, value_enum, default_value_t = Language::Rhai)]
    lang: Language,

    /// Where the folder is made; here by default
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<()> {
    Project::check_name(&args.name)?;
    let folder = args.dir.clone().unwrap_or_default().join(&args.name);
    let project = Project { kind: args.kind, language: args.lang, name: args.name.clone(), folder };
    project.write()?;
    let text = format!("{} holds a new {}. Next:", project.folder.display(), project.kind.noun());
    let next: String = project.commands().iter().map(|command| format!("\n  {command}")).collect();
    ui::out(&(text + &next))
}
