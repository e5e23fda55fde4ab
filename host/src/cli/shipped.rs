//! Where the guests and configs that come with `host` are: the working directory, then the folders around the program.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::{Path, PathBuf};

use crate::config::resolve::{FileKind, Surroundings};
use crate::config::{Config, registry};
use crate::error::{Error, Result};
use crate::guest;

/// Looks at the real machine.
pub fn surroundings() -> Surroundings<'static> {
    let cwd = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
    let mut shipped = vec![cwd.clone()];
    if let Ok(program) = std::env::current_exe() {
        shipped.extend(program.ancestors().skip(1).map(Path::to_owned).filter(|folder| *folder != cwd));
    }
    Surroundings {
        seed: draw_seed(),
        cwd,
        shipped,
        cache_dir: cache_dir(),
        kind: &file_kind,
        files_below: &files_below,
        metadata: &guest::metadata,
    }
}

fn file_kind(path: &Path) -> Option<FileKind> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(if metadata.is_dir() { FileKind::Folder } else { FileKind::File })
}

/// Links to files count, as in the hub's cache; those to folders do not, because they may lead in circles.
fn files_below(folder: &Path) -> Vec<String> {
    let (mut found, mut folders) = (vec![], vec![PathBuf::new()]);
    while let Some(inside) = folders.pop() {
        for entry in std::fs::read_dir(folder.join(&inside)).into_iter().flatten().flatten() {
            let path = inside.join(entry.file_name());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(path);
            } else if let (Some(FileKind::File), Some(name)) = (file_kind(&folder.join(&path)), path.to_str()) {
                found.push(name.to_owned());
            }
        }
    }
    found
}

/// A number nobody chose; std's hasher keys come from the system's randomness. Ranks that torchrun or Slurm starts one by
/// one have to agree without having met, so there it comes from what their environment shares.
fn draw_seed() -> u32 {
    const SHARED: [&str; 4] = ["TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT"];
    if std::env::var_os("RANK").is_some() {
        let shared = SHARED.map(|name| std::env::var(name).unwrap_or_default()).join("\n");
        return blake3::hash(shared.as_bytes()).as_bytes()[..4]
            .iter()
            .fold(0, |seed, byte| seed << 8 | u32::from(*byte));
    }
    RandomState::new().build_hasher().finish() as u32
}

fn cache_dir() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    Some(folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?.join("host/tokens"))
}

/// Returns a config's path: as given, else a shipped config's by its name.
pub fn find_config(name: &str, around: &Surroundings<'_>) -> PathBuf {
    let given = PathBuf::from(name);
    if given.exists() {
        return given;
    }
    find(&format!("configs/{}.yaml", config_name(name)), around).unwrap_or(given)
}

/// A config's name in `configs/`; torchtune's `generation` is `generate`'s.
pub fn config_name(name: &str) -> &str {
    let name = name.strip_suffix(".yaml").unwrap_or(name);
    if name == "generate" { "generation" } else { name }
}

/// Returns a file that comes with `host`, relative where it is below the working directory.
pub fn find(relative: &str, around: &Surroundings<'_>) -> Option<PathBuf> {
    let path = |root: &PathBuf| if *root == around.cwd { PathBuf::from(relative) } else { root.join(relative) };
    around.shipped.iter().map(path).find(|path| path.is_file())
}

/// torchtune has it, and `host` does not yet.
pub fn not_yet(noun: &str, name: &str, road: &str) -> Error {
    Error::config(format!("the {noun} `{name}` of torchtune is not there yet"))
        .cause(format!("on the road: {road}"))
        .hint("`host ls` lists what is there")
}

/// Loads the config that [`find_config`] made of `name`; where there is none, says which was probably meant.
pub fn load_config(path: &Path, overrides: &[String], around: &Surroundings<'_>) -> Result<Config> {
    if let (false, Some(later)) = (path.exists(), path.to_str().and_then(registry::not_yet)) {
        return Err(not_yet("config", &path.display().to_string(), later));
    }
    if !path.exists()
        && let Some(near) = path.to_str().and_then(registry::similar_config)
        && find_config(near, around).is_file()
    {
        return Err(
            Error::config(format!("there is no config `{}`", path.display())).hint(format!("did you mean `{near}`?"))
        );
    }
    Config::load(path, overrides)
}
