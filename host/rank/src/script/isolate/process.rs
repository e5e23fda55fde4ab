//! The worker's end of a template's process.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Once;

use host::config::plan::{GuestLimits, GuestRef};
use host::data::template::{Outcome, Row, RowTemplate};
use host::error::Kind;
use host::{Error, Result};
use rustix::process::Signal;
use signal_hook::low_level::signal_name;

use super::super::guest::{Blame, World};
use super::super::log::{GuestLog, clean_line};
use super::super::template::{batch_len, rows_place};
use super::protocol::{self, Answer, Opening, Request};

/// Lines of a dead process's last words that an error shows.
const MAX_LAST_WORDS: usize = 3;

/// A template in a process that was started for it and is killed with it.
pub struct Process {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// What it says besides, such as why it dies: a file that is memory, so that it never has to be waited for.
    last_words: File,
    log: GuestLog,
    blame: Blame,
    memory_mb: usize,
    /// The first error; the process is of no use after it.
    failure: Option<Error>,
}

impl Process {
    /// Starts `program`, a `host-rank`, for a template.
    pub fn start(program: &Path, guest: &GuestRef, bytes: &[u8], limits: &GuestLimits) -> Result<Self> {
        let name = guest.path.display().to_string();
        let cannot = |cause: &dyn std::fmt::Display| {
            Error::run(format!("cannot start a process for the template `{name}`")).cause(cause)
        };
        let last_words = rustix::fs::memfd_create("last-words", rustix::fs::MemfdFlags::CLOEXEC);
        let last_words = File::from(last_words.map_err(|error| cannot(&error))?);
        let mut command = Command::new(program);
        command.args(["--template", &std::process::id().to_string()]).env_clear().current_dir("/");
        // All it needs of an environment: this program is linked to libtorch.
        command.envs(std::env::var_os("LD_LIBRARY_PATH").map(|path| ("LD_LIBRARY_PATH", path)));
        // A terminal's Ctrl-C is for the run, which ends its templates itself.
        command.process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(last_words.try_clone().map_err(|error| cannot(&error))?);
        let mut child = command.spawn().map_err(|error| cannot(&error))?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::bug("a process was started without pipes"));
        };
        let mut process = Self {
            child,
            requests,
            answers: BufReader::new(answers),
            last_words,
            log: GuestLog::new(&name, limits.log_lines),
            blame: Blame { world: World::Template, path: guest.path.clone(), place: None },
            memory_mb: limits.memory_mb,
            failure: None,
        };
        let named = GuestRef { path: name.as_str().into(), settings: guest.settings.clone() };
        let named = serde_json::to_string(&named).map_err(|error| cannot(&error))?;
        let opening = Opening { guest: named, bytes: bytes.to_vec(), limits: limits.clone() };
        match process.ask(&Request::Open(opening))? {
            Answer::Opened { missing } => warn_of(&missing),
            _ => return Err(process.misspoken()),
        }
        Ok(process)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request and takes its answer, unless an earlier one failed.
    fn ask(&mut self, request: &Request) -> Result<Answer> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.exchange(request).inspect_err(|error| self.failure = Some(error.clone()))
    }

    fn exchange(&mut self, request: &Request) -> Result<Answer> {
        if protocol::write(&mut self.requests, request).is_err() {
            return Err(self.died());
        }
        // What it may hold, it may say.
        let longest = (self.memory_mb as u64) << 20;
        loop {
            match protocol::read(&mut self.answers, longest) {
                Ok(Some(Answer::Line(line))) => self.log.line(&line),
                Ok(Some(Answer::Failed(error))) => return Err(harmless(error)),
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => return Err(self.died()),
                Err(error) => return Err(self.misspoken().cause(error)),
            }
        }
    }

    /// An answer that this program would not give.
    fn misspoken(&mut self) -> Error {
        let error = self.blame.error().cause("its process answered something else than was asked");
        self.failure.insert(error).clone()
    }

    /// The process has closed its end, which it cannot do but by ending.
    fn died(&mut self) -> Error {
        let status = match self.child.wait() {
            Ok(status) => status,
            Err(error) => return self.blame.error().cause("its process is gone").cause(error),
        };
        let mut text = vec![];
        let _ = self.last_words.rewind().and_then(|()| (&self.last_words).read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text);
        let last_words: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        end_of(self.blame.error(), status, &last_words, self.memory_mb)
    }
}

impl RowTemplate for Process {
    fn renew(&mut self) -> Result<()> {
        match self.ask(&Request::Renew)? {
            Answer::Renewed => Ok(()),
            _ => Err(self.misspoken()),
        }
    }

    fn configure(&mut self, columns: &[String]) -> Result<Vec<String>> {
        self.blame.place = Some(format!("on the columns {}", columns.join(", ")));
        match self.ask(&Request::Configure(columns.to_vec()))? {
            Answer::Columns(columns) => Ok(columns),
            _ => Err(self.misspoken()),
        }
    }

