//! Running programs, and failures in the form the rest of the project prints them.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// What failed, why, and the command that helps.
#[derive(Debug)]
pub struct Failure {
    message: String,
    causes: Vec<String>,
    hints: Vec<String>,
    others: Vec<Failure>,
}

impl Failure {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), causes: vec![], hints: vec![], others: vec![] }
    }

    pub fn cause(mut self, cause: impl fmt::Display) -> Self {
        self.causes.push(cause.to_string());
        self
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Several independent ones as one; `Ok` when there are none.
    pub fn all(failures: impl IntoIterator<Item = Failure>) -> Result<()> {
        let mut failures = failures.into_iter();
        match failures.next() {
            None => Ok(()),
            Some(first) => Err(Failure { others: failures.collect(), ..first }),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        self.causes.iter().try_for_each(|cause| write!(f, "\ncause: {cause}"))?;
        self.hints.iter().try_for_each(|hint| write!(f, "\nhint: {hint}"))?;
        self.others.iter().try_for_each(|other| write!(f, "\n\n{other}"))
    }
}

/// `cannot {doing} `{path}``, for file operations.
pub trait PathContext<T> {
    fn path_context(self, doing: &str, path: &Path) -> Result<T>;
}

impl<T> PathContext<T> for std::io::Result<T> {
    fn path_context(self, doing: &str, path: &Path) -> Result<T> {
        self.map_err(|error| Failure::new(format!("cannot {doing} `{}`", path.display())).cause(error))
    }
}

/// Returns the repository root.
pub fn root() -> PathBuf {
    // Cargo sets it for what it runs; the compiled-in one serves a binary that is started by hand.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(manifest).ancestors().nth(2).map(Path::to_owned).unwrap_or_default()
}

/// A command that runs in the repository root.
pub fn command(root: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root).stdin(Stdio::null());
    command
}

pub fn cargo(root: &Path) -> Command {
    command(root, std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The built `host`. Cargo gives this program `LIBTORCH`, the view to compile against; what `host` loads is for `host`
/// to find, unless the user chose.
pub fn host(root: &Path) -> Command {
    let mut host = command(root, "target/release/host");
    if crate::libtorch::chosen_by_user(root).is_none() {
        host.env_remove("LIBTORCH");
    }
    host
}

/// Shows the command as a person would type it and runs it with our terminal.
pub fn run(command: &mut Command) -> Result<()> {
    println!("$ {}", shown(command));
    let status = command.status().map_err(|error| not_started(command, &error))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::new(format!("`{}` failed: {status}", shown(command))))
}

/// Runs quietly and returns what it printed; its error output is in the failure.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|error| not_started(command, &error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last: Vec<_> = stderr.trim().lines().rev().take(8).collect();
    let last: Vec<_> = last.into_iter().rev().collect();
    Err(Failure::new(format!("`{}` failed: {}", shown(command), output.status)).cause(last.join("\n")))
}

/// Whether a program starts at all.
pub fn works(program: &str, args: &[&str]) -> bool {
    let command = &mut Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn not_started(command: &Command, error: &std::io::Error) -> Failure {
    Failure::new(format!("cannot start `{}`", command.get_program().to_string_lossy())).cause(error)
}

/// The command as a person would type it, with our programs and cargo by their names.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let ours = program.starts_with("target/release") || program.ends_with("cargo");
    let program = if ours { program.file_name().unwrap_or_default() } else { program.as_os_str() };
    let words = std::iter::once(program).chain(command.get_args()).map(|word| quoted(&word.to_string_lossy()));
    words.collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Whether we run as root (containers do): then apt needs no `sudo`, but its own sandbox user switched off.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}
