//! `host download`: a repository of the hub into a folder.

use std::path::PathBuf;

use globset::{Glob, GlobSet, GlobSetBuilder};
use hf_hub::RepoType;
use serde_json::json;

use super::ui;
use crate::error::{Error, IoContext, Result};
use crate::hub::fetch::{Wanted, fetch_all};
use crate::hub::{Hub, RepoId, check_revision};

const EXAMPLES: &str = "\
Examples:
  host download meta-llama/Llama-3.2-1B-Instruct --ignore-patterns 'original/*'
  host download meta-llama/Llama-3.1-8B-Instruct --output-dir models/8B --hf-token TOKEN
  host download EdinburghNLP/xsum --type dataset --revision refs/convert/parquet

What is broken off goes on where it stopped; every file is checked against the hub's hash, and a second
download fetches only what changed. HF_ENDPOINT names another hub, HF_TOKEN a token, HF_HOME the folder
that `hf auth login` writes one to.";

/// The file by which an adapter trained on the folder names its base.
const ORIGIN: &str = "original_repo_id.json";

/// Fetches a model or a data set from the Hugging Face hub
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The repository, as `org/name`
    repo_id: String,

    /// The folder to write; `/tmp/NAME` by default
    #[arg(long, alias = "output_dir", value_name = "FOLDER")]
    output_dir: Option<PathBuf>,

    /// A token of the hub; HF_TOKEN, then the one of `hf auth login`, by default
    #[arg(long, alias = "hf_token", value_name = "TOKEN")]
    hf_token: Option<String>,

    /// Leave out the files that match, such as `*.safetensors`; `*` crosses folders. Can be given several times
    #[arg(long, alias = "ignore_patterns", value_name = "PATTERN")]
    ignore_patterns: Vec<String>,

    /// A branch, tag or commit
    #[arg(long, default_value = "main")]
    revision: String,

    /// What the repository is
    #[arg(long, alias = "repo-type", value_name = "TYPE", default_value = "model", value_parser = ["model", "dataset"])]
    r#type: String,

    /// Where it is
    #[arg(long, value_name = "HUB", default_value = "huggingface", value_parser = ["huggingface", "kaggle"])]
    source: String,

    #[arg(long, alias = "kaggle_username", hide = true)]
    kaggle_username: Option<String>,

    #[arg(long, alias = "kaggle_api_key", hide = true)]
    kaggle_api_key: Option<String>,
}

/// Without what is secret.
impl std::fmt::Debug for Args {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Args").field("repo_id", &self.repo_id).field("revision", &self.revision).finish_non_exhaustive()
    }
}

pub fn run(args: &Args) -> Result<()> {
    if args.source == "kaggle" || args.kaggle_username.is_some() || args.kaggle_api_key.is_some() {
        return Err(Error::config("models of Kaggle are not fetched: they come as archives that need its own program")
            .hint("`kaggle models instances versions download` gets one, as a folder that `checkpoint_dir` takes")
            .hint("most are on the Hugging Face hub too: `host download ORG/NAME`"));
    }
    check_revision(&args.revision)?;
    let ignored = patterns(&args.ignore_patterns)?;
    let repo_type = if args.r#type == "dataset" { RepoType::Dataset } else { RepoType::Model };
    let repo = RepoId::new(&args.repo_id, repo_type)?;
    let folder = args.output_dir.clone().unwrap_or_else(|| PathBuf::from("/tmp").join(repo.name()));
    if folder.exists() && !folder.is_dir() {
        return Err(Error::config(format!("`{}` is a file, and a folder is written", folder.display()))
            .hint("give another with `--output-dir`"));
    }
    if !args.ignore_patterns.is_empty() {
        ui::out(&format!("Ignoring files matching the following patterns: {}", args.ignore_patterns.join(", ")))?;
    }
    let hub = Hub::from_env(args.hf_token.as_deref())?;
    let listing = hub.listing(&repo, &args.revision).map_err(|failure| failure.error)?;
    let mut wanted: Vec<Wanted<'_>> = listing
        .files
        .iter()
        .filter(|file| !ignored.is_match(&file.path))
        .map(|file| Wanted { file, path: folder.join(&file.path) })
        .collect();
    wanted.sort_by(|a, b| a.path.cmp(&b.path));
    if wanted.is_empty() {
        return Err(Error::config(format!("`{repo}` has no file to fetch"))
            .hint(format!("it has {} files, all of which are ignored", listing.files.len())));
    }
    std::fs::create_dir_all(&folder).path_context("make the folder", &folder)?;
    // Full paths, as torchtune prints them.
    let folder = folder.canonicalize().path_context("read", &folder)?;
    fetch_all(&hub, &repo, &listing, &wanted)?;

    let mut paths: Vec<_> = wanted.iter().map(|wanted| folder.join(&wanted.file.path)).collect();
    if matches!(repo_type, RepoType::Model) {
        let path = folder.join(ORIGIN);
        std::fs::write(&path, format!("{:#}\n", json!({ "repo_id": args.repo_id }))).path_context("write", &path)?;
        paths.push(path);
    }
    paths.sort();
    let kind = if args.r#type == "dataset" { "dataset" } else { "model" };
    ui::out(&format!("Successfully downloaded {kind} repo and wrote to the following locations:"))?;
    paths.iter().try_for_each(|path| ui::out(&path.display().to_string()))
}

/// As Python's library has them: a folder's name with `/` at its end is all in it.
fn patterns(given: &[String]) -> Result<GlobSet> {
    let wrong = |pattern: &str, error: globset::Error| {
        Error::config(format!("`{pattern}` is not a pattern of file names")).cause(error).hint("such as `*.bin`")
    };
    let mut set = GlobSetBuilder::new();
    for pattern in given {
        let all_in = if pattern.ends_with('/') { "*" } else { "" };
        set.add(Glob::new(&format!("{pattern}{all_in}")).map_err(|error| wrong(pattern, error))?);
    }
    set.build().map_err(|error| wrong(&given.join(", "), error))
}
