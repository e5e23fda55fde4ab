//! Starts the workers of a run and answers for them: their environment, their signals, their death.
//!
//! The launcher holds no state of the run. It owns the processes: it ends when the last of them has ended, leaves none
//! behind, and turns N failures into the one error that a person can act on. What a worker is told and what it tells
//! back is in [`crate::worker`].
//!
//! Workers stay in the launcher's process group, so that Ctrl-Z, `fg` and the terminal's own Ctrl-C work as for any
//! program. A Ctrl-C then reaches a worker twice, once forwarded; a worker's handler only sets a flag, so it counts once.

mod logs;
mod ranks;
mod verdict;

use std::ffi::OsString;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

use crate::config::plan::Plan;
use crate::error::{Error, IoContext, Result};
use crate::worker::{GroupVars, RANK, WORLD_SIZE, WorkerEnv};
use crate::{libtorch, machine};

pub use logs::{Logs, Streams};

/// What the command line says about how ranks meet, and where their output goes.
#[derive(Clone, Debug, Default)]
pub struct LaunchOptions {
    pub master_addr: Option<String>,
    /// `None`, or 0: any free port.
    pub master_port: Option<u16>,
    pub logs: Logs,
}

/// Runs `plan` on `nproc` workers here, or as the one worker that an environment with `RANK` and `WORLD_SIZE` asks for.
pub fn run(plan: &Plan, nproc: usize, opts: &LaunchOptions) -> Result<()> {
    let group = Group::resolve(|name| std::env::var_os(name), nproc, opts)?;
    let worker = worker_path()?;
    let libtorch_lib = libtorch::find()?.lib_dir;
    Launcher { worker, libtorch_lib, group, logs: opts.logs.clone() }.run(plan)
}

/// Where `host-rank` has to be: beside this program.
pub fn worker_path() -> Result<PathBuf> {
    let program = std::env::current_exe()
        .map_err(|error| Error::run("cannot tell where this program is, so not where `host-rank` is").cause(error))?;
    let worker = program.with_file_name("host-rank");
    if worker.is_file() {
        return Ok(worker);
    }
    Err(Error::config(format!("no worker program at `{}`", worker.display()))
        .hint("`cargo xtask setup` builds it; `host` and `host-rank` have to lie in one folder"))
}

/// Gives `command` the libraries of this libtorch folder, ahead of any others.
pub(crate) fn set_library_path(command: &mut Command, libtorch_lib: &Path) {
    const NAME: &str = "LD_LIBRARY_PATH";
    let mut paths = libtorch_lib.as_os_str().to_owned();
    // An empty entry would mean the working directory.
    if let Some(others) = std::env::var_os(NAME).filter(|others| !others.is_empty()) {
        paths.push(":");
        paths.push(others);
    }
    command.env(NAME, paths);
}

/// The ranks this launcher starts, and the group they belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    /// The first rank and local rank started here; the others follow.
    first: GroupVars,
    count: usize,
}

impl Group {
    fn resolve(var: impl Fn(&str) -> Option<OsString>, nproc: usize, opts: &LaunchOptions) -> Result<Self> {
        let LaunchOptions { master_addr, master_port, logs: _ } = opts;
        if let Some(first) = GroupVars::read(&var)? {
            let given = [
                (nproc > 1).then(|| format!("--nproc {nproc}")),
                master_addr.as_ref().map(|addr| format!("--master-addr {addr}")),
                master_port.map(|port| format!("--master-port {port}")),
            ];
            if let Some(flag) = given.into_iter().flatten().next() {
                let GroupVars { rank, world_size, .. } = first;
                return Err(Error::config(format!(
                    "`{flag}` contradicts the environment, which says `{RANK}={rank}` of `{WORLD_SIZE}={world_size}`"
                ))
                .hint(format!(
                    "drop the flag to join that group, or unset `{RANK}` and `{WORLD_SIZE}` to start your own"
                )));
            }
            return Ok(Self { first, count: 1 });
        }
        if nproc == 0 {
            return Err(Error::config("`--nproc 0` starts no process").hint("give at least 1"));
        }
        let mut first = GroupVars { world_size: nproc, local_world_size: nproc, ..GroupVars::default() };
        if let Some(addr) = master_addr {
            first.master_addr = addr.clone();
        }
        first.master_port = claim_port(master_port.unwrap_or(0))?;
        Ok(Self { first, count: nproc })
    }
}

