//! The libtorch that everything compiles against, as a small view in `.libtorch/view`.
//!
//! The view is headers and the CPU half of one libtorch: a linker script stands in for `libtorch.so`, so that programs
//! link to `torch_cpu` and `c10` alone whatever else the folder holds; the GPU half is loaded at run time from the
//! folder itself. Sources, in this order: `LIBTORCH` of the user; what was laid out before; the active Python's torch;
//! the wheel from PyPI, of which only the CPU half is unpacked.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::setup::install_hint;
use crate::shell::{Failure, PathContext, Result, capture, command, run, works};

/// What `tch` binds; a patch release keeps the interface.
const SERIES: &str = "2.11.";
const WHEELS: [&str; 3] = ["torch==2.11.0", "nvidia-cuda-runtime==13.0.*", "nvidia-cuda-cupti==13.0.*"];
const VIEW: &str = ".libtorch/view";

/// Where a view is to be made from.
pub enum Plan {
    Folder(PathBuf),
    Wheel,
}

/// `LIBTORCH` as the user set it; `.cargo/config.toml` sets it to the view otherwise.
pub fn chosen_by_user(root: &Path) -> Option<PathBuf> {
    let value = PathBuf::from(std::env::var_os("LIBTORCH").filter(|value| !value.is_empty())?);
    (value != root.join(VIEW) && value != Path::new(VIEW)).then_some(value)
}

/// Decides what there is to do; `None`: nothing.
pub fn plan(root: &Path) -> Result<Option<Plan>> {
    let view = root.join(VIEW);
    let laid_from = complete(&view).then(|| fs::read_to_string(view.join("source")).unwrap_or_default());
    if let Some(folder) = chosen_by_user(root) {
        check_folder(&folder)?;
        let done = laid_from.is_some_and(|from| Path::new(from.trim()) == folder);
        return Ok((!done).then_some(Plan::Folder(folder)));
    }
    if laid_from.is_some() {
        return Ok(None);
    }
    let python = python_torch(root).filter(|folder| check_folder(folder).is_ok());
    Ok(Some(python.map_or(Plan::Wheel, Plan::Folder)))
}

pub fn check_tools(plan: &Plan) -> Result<()> {
    if matches!(plan, Plan::Folder(_)) {
        return Ok(());
    }
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Err(Failure::new("libtorch is fetched for x86-64 Linux only")
            .hint(format!("set LIBTORCH to a libtorch {SERIES}* or the `torch` folder of a Python that has it")));
    }
    check_pip("libtorch")
}

/// Whether `what` can be fetched from PyPI.
pub fn check_pip(what: &str) -> Result<()> {
    const BOTH: &str = "python3 python3-pip";
    if !works("python3", &["--version"]) {
        return Err(Failure::new(format!("no python3, which fetches {what} from PyPI: {}", install_hint(BOTH, BOTH))));
    }
    if !works("python3", &["-m", "pip", "--version"]) {
        return Err(Failure::new(format!(
            "no pip, which fetches {what} from PyPI: {}",
            install_hint("python3-pip", "python3-pip")
        )));
    }
    Ok(())
}

pub fn lay_out(root: &Path, plan: &Plan) -> Result<()> {
    let dir = root.join(".libtorch");
    fs::create_dir_all(&dir).path_context("create", &dir)?;
    match plan {
        Plan::Folder(folder) => lay_view(root, folder, &folder.display().to_string()),
        Plan::Wheel => {
            fetch_wheel(root)?;
            lay_view(root, &dir.join("torch"), "wheel")
        }
    }?;
    println!("laid out: {}", describe(root)?);
    Ok(())
}

/// One phrase about the view, for a person.
pub fn describe(root: &Path) -> Result<String> {
    let view = root.join(VIEW);
    let version = version(&view).ok_or_else(|| Failure::new(format!("`{}` has no version", view.display())))?;
    match fs::read_to_string(view.join("source")) {
        Ok(source) if source.trim() != "wheel" => Ok(format!("libtorch {version} of `{}`", source.trim())),
        _ => Ok(format!("libtorch {version}")),
    }
}

fn complete(view: &Path) -> bool {
    let files =
        ["lib/libtorch_cpu.so", "lib/libc10.so", "lib/libtorch.so", "include/torch/csrc/api/include/torch/torch.h"];
    version(view).is_some_and(|version| version.starts_with(SERIES))
        && files.iter().all(|file| view.join(file).exists())
}

fn check_folder(folder: &Path) -> Result<()> {
    let shown = folder.display();
    let hint =
        format!("set LIBTORCH to a libtorch {SERIES}* or the `torch` folder of a Python that has it, or unset it");
    for file in ["lib/libtorch_cpu.so", "lib/libc10.so", "include/torch/csrc/api/include/torch/torch.h"] {
        if !folder.join(file).exists() {
            return Err(
                Failure::new(format!("`{shown}` is not a libtorch to build with: it has no `{file}`")).hint(hint)
            );
        }
    }
    match version(folder) {
        Some(version) if version.starts_with(SERIES) => Ok(()),
        Some(version) => Err(Failure::new(format!("`{shown}` is libtorch {version}, {SERIES}* is needed")).hint(hint)),
        None => Err(Failure::new(format!("`{shown}` has neither `build-version` nor `version.py`")).hint(hint)),
    }
}

/// libtorch archives have `build-version`, Python's package `version.py`.
fn version(folder: &Path) -> Option<String> {
    if let Ok(version) = fs::read_to_string(folder.join("build-version")) {
        return Some(version.trim().to_owned());
    }
    let text = fs::read_to_string(folder.join("version.py")).ok()?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("__version__"))?;
    Some(line.split(['\'', '"']).nth(1)?.to_owned())
}

