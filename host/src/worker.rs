//! What the launcher and a worker agree on: the environment a worker starts in, its report when it fails, its signals.
//!
//! Both sides use this one definition, [`WorkerEnv::apply_to`] to write and [`WorkerEnv::read`] to read. The names of
//! rank and rendezvous are torchrun's, so that torchrun, Slurm or Kubernetes can take the launcher's place.
//!
//! A worker's signal handlers only set a flag, however often a signal comes: a terminal's Ctrl-C reaches every process of
//! the group and the launcher forwards it as well. Only the launcher counts, and ends a run that will not stop.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use crate::error::{Error, IoContext, Result};
use crate::panics;

pub const RANK: &str = "RANK";
pub const LOCAL_RANK: &str = "LOCAL_RANK";
pub const WORLD_SIZE: &str = "WORLD_SIZE";
pub const LOCAL_WORLD_SIZE: &str = "LOCAL_WORLD_SIZE";
pub const MASTER_ADDR: &str = "MASTER_ADDR";
pub const MASTER_PORT: &str = "MASTER_PORT";
/// The folder that holds `libtorch_cpu.so`; GPU halves are loaded from the same one.
pub const HOST_LIBTORCH: &str = "HOST_LIBTORCH";
/// The file a failing worker writes its [`Report`] to.
pub const HOST_REPORT: &str = "HOST_REPORT";
/// How many times the run was restarted: torchrun's count, and ours.
pub const RESTART_COUNT: &str = "TORCHELASTIC_RESTART_COUNT";
/// torchrun's word for a store that it serves itself at `MASTER_PORT`: `True`.
pub const USE_AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";
/// How many seconds ranks wait for each other to come.
pub const HOST_RDZV_TIMEOUT: &str = "HOST_RDZV_TIMEOUT";
/// The launcher's process id.
pub const HOST_LAUNCHER: &str = "HOST_LAUNCHER";

/// Where a worker stands in its group, and how it reaches the others and the launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerEnv {
    pub rank: usize,
    pub local_rank: usize,
    pub world_size: usize,
    pub local_world_size: usize,
    pub master_addr: String,
    pub master_port: u16,
    pub rendezvous: Rendezvous,
    pub libtorch_lib: PathBuf,
    /// `None` when no launcher waits for a report.
    pub report: Option<PathBuf>,
}

/// How ranks meet at the master's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// Ranks of one attempt meet each other, and nobody who is late from the one before.
    pub attempt: usize,
    pub timeout: Duration,
    /// Whoever started the ranks serves the store; otherwise rank 0 does.
    pub has_store: bool,
}

impl Default for Rendezvous {
    fn default() -> Self {
        Self { attempt: 0, timeout: Duration::from_secs(5 * 60), has_store: false }
    }
}

impl Rendezvous {
    pub(crate) fn read(var: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let default = Self::default();
        Ok(Self {
            attempt: number(&var, RESTART_COUNT)?.unwrap_or(default.attempt),
            timeout: number(&var, HOST_RDZV_TIMEOUT)?.map_or(default.timeout, Duration::from_secs),
            has_store: var(USE_AGENT_STORE).is_some_and(|value| value == "True"),
        })
    }
}

impl WorkerEnv {
    pub fn read() -> Result<Self> {
        Self::from_vars(|name| std::env::var_os(name))
    }

