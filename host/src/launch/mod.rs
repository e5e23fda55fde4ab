//! Starts the workers of a run and answers for them: their environment, their signals, their death.
//!
//! The launcher holds no state of the run. It owns the processes: it ends when the last of them has ended, leaves none
//! behind, and turns N failures into the one error that a person can act on. What a worker is told and what it tells
//! back is in [`crate::worker`].
//!
//! Workers stay in the launcher's process group, so that Ctrl-Z, `fg` and the terminal's own Ctrl-C work as for any
//! program. A Ctrl-C then reaches a worker twice, once forwarded; a worker's handler only sets a flag, so it counts once.

mod logs;
mod nodes;
mod ranks;
mod verdict;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use crate::config::plan::Plan;
use crate::error::{Error, IoContext, Kind, Result};
use crate::worker::{GroupVars, RANK, Rendezvous, WORLD_SIZE, WorkerEnv, since_epoch};
use crate::{libtorch, machine, saved};

pub use logs::{Logs, Streams};
pub use nodes::Endpoint;
use nodes::{Checkpoint, Hello, Next, Nodes, Others, Outcome, Place, Round};
use ranks::Requests;

/// What the command line says about how ranks meet, what becomes of them, and where their output goes.
#[derive(Clone, Debug, Default)]
pub struct LaunchOptions {
    /// `None`: all ranks are on this machine.
    pub nodes: Option<NodesOptions>,
    pub master_addr: Option<String>,
    /// `None`, or 0: any free port.
    pub master_port: Option<u16>,
    pub max_restarts: usize,
    /// How long nodes and ranks wait for each other to come.
    pub rdzv_timeout: Option<Duration>,
    pub logs: Logs,
    /// Tells whoever started the run what happens to it.
    pub say: Option<fn(&str)>,
}

/// Several machines, each with a launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodesOptions {
    pub num_nodes: usize,
    pub node_rank: usize,
    pub endpoint: Endpoint,
    pub run_id: String,
}

/// Runs `plan` on `nproc` workers here, or as the one worker that an environment with `RANK` and `WORLD_SIZE` asks for.
pub fn run(plan: &Plan, nproc: usize, opts: &LaunchOptions) -> Result<()> {
    let group = Group::resolve(|name| std::env::var_os(name), nproc, opts)?;
    let worker = worker_path()?;
    let libtorch_lib = libtorch::find()?.lib_dir;
    let say = opts.say.unwrap_or(|_| ());
    Launcher { worker, libtorch_lib, group, logs: opts.logs.clone(), say }.run(plan.clone())
}

/// What workers read.
trait Job: Serialize {
    /// Where checkpoints go, of a job that writes any.
    fn output_dir(&self) -> Option<&Path>;

    fn go_on_from(&mut self, checkpoint: PathBuf);

    /// How long its ranks wait for each other, of a job whose ranks end together.
    fn patience(&self) -> Option<Duration>;
}

impl Job for Plan {
    fn output_dir(&self) -> Option<&Path> {
        match self {
            Plan::Train(plan) => Some(&plan.checkpoint.output_dir),
            Plan::Generate(_) | Plan::Preview(_) | Plan::Check(_) | Plan::Test(_) => None,
        }
    }

    fn go_on_from(&mut self, checkpoint: PathBuf) {
        if let Plan::Train(plan) = self {
            (plan.checkpoint.resume, plan.checkpoint.resume_from) = (true, Some(checkpoint));
        }
    }

    fn patience(&self) -> Option<Duration> {
        match self {
            Plan::Train(plan) => Some(Duration::from_secs_f64(plan.collective_timeout_seconds)),
            Plan::Generate(_) | Plan::Preview(_) | Plan::Check(_) | Plan::Test(_) => None,
        }
    }
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

/// The ranks this launcher starts.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Group {
    /// One, in a group that somebody else starts.
    Joined(GroupVars, Rendezvous),
    /// Those of a node.
    Own(Place),
}

