//! Finds the one libtorch folder of this machine and checks that it is the version we are built for.
//!
//! Three places, in this order: `LIBTORCH`, the view that `cargo xtask setup` made, the active Python's torch. The first
//! that names something decides, right or wrong: quietly taking the next one would run a libtorch nobody asked for.
//! Nothing is loaded here, so the front works without libtorch; what can be told from files is told from files.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Serialize;

use crate::error::{Error, Result};

/// The release series that `host-rank` links to; a patch release keeps the binary interface.
pub const NEEDED_SERIES: &str = "2.11";

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Libtorch {
    /// Holds `libtorch_cpu.so` and the GPU half that goes with it.
    pub lib_dir: PathBuf,
    /// As the folder says it, such as `2.11.0+rocm7.0`.
    pub version: String,
    pub source: Source,
    /// Back ends whose library is there; whether a device answers is known after loading it.
    pub back_ends: Vec<BackEnd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// `LIBTORCH` in the environment.
    Environment,
    /// `.libtorch/view`, made by `cargo xtask setup`.
    Setup,
    /// The `torch` package of the `python3` on the path.
    Python,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BackEnd {
    Cpu,
    Cuda,
    Rocm,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Environment => "from `LIBTORCH`",
            Source::Setup => "from set-up",
            Source::Python => "the active Python's torch",
        })
    }
}

impl fmt::Display for BackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BackEnd::Cpu => "cpu",
            BackEnd::Cuda => "cuda",
            BackEnd::Rocm => "rocm",
        })
    }
}

/// Finds the libtorch folder that workers will load.
pub fn find() -> Result<Libtorch> {
    let named = std::env::var_os("LIBTORCH").filter(|value| !value.is_empty());
    let program = std::env::current_exe().ok();
    find_among(named.as_deref(), program.as_deref(), python_torch)
}

fn find_among(
    named: Option<&OsStr>,
    program: Option<&Path>,
    python_torch: impl FnOnce() -> Option<PathBuf>,
) -> Result<Libtorch> {
    if let Some(named) = named {
        return open(Path::new(named), Source::Environment);
    }
    if let Some(view) = program.and_then(set_up_view) {
        return open(&view, Source::Setup);
    }
    if let Some(folder) = python_torch() {
        return open(&folder, Source::Python);
    }
    Err(Error::config("no libtorch found")
        .cause("`LIBTORCH` is not set, there is no `.libtorch/view` above this program, and `python3` has no torch")
        .hint(format!("run `cargo xtask setup`, or set `LIBTORCH` to a libtorch {NEEDED_SERIES} or `torch` folder")))
}

fn set_up_view(program: &Path) -> Option<PathBuf> {
    program.ancestors().skip(1).map(|folder| folder.join(".libtorch/view")).find(|view| view.is_dir())
}

/// Asks the active Python where its torch is, without importing it (that takes seconds).
fn python_torch() -> Option<PathBuf> {
    const WHERE: &str = "import importlib.util as u; s = u.find_spec('torch'); \
                         print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')";
    let output = Command::new("python3").args(["-c", WHERE]).stdin(Stdio::null()).output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?;
    let folder = folder.trim();
    (output.status.success() && !folder.is_empty()).then(|| PathBuf::from(folder))
}

fn open(folder: &Path, source: Source) -> Result<Libtorch> {
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    let wrong = |message: String| {
        let hint = match source {
            Source::Environment => {
                format!("set `LIBTORCH` to a libtorch {NEEDED_SERIES} or `torch` folder, or unset it")
            }
            Source::Setup => "run `cargo xtask setup` again".to_owned(),
            Source::Python => {
                format!("run `cargo xtask setup`, or activate a Python with torch {NEEDED_SERIES}, or set `LIBTORCH`")
            }
        };
        Error::config(message).at_file(&absolute).hint(hint)
    };
    let lib_dir = absolute.join("lib");
    for library in ["libtorch_cpu.so", "libc10.so"] {
        if !lib_dir.join(library).is_file() {
            return Err(wrong(format!("not a libtorch folder ({source}): it has no `lib/{library}`")));
        }
    }
    // Set-up's view only links to the CPU half: the GPU half lies where the links lead, and must be of the same build.
    let real = std::fs::canonicalize(lib_dir.join("libtorch_cpu.so")).ok();
    let lib_dir = real.as_deref().and_then(Path::parent).map_or(lib_dir, Path::to_owned);
    let version = read_version(&absolute).ok_or_else(|| {
        wrong(format!("libtorch ({source}) does not say its version, and `host` needs {NEEDED_SERIES}"))
    })?;
    if version != NEEDED_SERIES && !version.starts_with(&format!("{NEEDED_SERIES}.")) {
        return Err(wrong(format!("libtorch ({source}) is version {version}, but `host` needs {NEEDED_SERIES}")));
    }
    let mut back_ends = vec![BackEnd::Cpu];
    for (library, back_end) in [("libtorch_cuda.so", BackEnd::Cuda), ("libtorch_hip.so", BackEnd::Rocm)] {
        if lib_dir.join(library).exists() {
            back_ends.push(back_end);
        }
    }
    Ok(Libtorch { lib_dir, version, source, back_ends })
}