    /// Reads the variables through `var`; without a rank it is a group of one.
    pub(crate) fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let group = GroupVars::read(&var)?.unwrap_or_default();
        let libtorch_lib = var(HOST_LIBTORCH).map(PathBuf::from).ok_or_else(|| {
            Error::config(format!("`{HOST_LIBTORCH}` is not set, so the worker does not know its libtorch folder"))
                .hint("start workers through `host run`, also below torchrun, Slurm or Kubernetes")
        })?;
        Ok(Self {
            rank: group.rank,
            local_rank: group.local_rank,
            world_size: group.world_size,
            local_world_size: group.local_world_size,
            master_addr: group.master_addr,
            master_port: group.master_port,
            rendezvous: Rendezvous::read(&var)?,
            libtorch_lib,
            report: var(HOST_REPORT).map(PathBuf::from),
        })
    }

    /// Writes the variables that [`WorkerEnv::read`] reads.
    pub fn apply_to(&self, command: &mut Command) {
        let Self {
            rank,
            local_rank,
            world_size,
            local_world_size,
            master_addr,
            master_port,
            rendezvous: Rendezvous { attempt, timeout, has_store },
            libtorch_lib,
            report,
        } = self;
        command
            .env(RANK, rank.to_string())
            .env(LOCAL_RANK, local_rank.to_string())
            .env(WORLD_SIZE, world_size.to_string())
            .env(LOCAL_WORLD_SIZE, local_world_size.to_string())
            .env(MASTER_ADDR, master_addr)
            .env(MASTER_PORT, master_port.to_string())
            .env(RESTART_COUNT, attempt.to_string())
            .env(USE_AGENT_STORE, if *has_store { "True" } else { "False" })
            .env(HOST_RDZV_TIMEOUT, timeout.as_secs().to_string())
            .env(HOST_LIBTORCH, libtorch_lib)
            .env(HOST_LAUNCHER, std::process::id().to_string());
        match report {
            Some(path) => command.env(HOST_REPORT, path),
            None => command.env_remove(HOST_REPORT),
        };
    }

    /// Hands this worker's own failure to the launcher; the last call wins.
    pub fn report(&self, error: &Error) -> Result<()> {
        self.write_report(error, false)
    }

    /// Hands over a failure that only follows from another rank's: a lost connection, a collective that was given up.
    pub fn report_secondary(&self, error: &Error) -> Result<()> {
        self.write_report(error, true)
    }

    fn write_report(&self, error: &Error, secondary: bool) -> Result<()> {
        let Some(path) = &self.report else { return Ok(()) };
        let mut error = error.clone();
        if self.world_size > 1 {
            error.rank.get_or_insert(self.rank);
        }
        Report { error, secondary, since_epoch: since_epoch() }.write(path)
    }

    /// Makes a panic a report of a defect, with rank, message and place.
    ///
    /// Nothing is printed where a launcher waits for the report, as it prints it, unless `RUST_BACKTRACE` asks for more.
    pub fn install_panic_hook(&self) {
        let env = self.clone();
        let print = std::panic::take_hook();
        let wants_backtrace = std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0");
        std::panic::set_hook(Box::new(move |info| {
            if panics::is_expected() {
                return;
            }
            let reported = env.report.is_some() && env.report(&panic_error(info)).is_ok();
            if !reported || wants_backtrace {
                print(info);
            }
        }));
    }

    /// Makes the kernel end this process when its launcher is gone, even by SIGKILL.
    ///
    /// Call it first in `main`. Without a launcher it does nothing.
    pub fn die_with_launcher() -> Result<()> {
        let Some(launcher) = std::env::var(HOST_LAUNCHER).ok().and_then(|pid| pid.parse::<i32>().ok()) else {
            return Ok(());
        };
        die_with_parent(launcher)
    }
}

/// Makes the kernel end this process when the thread of `parent` that started it is gone.
pub fn die_with_parent(parent: i32) -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| Error::run("cannot bind this process's life to the one that started it").cause(error))?;
    // It may have died before the line above: the kernel then has no death left to tell of.
    if Pid::as_raw(rustix::process::getppid()) != parent {
        return Err(Error::run(format!("process {parent}, which started this one, is gone")));
    }
    Ok(())
}

fn panic_error(info: &std::panic::PanicHookInfo<'_>) -> Error {
    let message = info.payload_as_str().unwrap_or("a panic without a message");
    let error = Error::bug(format!("internal error: {message}"))
        .hint("this is a defect of `host`: please report it with the config; `RUST_BACKTRACE=1` shows the way to it");
    match info.location() {
        Some(place) => error.at(place.file(), Some(place.line() as usize), Some(place.column() as usize)),
        None => error,
    }
}

/// torchrun's variables, as somebody set them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct GroupVars {
    pub rank: usize,
    pub local_rank: usize,
    pub world_size: usize,
    pub local_world_size: usize,
    pub master_addr: String,
    pub master_port: u16,
}

impl Default for GroupVars {
    fn default() -> Self {
        let master_addr = "127.0.0.1".to_owned();
        Self { rank: 0, local_rank: 0, world_size: 1, local_world_size: 1, master_addr, master_port: 0 }
    }
}

impl GroupVars {
    /// Returns `None` where neither `RANK` nor `WORLD_SIZE` is set.
    pub fn read(var: impl Fn(&str) -> Option<OsString>) -> Result<Option<Self>> {
        let (rank, world_size): (usize, usize) = match (number(&var, RANK)?, number(&var, WORLD_SIZE)?) {
            (None, None) => return Ok(None),
            (Some(rank), Some(world_size)) => (rank, world_size),
            (None, Some(_)) => return Err(incomplete(WORLD_SIZE, RANK)),
            (Some(_), None) => return Err(incomplete(RANK, WORLD_SIZE)),
        };
        if rank >= world_size {
            return Err(Error::config(format!("`{RANK}={rank}` is outside a group of `{WORLD_SIZE}={world_size}`"))
                .hint(format!("ranks count from 0 to {}", world_size.saturating_sub(1))));
        }
        // A group of one has nobody to meet, so it needs no address.
        let mut group = Self { rank, world_size, ..Self::default() };
        if world_size > 1 {
            group.master_addr = text(&var, MASTER_ADDR)?
                .ok_or_else(|| incomplete(&format!("{WORLD_SIZE}={world_size}"), MASTER_ADDR))?;
            group.master_port = number(&var, MASTER_PORT)?
                .ok_or_else(|| incomplete(&format!("{WORLD_SIZE}={world_size}"), MASTER_PORT))?;
        }
        group.local_rank = number(&var, LOCAL_RANK)?.unwrap_or(0);
        group.local_world_size = number(&var, LOCAL_WORLD_SIZE)?.unwrap_or(group.local_rank + 1);
        if group.local_rank >= group.local_world_size {
            let (local_rank, count) = (group.local_rank, group.local_world_size);
            return Err(Error::config(format!("`{LOCAL_RANK}={local_rank}` is outside `{LOCAL_WORLD_SIZE}={count}`"))
                .hint(format!("local ranks count from 0 to {}", count.saturating_sub(1))));
        }
        Ok(Some(group))
    }
}