/// Returns `port` if rank 0 can listen on it, for 0 any free one.
fn claim_port(port: u16) -> Result<u16> {
    let anywhere = |ip| TcpListener::bind(SocketAddr::new(ip, port)).and_then(|listener| listener.local_addr());
    // `::` takes IPv4 too, as rank 0's store does; a machine without IPv6 has only the second.
    let bound = anywhere(Ipv6Addr::UNSPECIFIED.into()).or_else(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse | std::io::ErrorKind::PermissionDenied => Err(error),
        _ => anywhere(Ipv4Addr::UNSPECIFIED.into()),
    });
    bound.map(|address| address.port()).map_err(|error| {
        let what = match error.kind() {
            std::io::ErrorKind::AddrInUse => format!("port {port} is in use"),
            _ => format!("port {port} cannot be opened"),
        };
        Error::config(format!("{what}, and rank 0 needs it for the ranks to meet (`--master-port`)"))
            .cause(error)
            .hint("leave `--master-port` out to take a free one, or name another")
    })
}

struct Launcher {
    worker: PathBuf,
    libtorch_lib: PathBuf,
    group: Group,
    logs: Logs,
}

impl Launcher {
    /// Generic in what the worker reads, so that tests need no whole plan.
    fn run(&self, plan: &impl Serialize) -> Result<()> {
        let folder = tempfile::Builder::new()
            .prefix("host-run-")
            .tempdir()
            .path_context("create a folder in", std::env::temp_dir())?;
        let plan_path = folder.path().join("plan.json");
        let text = serde_json::to_vec(plan).map_err(|error| Error::bug("the plan is not JSON").cause(error))?;
        std::fs::write(&plan_path, text).path_context("write", &plan_path)?;

        let mut ranks = ranks::Ranks::new()?;
        for index in 0..self.group.count {
            let env = self.worker_env(index, folder.path());
            let mut command = self.command(&env, &plan_path);
            let outputs = ranks::Outputs::open(&self.logs, &env, index == 0)?;
            ranks.start(&env, &mut command, outputs).map_err(|error| {
                Error::run(format!("cannot start the worker of rank {}, `{}`", env.rank, self.worker.display()))
                    .cause(error)
            })?;
        }
        let (ended, asked_to_stop) = ranks.wait();
        verdict::of(ended, asked_to_stop, self.group.first.world_size)
    }

    fn worker_env(&self, index: usize, folder: &Path) -> WorkerEnv {
        let first = &self.group.first;
        let rank = first.rank + index;
        WorkerEnv {
            rank,
            local_rank: first.local_rank + index,
            world_size: first.world_size,
            local_world_size: first.local_world_size,
            master_addr: first.master_addr.clone(),
            master_port: first.master_port,
            libtorch_lib: self.libtorch_lib.clone(),
            report: Some(folder.join(format!("rank{rank}.json"))),
        }
    }

    fn command(&self, env: &WorkerEnv, plan_path: &Path) -> Command {
        let mut command = Command::new(&self.worker);
        command.arg("--plan").arg(plan_path);
        env.apply_to(&mut command);
        set_library_path(&mut command, &self.libtorch_lib);
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            let threads = (machine::usable_cores() / env.local_world_size).max(1);
            command.env("OMP_NUM_THREADS", threads.to_string());
        }
        // Threads that spin while they wait for each other stand still when a core is shared with anything else: seen at
        // a fifth of the speed beside a compiler.
        if std::env::var_os("OMP_WAIT_POLICY").is_none() {
            command.env("OMP_WAIT_POLICY", "passive");
        }
        command
    }
}

#[cfg(test)]
mod tests;