impl Group {
    fn resolve(var: impl Fn(&str) -> Option<OsString>, nproc: usize, opts: &LaunchOptions) -> Result<Self> {
        let LaunchOptions { nodes, master_addr, master_port, max_restarts, rdzv_timeout, logs: _, say: _ } = opts;
        if let Some(vars) = GroupVars::read(&var)? {
            let given = [
                (nproc > 1).then(|| format!("--nproc {nproc}")),
                nodes.as_ref().map(|nodes| format!("--nnodes {}", nodes.num_nodes)),
                (*max_restarts > 0).then(|| format!("--max-restarts {max_restarts}")),
                master_addr.as_ref().map(|addr| format!("--master-addr {addr}")),
                master_port.map(|port| format!("--master-port {port}")),
            ];
            if let Some(flag) = given.into_iter().flatten().next() {
                let GroupVars { rank, world_size, .. } = vars;
                return Err(Error::config(format!(
                    "`{flag}` contradicts the environment, which says `{RANK}={rank}` of `{WORLD_SIZE}={world_size}`"
                ))
                .hint(format!(
                    "drop the flag to join that group, or unset `{RANK}` and `{WORLD_SIZE}` to start your own"
                )));
            }
            let rendezvous = Rendezvous::read(&var)?;
            let timeout = rdzv_timeout.unwrap_or(rendezvous.timeout);
            return Ok(Self::Joined(vars, Rendezvous { timeout, ..rendezvous }));
        }
        if nproc == 0 {
            return Err(Error::config("`--nproc 0` starts no process").hint("give at least 1"));
        }
        let me = Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            run_id: nodes.as_ref().map_or_else(String::new, |nodes| nodes.run_id.clone()),
            num_nodes: nodes.as_ref().map_or(1, |nodes| nodes.num_nodes),
            node_rank: nodes.as_ref().map_or(0, |nodes| nodes.node_rank),
            nproc,
            max_restarts: *max_restarts,
        };
        Ok(Self::Own(Place {
            me,
            endpoint: nodes.as_ref().map(|nodes| nodes.endpoint.clone()),
            master_addr: master_addr.clone().unwrap_or_else(|| GroupVars::default().master_addr),
            master_port: master_port.unwrap_or(0),
            timeout: rdzv_timeout.unwrap_or(Rendezvous::default().timeout),
        }))
    }
}

struct Launcher {
    worker: PathBuf,
    libtorch_lib: PathBuf,
    group: Group,
    logs: Logs,
    say: fn(&str),
}

impl Launcher {
    fn run(&self, mut job: impl Job) -> Result<()> {
        let mut requests = Requests::listen()?;
        let place = match &self.group {
            Group::Joined(vars, rendezvous) => {
                let outcome = self.start_and_wait(&job, vars, rendezvous, 1, &mut requests, || Others::Running);
                return outcome.error.map_or(Ok(()), |mut error| {
                    if vars.world_size > 1 && error.kind != Kind::Interrupted {
                        error.rank.get_or_insert(vars.rank);
                    }
                    Err(error)
                });
            }
            Group::Own(place) => place,
        };
        let began = since_epoch().as_nanos();
        let mut nodes = Nodes::open(place, self.say)?;
        let mut round = nodes.meet(&mut requests)?;
        loop {
            let outcome = self.round(&mut job, place, &round, &mut requests, &mut nodes);
            // What a run before this one has left in the folder is not ours to go on from.
            let newest = || {
                let saved = saved::existing(job.output_dir()?).ok()?.pop().filter(|saved| saved.at >= began)?;
                Some(Checkpoint { name: saved.path.file_name()?.to_str()?.to_owned(), step: saved.step })
            };
            match nodes.settle(outcome, &mut requests, newest) {
                Next::End(result) => return result,
                Next::Restart(why) => {
                    round = nodes.meet(&mut requests).map_err(|error| match error.kind {
                        Kind::Interrupted => error,
                        _ => error.cause(format!("they were to start again, after this: {}", one_line(&why))),
                    })?;
                    let (attempt, all) = (round.attempt, place.me.max_restarts);
                    let from = match &round.checkpoint {
                        Some(Checkpoint { name, step }) => format!("from step {step} (`{name}`)"),
                        None => "from the start, as nothing was saved".to_owned(),
                    };
                    (self.say)(&format!("restart {attempt} of {all}, {from}: {}", one_line(&why)));
                }
            }
        }
    }

