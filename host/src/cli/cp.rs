//! `host cp`: a shipped recipe's script or a shipped config, to change it.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::{shipped, ui};
use crate::config::registry;
use crate::config::resolve::Surroundings;
use crate::error::{Error, IoContext, Result};

const EXAMPLES: &str = "\
Examples:
  host cp smollm2/135M_lora_summarize my.yaml
  host cp lora_distributed my_recipe.rhai       the recipe as a script, to read and change
  host cp summarize my_template.rhai            a template, likewise
  host cp generation configs/mine.yaml --make-parents";

/// Copies a recipe, a template or a config, to change it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A name that `host ls` lists, or a template's
    file: String,

    /// Where to copy it; the suffix is set to .rhai or .yaml
    destination: PathBuf,

    /// Leave a file that is already there as it is
    #[arg(short = 'n', long)]
    no_clobber: bool,

    /// Make the folders above the copy
    #[arg(long)]
    make_parents: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let around = shipped::surroundings();
    let source = find(&args.file, &around)?;
    let suffix = source.extension().unwrap_or_default();
    let mut target = args.destination.clone();
    if target.is_dir() {
        target.push(source.file_name().unwrap_or_default());
    } else if target.extension() != Some(suffix) {
        target.set_extension(suffix);
    }
    if args.no_clobber && target.exists() {
        let absolute = std::path::absolute(&target).unwrap_or(target);
        return ui::out(&format!("File already exists at {}, not overwriting.", absolute.display()));
    }
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if args.make_parents {
        std::fs::create_dir_all(parent).path_context("create", parent)?;
    } else if !parent.is_dir() {
        return Err(Error::config(format!("the folder `{}` is not there", parent.display()))
            .hint("`--make-parents` creates it"));
    }
    if same_file(&source, &target) {
        return Err(Error::config(format!("`{}` is the file that would be copied", target.display()))
            .hint("give the copy a name or folder of its own"));
    }
    let bytes = std::fs::read(&source).path_context("read", &source)?;
    // Under another name first: a copy that fails half-way leaves what was there.
    let mut copy =
        tempfile::Builder::new().permissions(permissions()).tempfile_in(parent).path_context("write to", parent)?;
    copy.write_all(&bytes).path_context("write to", parent)?;
    copy.persist(&target).map_err(|error| error.error).path_context("write", &target)?;
    ui::out(&format!("Copied file to {}", target.display()))
}

/// A file anyone may read, not a temporary one's.
fn permissions() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o644)
}

fn same_file(left: &Path, right: &Path) -> bool {
    matches!((left.canonicalize(), right.canonicalize()), (Ok(left), Ok(right)) if left == right)
}

/// Recipes first, then configs, then templates.
fn find(name: &str, around: &Surroundings<'_>) -> Result<PathBuf> {
    let script = |folder: &str, name: &str| shipped::find(&format!("scripts/{folder}/{name}.rhai"), around);
    let found = match registry::recipe(name) {
        Some(recipe) => match recipe.guest {
            Some(guest) => script("recipes", guest),
            None => {
                return Err(Error::config(format!("`{}` is a verb of `host` itself, not a script", recipe.name))
                    .hint("copy its config: `host cp generation my.yaml`"));
            }
        },
        None => shipped::find(&format!("configs/{}.yaml", shipped::config_name(name)), around).or_else(|| {
            let template = registry::component(name).filter(|found| found.role == registry::Role::Template)?;
            script("templates", template.name)
        }),
    };
    found.ok_or_else(|| {
        if let Some(later) = registry::not_yet(name) {
            return shipped::not_yet("recipe or config", name, later);
        }
        let error = Error::config(format!("there is no recipe, config or template `{name}`"));
        match registry::similar_recipe(name).or_else(|| registry::similar_config(name)) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint("`host ls` lists the names"),
        }
    })
}