/// Reads the version from whichever file this kind of folder has: libtorch archive, Python package, headers.
fn read_version(folder: &Path) -> Option<String> {
    if let Ok(text) = std::fs::read_to_string(folder.join("build-version")) {
        return Some(text.trim().to_owned());
    }
    if let Ok(text) = std::fs::read_to_string(folder.join("version.py")) {
        let line = text.lines().find_map(|line| line.trim().strip_prefix("__version__")?.trim().strip_prefix('='))?;
        return Some(line.trim().trim_matches(['\'', '"']).to_owned());
    }
    ["headeronly", "csrc/api/include/torch"].iter().find_map(|place| {
        let header = folder.join("include/torch").join(place).join("version.h");
        version_of_header(&std::fs::read_to_string(header).ok()?)
    })
}

fn version_of_header(text: &str) -> Option<String> {
    let part = |name: &str| {
        let define = format!("#define TORCH_VERSION_{name} ");
        text.lines().find_map(|line| line.strip_prefix(&define)).map(str::trim)
    };
    Some(format!("{}.{}.{}", part("MAJOR")?, part("MINOR")?, part("PATCH")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that looks like libtorch from outside, with `files` besides the two libraries.
    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("lib/libtorch_cpu.so", ""), ("lib/libc10.so", "")].iter().chain(files) {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    fn find_at(folder: &tempfile::TempDir) -> Result<Libtorch> {
        find_among(Some(folder.path().as_os_str()), None, || None)
    }

    #[test]
    fn each_kind_of_folder_tells_its_version() {
        let header = "#define TORCH_VERSION_MAJOR 2\n\n#define TORCH_VERSION_MINOR 11\n#define TORCH_VERSION_PATCH 1\n";
        let archive = folder(&[("build-version", "2.11.0+cpu\n")]);
        let package = folder(&[("version.py", "from typing import Optional\n__version__ = '2.11.0+rocm7.0'\n")]);
        let headers = folder(&[("include/torch/headeronly/version.h", header)]);
        assert_eq!(find_at(&archive).unwrap().version, "2.11.0+cpu");
        assert_eq!(find_at(&package).unwrap().version, "2.11.0+rocm7.0");
        assert_eq!(find_at(&headers).unwrap().version, "2.11.1");
    }

    #[test]
    fn back_ends_are_the_libraries_in_the_same_folder() {
        let rocm = folder(&[("build-version", "2.11.0"), ("lib/libtorch_hip.so", "")]);
        let found = find_at(&rocm).unwrap();
        assert_eq!(found.back_ends, [BackEnd::Cpu, BackEnd::Rocm]);
        assert_eq!(found.lib_dir, rocm.path().join("lib"));
    }

    #[test]
    fn a_wrong_version_is_named_with_the_one_needed() {
        for version in ["2.1.1", "2.12.0", "2.110.0"] {
            let error = find_at(&folder(&[("build-version", version)])).unwrap_err();
            assert_eq!(
                error.message,
                format!("libtorch (from `LIBTORCH`) is version {version}, but `host` needs 2.11")
            );
        }
        let error = find_at(&folder(&[])).unwrap_err();
        assert_eq!(error.message, "libtorch (from `LIBTORCH`) does not say its version, and `host` needs 2.11");
    }

    #[test]
    fn the_first_place_that_names_something_decides() {
        let good = folder(&[("build-version", "2.11.0"), ("target/release/host", "")]);
        let tree = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(tree.path().join(".libtorch")).unwrap();
        std::os::unix::fs::symlink(good.path(), tree.path().join(".libtorch/view")).unwrap();
        let program = tree.path().join("target/release/host");

        let from_setup = find_among(None, Some(&program), || panic!("python must not be asked")).unwrap();
        assert_eq!(from_setup.source, Source::Setup);

        let empty = tempfile::tempdir().unwrap();
        let error = find_among(Some(empty.path().as_os_str()), Some(&program), || None).unwrap_err();
        assert_eq!(error.message, "not a libtorch folder (from `LIBTORCH`): it has no `lib/libtorch_cpu.so`");

        let from_python = find_among(None, None, || Some(good.path().to_owned())).unwrap();
        assert_eq!(from_python.source, Source::Python);
    }

    #[test]
    fn nothing_found_says_how_to_get_it() {
        let error = find_among(None, None, || None).unwrap_err();
        assert_eq!((error.message.as_str(), error.exit_code()), ("no libtorch found", 2));
        assert!(error.hints[0].contains("cargo xtask setup") && error.hints[0].contains("LIBTORCH"));
    }
}