    /// Starts the ranks of this node once, and waits for their end.
    fn round(
        &self,
        job: &mut impl Job,
        place: &Place,
        round: &Round,
        requests: &mut Requests,
        nodes: &mut Nodes,
    ) -> Outcome {
        let Round { attempt, master_addr, master_port, checkpoint } = round;
        if let (Some(Checkpoint { name, .. }), Some(output_dir)) = (checkpoint, job.output_dir()) {
            let folder = output_dir.join(name);
            if !folder.exists() {
                let error = Error::config(format!("the checkpoint to go on from, `{}`, is not here", folder.display()))
                    .hint("nodes of one run need an output folder that all of them see, on a disk they share");
                return Outcome { error: Some(error), agreed: false, asked: false };
            }
            job.go_on_from(folder);
        }
        let Hello { num_nodes, node_rank, nproc, .. } = place.me;
        let vars = GroupVars {
            rank: node_rank * nproc,
            local_rank: 0,
            world_size: num_nodes * nproc,
            local_world_size: nproc,
            master_addr: master_addr.clone(),
            master_port: *master_port,
        };
        let rendezvous = Rendezvous { attempt: *attempt, timeout: place.timeout, has_store: false };
        self.start_and_wait(job, &vars, &rendezvous, nproc, requests, || nodes.others())
    }

    fn start_and_wait(
        &self,
        job: &impl Job,
        first: &GroupVars,
        rendezvous: &Rendezvous,
        count: usize,
        requests: &mut Requests,
        mut others: impl FnMut() -> Others,
    ) -> Outcome {
        let mut for_others = false;
        let ended = self.start(job, first, rendezvous, count).map(|ranks| {
            // The folder has to be there until they have ended.
            let (_folder, ranks) = ranks;
            ranks.wait(requests, job.patience(), || {
                let others = others();
                for_others |= others == Others::Failed;
                others
            })
        });
        let asked = requests.asked();
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => return Outcome { error: Some(error), agreed: false, asked },
        };
        let agreed = ended.iter().all(ranks::Ended::by_agreement);
        let error = verdict::of(ended, asked).err().map(|error| match error.kind {
            // Nobody asked, so it was us, for the others.
            Kind::Interrupted if for_others && !asked => {
                Error::new(Kind::Peer, "stopped because of a rank of another node")
            }
            _ => error,
        });
        Outcome { error, agreed, asked }
    }

    /// Starts `count` workers, the first as `first`. What they read is there as long as the folder.
    fn start(
        &self,
        job: &impl Job,
        first: &GroupVars,
        rendezvous: &Rendezvous,
        count: usize,
    ) -> Result<(tempfile::TempDir, ranks::Ranks)> {
        let folder = tempfile::Builder::new()
            .prefix("host-run-")
            .tempdir()
            .path_context("create a folder in", std::env::temp_dir())?;
        let plan_path = folder.path().join("plan.json");
        let text = serde_json::to_vec(job).map_err(|error| Error::bug("the plan is not JSON").cause(error))?;
        std::fs::write(&plan_path, text).path_context("write", &plan_path)?;

        let mut ranks = ranks::Ranks::new();
        for index in 0..count {
            let env = self.worker_env(first, rendezvous, index, folder.path());
            let mut command = self.command(&env, &plan_path);
            let outputs = ranks::Outputs::open(&self.logs, &env, index == 0 && (env.rank == 0 || count == 1))?;
            ranks.start(&env, &mut command, outputs).map_err(|error| {
                Error::run(format!("cannot start the worker of rank {}, `{}`", env.rank, self.worker.display()))
                    .cause(error)
            })?;
        }
        Ok((folder, ranks))
    }

    fn worker_env(&self, first: &GroupVars, rendezvous: &Rendezvous, index: usize, folder: &Path) -> WorkerEnv {
        let rank = first.rank + index;
        WorkerEnv {
            rank,
            local_rank: first.local_rank + index,
            world_size: first.world_size,
            local_world_size: first.local_world_size,
            master_addr: first.master_addr.clone(),
            master_port: first.master_port,
            rendezvous: rendezvous.clone(),
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

/// An error as part of a line.
fn one_line(error: &Error) -> String {
    let rank = error.rank.map(|rank| format!(" (rank {rank})")).unwrap_or_default();
    format!("{}{rank}", error.message)
}

#[cfg(test)]
mod tests;