    fn render(&mut self, rows: Vec<Row>) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(rows.len());
        let mut rest = rows;
        while !rest.is_empty() {
            let later = rest.split_off(batch_len(&rest));
            self.blame.place = rows_place(&rest);
            let needed = rest.len();
            match self.ask(&Request::Render(rest))? {
                Answer::Outcomes(of_batch) if of_batch.len() == needed => {
                    outcomes.extend(of_batch.into_iter().map(clean_reason))
                }
                _ => return Err(self.misspoken()),
            }
            rest = later;
        }
        Ok(outcomes)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says how the process ended.
fn end_of(error: Error, status: ExitStatus, last_words: &[&str], memory_mb: usize) -> Error {
    // What Rust and C++ say before they abort.
    let ran_out = |line: &&str| line.starts_with("memory allocation of ") || line.contains("std::bad_alloc");
    if last_words.iter().any(ran_out) {
        return error
            .cause(format!(
                "its process had no more memory: the guest's {memory_mb} MiB and what it needs itself are used"
            ))
            .hint("look for a value that grows and grows; `limits.memory_mb` raises the limit");
    }
    let (cause, signal) = match status.signal() {
        None => (format!("its process ended by itself, {status}"), None),
        Some(signal) => {
            let name = signal_name(signal).map(|name| format!(" ({name})")).unwrap_or_default();
            (format!("its process was killed by signal {signal}{name}"), Signal::from_named_raw(signal))
        }
    };
    let error = error.cause(cause);
    match signal {
        Some(Signal::SYS) => error
            .cause("it made a system call that no template makes")
            .hint("do not run this template without `isolate`: it may have tried to break out of its engine"),
        Some(Signal::KILL) => error
            .cause("nobody here sent it; the kernel does when memory runs out (`dmesg` then shows `Out of memory`)")
            .hint("end other programs, or lower `limits.memory_mb`"),
        _ => {
            let shown = &last_words[last_words.len().saturating_sub(MAX_LAST_WORDS)..];
            shown.iter().fold(error, |error, line| error.cause(clean_line(line)))
        }
    }
}

/// Says once what this kernel cannot do.
fn warn_of(missing: &[String]) {
    static ONCE: Once = Once::new();
    if !missing.is_empty() {
        let missing = missing.iter().map(|name| clean_line(name)).collect::<Vec<_>>().join(" and ");
        ONCE.call_once(|| {
            tracing::warn!(
                "this kernel has no {missing}: `isolate` holds templates without it, by their engine, a process and a memory limit"
            );
        });
    }
}

fn clean_reason(outcome: Outcome) -> Outcome {
    match outcome {
        kept @ (Outcome::Keep(_) | Outcome::Pair(_)) => kept,
        Outcome::Skip(reason) => Outcome::Skip(clean_line(&reason)),
        Outcome::Fail(reason) => Outcome::Fail(clean_line(&reason)),
    }
}

/// An error of a process that may have been taken over, as text that is safe to show.
fn harmless(error: Error) -> Error {
    let text = |text: &String| text.lines().map(clean_line).collect::<Vec<_>>().join("\n");
    Error {
        // The others are about the run.
        kind: if matches!(error.kind, Kind::Config | Kind::Bug) { error.kind } else { Kind::Run },
        message: text(&error.message),
        causes: error.causes.iter().map(text).collect(),
        hints: error.hints.iter().map(text).collect(),
        ..error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_explained() {
        let of = |status: i32, last_words: &[&str]| {
            end_of(Error::run("it failed"), ExitStatus::from_raw(status), last_words, 256).to_string()
        };
        insta::assert_snapshot!(of(libc::SIGSYS, &[]), @"
        error: it failed
        cause: its process was killed by signal 31 (SIGSYS)
        cause: it made a system call that no template makes
        hint: do not run this template without `isolate`: it may have tried to break out of its engine
        ");
        insta::assert_snapshot!(of(libc::SIGABRT, &["memory allocation of 9 bytes failed"]), @"
        error: it failed
        cause: its process had no more memory: the guest's 256 MiB and what it needs itself are used
        hint: look for a value that grows and grows; `limits.memory_mb` raises the limit
        ");
        insta::assert_snapshot!(of(libc::SIGABRT, &["a", "b", "\u{1b}c", "thread 'main' has overflowed its stack"]), @"
        error: it failed
        cause: its process was killed by signal 6 (SIGABRT)
        cause: b
        cause: �c
        cause: thread 'main' has overflowed its stack
        ");
        insta::assert_snapshot!(of(127 << 8, &["libtorch_cpu.so: cannot open shared object file"]), @"
        error: it failed
        cause: its process ended by itself, exit status: 127
        cause: libtorch_cpu.so: cannot open shared object file
        ");
    }
}
