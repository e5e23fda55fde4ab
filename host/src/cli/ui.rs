//! What is printed, and where. Colour only on a terminal; a reader that has gone away is not an error.

use std::io::{ErrorKind, Write};

use crate::config::Notice;
use crate::error::{Error, Result};

const RED: &str = "\x1b[1;31m";
const YELLOW: &str = "\x1b[33m";
const CYAN: &str = "\x1b[36m";
const RESET: &str = "\x1b[0m";

/// Writes data to stdout, with a line end.
pub fn out(text: &str) -> Result<()> {
    match writeln!(anstream::stdout().lock(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::run("cannot write to stdout").cause(error)),
        _ => Ok(()),
    }
}

/// Writes an error to stderr, its others after it.
pub fn error(error: &Error) {
    talk(&colour(&error.to_string()));
}

pub fn notices(notices: &[Notice]) {
    for notice in notices {
        talk(&format!("{YELLOW}notice:{RESET} {} ({})", notice.message, notice.location));
    }
}

/// What happens to a run, a line at a time.
pub fn say(text: &str) {
    talk(text);
}

fn talk(text: &str) {
    // There is nowhere left to say that stderr is closed.
    let _ = writeln!(anstream::stderr().lock(), "{text}");
}

fn colour(text: &str) -> String {
    let line = |line: &str| {
        for (label, colour) in [("error:", RED), ("cause:", YELLOW), ("hint:", CYAN)] {
            if let Some(rest) = line.strip_prefix(label) {
                return format!("{colour}{label}{RESET}{rest}");
            }
        }
        line.to_owned()
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}