/// The active Python's torch folder, found without importing it (that takes seconds).
fn python_torch(root: &Path) -> Option<PathBuf> {
    let script =
        "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')";
    let folder = capture(command(root, "python3").args(["-c", script])).ok()?;
    let folder = folder.trim();
    (!folder.is_empty()).then(|| PathBuf::from(folder))
}

fn fetch_wheel(root: &Path) -> Result<()> {
    let dir = root.join(".libtorch");
    if dir.join("torch/version.py").is_file() && dir.join("nvidia/cu13/lib").is_dir() {
        return Ok(());
    }
    println!("fetching libtorch (550 MB) from PyPI");
    fetch(root, &WHEELS, &[("nvidia", "nvidia"), ("torch", "torch")])
}

/// The library that moves tensors between NVIDIA's GPUs, for the tests: no build and no program here needs it.
pub fn fetch_nccl(root: &Path) -> Result<()> {
    if root.join(".libtorch/nccl/lib/libnccl.so.2").is_file() {
        return Ok(());
    }
    println!("fetching NCCL (250 MB) from PyPI");
    fetch(root, &["nvidia-nccl-cu13==2.28.*"], &[("nvidia/nccl", "nccl")])
}

/// Downloads `wheels` and puts folders of them into `.libtorch`, by the names beside them.
fn fetch(root: &Path, wheels: &[&str], parts: &[(&str, &str)]) -> Result<()> {
    let dir = root.join(".libtorch");
    let mut pip = command(root, "python3");
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".libtorch/.download", "--only-binary=:all:"]);
    // Any Python will do for the download: the version only names a wheel, whose libraries are the same in all.
    pip.args(["--python-version", "3.11"]);
    for version in ["_2_28", "_2_25", "_2_18", "_2_17", "2014"] {
        pip.args(["--platform", &format!("manylinux{version}_x86_64")]);
    }
    run(pip.args(wheels)).map_err(|failure| failure.hint("check the network and pip's index, then run it again"))?;
    // Unpacked beside its place and renamed, so that half an archive is never taken for a whole one.
    capture(command(root, "python3").args(["-c", UNPACK, ".libtorch/.download", ".libtorch/.unpacked"]))?;
    for (part, name) in parts {
        let (from, to) = (dir.join(".unpacked").join(part), dir.join(name));
        let _ = fs::remove_dir_all(&to);
        fs::rename(&from, &to).path_context("create", &to)?;
    }
    for scratch in [".unpacked", ".download"] {
        let scratch = dir.join(scratch);
        fs::remove_dir_all(&scratch).path_context("remove", &scratch)?;
    }
    Ok(())
}

/// The CPU half of the wheel, its headers, the two NVIDIA libraries that `libtorch_cpu.so` names, and NCCL.
const UNPACK: &str = r#"
import pathlib, shutil, sys, zipfile
downloads, target = map(pathlib.Path, sys.argv[1:])
shutil.rmtree(target, ignore_errors=True)
exact = {"torch/version.py", "torch/lib/libtorch_cpu.so", "torch/lib/libc10.so", "torch/lib/libgomp.so.1"}
for wheel in sorted(downloads.glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name in exact or name.startswith(("torch/include/", "nvidia/cu13/lib/", "nvidia/nccl/lib/libnccl.so")):
                archive.extract(name, target)
"#;

/// Libraries that stay out of the view: `libtorch.so` pulls in the GPU half, and `torch-sys` links what it sees of it.
const LEFT_OUT: [&str; 5] = ["libtorch.so", "libtorch_cuda", "libtorch_hip", "libtorch_python", "libtorch_global_deps"];

fn lay_view(root: &Path, folder: &Path, source: &str) -> Result<()> {
    let folder = fs::canonicalize(folder).path_context("open", folder)?;
    let dir = root.join(".libtorch");
    let new = dir.join(".view-new");
    let _ = fs::remove_dir_all(&new);
    let lib = new.join("lib");
    fs::create_dir_all(&lib).path_context("create", &lib)?;
    // Links inside `.libtorch` are relative, so that the checkout can be moved.
    let inside = folder.strip_prefix(fs::canonicalize(&dir).path_context("open", &dir)?).ok();
    let target =
        |up: &str, name: &str| inside.map_or(folder.join(name), |inside| Path::new(up).join(inside).join(name));
    let link = |target: PathBuf, place: PathBuf| symlink(target, &place).path_context("link", &place);
    link(target("..", "include"), new.join("include"))?;
    let libraries = folder.join("lib");
    for file in fs::read_dir(&libraries).path_context("read", &libraries)?.flatten() {
        let name = file.file_name().to_string_lossy().into_owned();
        if name.contains(".so") && !LEFT_OUT.iter().any(|left_out| name.starts_with(left_out)) {
            link(target("../..", &format!("lib/{name}")), lib.join(&name))?;
        }
    }
    // Beside a Python's torch lie the libraries its `libtorch_cpu.so` finds by `../../nvidia`.
    if inside.is_none()
        && let Some(nvidia) = folder.parent().map(|packages| packages.join("nvidia")).filter(|nvidia| nvidia.is_dir())
    {
        let _ = fs::remove_file(dir.join("nvidia"));
        if !dir.join("nvidia").exists() {
            link(nvidia, dir.join("nvidia"))?;
        }
    }
    let write = |name: &str, text: &str| fs::write(new.join(name), text).path_context("write", &new.join(name));
    write("lib/libtorch.so", "GROUP ( libtorch_cpu.so libc10.so )\n")?;
    let version = version(&folder).ok_or_else(|| Failure::new(format!("`{}` has no version", folder.display())))?;
    write("build-version", &version)?;
    write("source", source)?;
    let view = root.join(VIEW);
    let _ = fs::remove_dir_all(&view);
    fs::rename(&new, &view).path_context("create", &view)
}
