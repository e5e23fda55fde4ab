//! The one error type that reaches a person: what failed, where, why, and what to do.
//!
//! Layers below build it directly; nobody below [`crate::cli`] prints. It is serialisable because a worker hands its own
//! to the launcher, which is the only process that prints it (`rank` says whose it is).

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The command line, the config, or a file the config names: found before the first step. Exit code 2.
    Config,
    /// The run failed. Exit code 1.
    Run,
    /// Stopped by Ctrl-C or SIGTERM, state saved. Exit code 130.
    Interrupted,
    /// Another rank is the cause: the launcher reports that rank's own error instead of this one. Exit code 1.
    Peer,
    /// A defect of `host`. Exit code 101.
    Bug,
}

/// A place in a file somebody wrote. Line and column count from 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    pub file: PathBuf,
    pub line: Option<usize>,
    pub column: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    pub kind: Kind,
    /// What failed: lower case, no full stop, literals in backticks.
    pub message: String,
    /// `-->` lines.
    pub locations: Vec<Location>,
    /// `cause:` lines, nearest first.
    pub causes: Vec<String>,
    /// `hint:` lines, each one action that works.
    pub hints: Vec<String>,
    /// The rank that failed, when there are several and not all failed alike.
    pub rank: Option<usize>,
    /// Further independent mistakes found in the same pass.
    pub others: Vec<Error>,
}

impl Error {
    /// The hint of a defect.
    pub const REPORT: &str = "this is a defect of `host`: please report it with the config";

    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            locations: vec![],
            causes: vec![],
            hints: vec![],
            rank: None,
            others: vec![],
        }
    }

    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Kind::Config, message)
    }

    pub fn run(message: impl Into<String>) -> Self {
        Self::new(Kind::Run, message)
    }

    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(Kind::Bug, message)
    }

    pub fn interrupted(message: impl Into<String>) -> Self {
        Self::new(Kind::Interrupted, message)
    }

    pub fn at(mut self, file: impl Into<PathBuf>, line: Option<usize>, column: Option<usize>) -> Self {
        self.locations.push(Location { file: file.into(), line, column });
        self
    }

    pub fn at_file(self, file: impl Into<PathBuf>) -> Self {
        self.at(file, None, None)
    }

    pub fn cause(mut self, cause: impl fmt::Display) -> Self {
        self.causes.push(cause.to_string());
        self
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Folds several mistakes into one error; `None` when there are none.
    pub fn all(mut errors: Vec<Error>) -> Option<Error> {
        if errors.is_empty() {
            return None;
        }
        let mut first = errors.remove(0);
        first.others.append(&mut errors);
        Some(first)
    }

    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Config => 2,
            Kind::Run | Kind::Peer => 1,
            Kind::Interrupted => 130,
            Kind::Bug => 101,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
            if let Some(column) = self.column {
                write!(f, ":{column}")?;
            }
        }
        Ok(())
    }
}

/// The whole report as a terminal shows it, without the leading `error: ` colour.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", readable(&self.message))?;
        if let Some(rank) = self.rank {
            write!(f, " (rank {rank})")?;
        }
        for location in &self.locations {
            write!(f, "\n  --> {location}")?;
        }
        for cause in &self.causes {
            write!(f, "\ncause: {}", readable(cause))?;
        }
        for hint in &self.hints {
            write!(f, "\nhint: {}", readable(hint))?;
        }
        for other in &self.others {
            write!(f, "\n\n{other}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// `text`, cut where a damaged file that is quoted in it would fill screens.
fn readable(text: &str) -> Cow<'_, str> {
    const LONGEST: usize = 4000;
    match text.char_indices().nth(LONGEST) {
        None => Cow::Borrowed(text),
        Some((end, _)) => Cow::Owned(format!("{}… ({} more characters)", &text[..end], text[end..].chars().count())),
    }
}

/// `names` as a message lists them: `` `a`, `b` ``.
pub fn quoted(names: impl IntoIterator<Item = impl fmt::Display>) -> String {
    names.into_iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Gives a `std::io` error the file it happened on.
pub trait IoContext<T> {
    /// `doing` is a verb phrase: `cannot {doing} `{path}``.
    fn path_context(self, doing: &str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn path_context(self, doing: &str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|error| {
            let path = path.into();
            Error::run(format!("cannot {doing} `{}`", path.display())).cause(error)
        })
    }
}