fn incomplete(set: &str, missing: &str) -> Error {
    Error::config(format!("`{set}` is set in the environment, but `{missing}` is not")).hint(format!(
        "set `{missing}` to join a group that somebody else starts, or unset `{RANK}` and `{WORLD_SIZE}`"
    ))
}

fn text(var: impl Fn(&str) -> Option<OsString>, name: &str) -> Result<Option<String>> {
    var(name)
        .map(|value| {
            value.into_string().map_err(|value| Error::config(format!("`{name}` is not text: {}", value.display())))
        })
        .transpose()
}

fn number<T: std::str::FromStr>(var: impl Fn(&str) -> Option<OsString>, name: &str) -> Result<Option<T>> {
    text(var, name)?
        .map(|value| {
            let number = value.trim().parse();
            number.map_err(|_| Error::config(format!("`{name}` is `{value}`, where a whole number is needed")))
        })
        .transpose()
}

/// What a failing worker leaves for the launcher.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub error: Error,
    /// It failed because another rank did.
    pub secondary: bool,
    /// The first to fail is the one to name; all workers of a launcher share its clock.
    pub since_epoch: Duration,
}

impl Report {
    fn write(&self, path: &Path) -> Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            serde_json::to_writer(&mut file, self)?;
            file.flush()?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(())
        };
        write().path_context("write the report", path)
    }

    /// Returns `None` where the worker left none, or none that can be read.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }
}

pub(crate) fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Set once somebody asked this worker to stop.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Turns SIGINT and SIGTERM into a flag that the training loop asks between steps.
pub fn install_signals() -> Result<StopFlag> {
    let flag = StopFlag::default();
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, flag.0.clone())
            .map_err(|error| Error::run("cannot install a signal handler").cause(error))?;
    }
    Ok(flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(pairs: &[(&str, &str)]) -> impl Fn(&str) -> Option<OsString> {
        let pairs: Vec<_> = pairs.iter().map(|(name, value)| (name.to_string(), OsString::from(value))).collect();
        move |name| pairs.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    fn env(report: Option<PathBuf>) -> WorkerEnv {
        WorkerEnv {
            rank: 3,
            local_rank: 1,
            world_size: 4,
            local_world_size: 2,
            master_addr: "node0".into(),
            master_port: 29500,
            rendezvous: Rendezvous { attempt: 2, timeout: Duration::from_secs(7), has_store: true },
            libtorch_lib: "torch/lib".into(),
            report,
        }
    }

    #[test]
    fn what_the_launcher_writes_the_worker_reads() {
        let written = env(Some("report.json".into()));
        let mut command = Command::new("worker");
        written.apply_to(&mut command);
        let read = WorkerEnv::from_vars(|name| {
            command.get_envs().find(|(known, _)| *known == name).and_then(|(_, value)| value.map(OsString::from))
        });
        assert_eq!(read.unwrap(), written);
    }

    #[test]
    fn without_a_rank_it_is_a_group_of_one() {
        let env = WorkerEnv::from_vars(vars(&[(HOST_LIBTORCH, "lib")])).unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size), (0, 0, 1, 1));
    }

    #[test]
    fn half_an_environment_is_refused_by_name() {
        let message = |pairs: &[(&str, &str)]| GroupVars::read(vars(pairs)).unwrap_err().message;
        assert_eq!(message(&[("RANK", "0")]), "`RANK` is set in the environment, but `WORLD_SIZE` is not");
        assert_eq!(
            message(&[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")]),
            "`WORLD_SIZE=2` is set in the environment, but `MASTER_PORT` is not"
        );
        assert_eq!(message(&[("RANK", "2"), ("WORLD_SIZE", "2")]), "`RANK=2` is outside a group of `WORLD_SIZE=2`");
        assert_eq!(message(&[("RANK", "one"), ("WORLD_SIZE", "2")]), "`RANK` is `one`, where a whole number is needed");
    }

    #[test]
    fn a_report_arrives_whole_and_names_its_rank() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rank3.json");
        env(Some(path.clone())).report(&Error::config("no rows").hint("add some")).unwrap();
        let report = Report::read(&path).unwrap();
        assert_eq!(report.error.to_string(), "error: no rows (rank 3)\nhint: add some");
        assert!(!report.secondary);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    }
}
