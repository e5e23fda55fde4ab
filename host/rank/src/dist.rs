//! The ranks of a run as one group. A world of one is a group of one, not a special case.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use host::config::plan::CollectivesPlan;
use host::error::{Error, Kind, Result};
use host::worker::WorkerEnv;
use host_ffi::dist;
use tch::{Device, Tensor};

use crate::device;
use crate::torch::TorchContext;

/// Ranks that give up hear of each other within this.
const ROLL_CALL: Duration = Duration::from_secs(3);
/// For ranks to hear why rank 0 gives up.
const LAST_WORD: Duration = Duration::from_secs(5);

pub struct Group {
    pub rank: usize,
    pub world_size: usize,
    inner: dist::Group,
    timeout: Duration,
    /// Where ranks that give up tell each other so; it is given away then.
    store: Cell<Option<dist::Store>>,
    /// Of this start's keys in the store.
    prefix: String,
    /// The one under way; 0 before the first.
    step: Cell<usize>,
    /// What collectives on a device go through, and the device.
    attached: Option<(&'static str, usize)>,
    /// Of a part of the ranks: all of them.
    whole: Option<Rc<Group>>,
}

impl Group {
    /// Meets the other ranks at the master's address. `timeout` is how long each waits for one that does not come from then
    /// on; here it is the rendezvous's.
    pub fn join(env: &WorkerEnv, timeout: Duration) -> Result<Self> {
        // For all to come, for a last word, and for each to find each other.
        let limit = 2 * (env.rendezvous.timeout + LAST_WORD);
        within(env, limit, || Self::meet(env, timeout))
    }

    fn meet(env: &WorkerEnv, timeout: Duration) -> Result<Self> {
        let (rank, world_size, meeting) = (env.rank, env.world_size, env.rendezvous.timeout);
        let mut group = Self {
            rank,
            world_size,
            inner: dist::Group::alone(),
            timeout: meeting,
            store: Cell::default(),
            prefix: format!("host/{}", env.rendezvous.attempt),
            step: Cell::default(),
            attached: None,
            whole: None,
        };
        if world_size == 1 {
            return Ok(group);
        }
        let store = if rank == 0 && !env.rendezvous.has_store {
            dist::Store::serve(&env.master_addr, env.master_port, world_size, meeting)
                .torch("start the ranks' meeting point")?
        } else {
            dist::Store::connect(&env.master_addr, env.master_port, world_size, meeting)
                .map_err(|error| unreached(env, &error))?
        };
        wait_for_all(&store, &group.prefix, env)?;
        let inner = dist::Group::join(&store, &format!("{}/ranks", group.prefix), rank, world_size, timeout);
        group.store.set(Some(store));
        group.inner = inner.map_err(|error| group.lost("the ranks could not find each other", error))?;
        group.timeout = timeout;
        Ok(group)
    }

    /// Lets collectives on tensors of `device` run there, as the plan says; every rank has to ask.
    pub fn attach(&mut self, plan: CollectivesPlan, device: Device, libtorch_lib: &Path) -> Result<()> {
        let Device::Cuda(index) = device else { return Ok(()) };
        if plan == CollectivesPlan::Gloo || plan == CollectivesPlan::Auto && self.world_size == 1 {
            return Ok(());
        }
        let library = device::collectives_library(libtorch_lib)?;
        let version = host_ffi::nccl::version(library).torch("load the library for collectives on GPUs");
        let version = version.map_err(|error| error.hint("`distributed_backend: gloo` does without it, slower"))?;
        self.attach_to(library, index)?;
        if self.is_main() {
            tracing::info!("collectives: {library} {version}");
        }
        Ok(())
    }

    fn attach_to(&mut self, library: &'static str, device: usize) -> Result<()> {
        let attached = self.inner.attach(library, device, self.timeout);
        attached.map_err(|error| self.lost("the ranks' GPUs could not find each other", error))?;
        self.attached = Some((library, device));
        Ok(())
    }

    /// This rank as `rank` of the `world_size` of these that ask by the same `name`.
    pub fn part(self: &Rc<Self>, name: &str, (rank, world_size): (usize, usize)) -> Result<Rc<Self>> {
        if world_size == self.world_size {
            return Ok(Rc::clone(self));
        }
        let name = format!("{}/{name}", self.prefix);
        let store = self.store.take().ok_or_else(|| Error::bug("ranks that have given up cannot be parted"))?;
        let joined = dist::Group::join(&store, &name, rank, world_size, self.timeout);
        self.store.set(Some(store));
        let inner = joined.map_err(|error| self.lost("the ranks could not find each other", error))?;
        let mut part = Self {
            rank,
            world_size,
            inner,
            timeout: self.timeout,
            store: Cell::default(),
            prefix: name,
            step: Cell::default(),
            attached: None,
            whole: Some(Rc::clone(self)),
        };
        if let Some((library, device)) = self.attached.filter(|_| world_size > 1) {
            part.attach_to(library, device)?;
        }
        Ok(Rc::new(part))
    }

    /// Which step errors are to name from now on.
    pub fn set_step(&self, step: usize) {
        self.inner.set_step(step);
        self.step.set(step);
    }

    /// Whether what was read from the device since is what the ranks agreed on.
    pub fn check(&self) -> Result<()> {
        self.inner.check().map_err(|error| self.lost("a collective failed", error))
    }

    /// Bytes that collectives have brought to this rank since the last call.
    pub fn take_bytes_received(&self) -> u64 {
        self.inner.take_bytes_received()
    }

    /// Sums `tensor` over all ranks, in place.
    pub fn all_reduce_sum(&self, tensor: &Tensor) -> Result<()> {
        self.inner.all_reduce_sum(tensor).map_err(|error| self.lost("an all-reduce failed", error))
    }

    /// Starts to fill `whole` with the shards of all ranks.
    pub fn all_gather_into(&self, whole: &Tensor, shard: &Tensor) -> Result<dist::Work> {
        self.inner.all_gather_into(whole, shard).map_err(|error| self.lost("an all-gather failed", error))
    }

    /// Starts to fill `shard` with this rank's part of the sum of `whole` over all ranks.
    pub fn reduce_scatter_sum(&self, shard: &Tensor, whole: &Tensor) -> Result<dist::Work> {
        self.inner.reduce_scatter_sum(shard, whole).map_err(|error| self.lost("a reduce-scatter failed", error))
    }

    /// Waits for what was started.
    pub fn wait(&self, work: dist::Work) -> Result<()> {
        work.wait().map_err(|error| self.lost("a collective failed", error))
    }

    pub fn is_main(&self) -> bool {
        self.rank == 0
    }

    /// The bytes that rank 0 gives, on every rank.
    pub fn from_main(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let broadcast =
            |tensor: &Tensor| self.inner.broadcast(tensor, 0).map_err(|error| self.lost("a broadcast failed", error));
        let length = Tensor::from_slice(&[bytes.len() as i64]);
        broadcast(&length)?;
        let content = if self.is_main() {
            Tensor::from_slice(bytes)
        } else {
            Tensor::zeros([length.int64_value(&[0])], (tch::Kind::Uint8, Device::Cpu))
        };
        broadcast(&content)?;
        Vec::try_from(content).torch("read what rank 0 sent")
    }

    /// The numbers that each rank gives, by rank; every rank has to give as many.
    pub fn gather(&self, mine: &[i64]) -> Result<Vec<Vec<i64>>> {
        let all = self.inner.all_gather(&Tensor::from_slice(mine));
        let all = all.map_err(|error| self.lost("an all-gather failed", error))?;
        Vec::<Vec<i64>>::try_from(all).torch("read what the ranks gave")
    }

    /// The ranks that answer `true`; every rank has to ask.
    pub fn which(&self, answer: bool) -> Result<Vec<usize>> {
        let answers = self.gather(&[i64::from(answer)])?;
        Ok((0..self.world_size).filter(|rank| answers[*rank][0] != 0).collect())
    }

    /// The texts that each rank gives, by rank; every rank has to ask.
    pub fn texts(&self, mine: &str) -> Result<Vec<String>> {
        let gather =
            |tensor: &Tensor| self.inner.all_gather(tensor).map_err(|error| self.lost("an all-gather failed", error));
        let lengths: Vec<usize> = self.gather(&[mine.len() as i64])?.iter().map(|row| row[0] as usize).collect();
        let mut bytes = mine.as_bytes().to_vec();
        bytes.resize(lengths.iter().copied().max().unwrap_or(0), 0);
        if bytes.is_empty() {
            return Ok(vec![String::new(); self.world_size]);
        }
        let rows = Vec::<Vec<u8>>::try_from(gather(&Tensor::from_slice(&bytes))?).torch("read the texts")?;
        let text = |(row, length): (Vec<u8>, usize)| String::from_utf8_lossy(&row[..length]).into_owned();
        Ok(rows.into_iter().zip(lengths).map(text).collect())
    }

    /// Waits for what rank 0 did alone; `outcome` is given there and nowhere else. If it failed, every rank fails: rank 0
    /// with the error, the others saying for whom they stopped.
    pub fn after_main<T>(&self, doing: &str, outcome: Option<Result<T>>) -> Result<Option<T>> {
        let failed = !self.which(matches!(outcome, Some(Err(_))))?.is_empty();
        match outcome {
            Some(result) => result.map(Some),
            None if failed => Err(stopped(format!("rank 0 could not {doing}"))),
            None => Ok(None),
        }
    }

    /// What a failed collective says: which rank did not come where some did not, else that another rank is the cause, whose own
    /// error the launcher reports instead.
    fn lost(&self, what: &str, error: host_ffi::FfiError) -> Error {
        if let Some(whole) = &self.whole {
            return whole.lost(what, error);
        }
        let text = error.to_string().to_lowercase();
        let is_late = text.contains("did not take part") || text.contains("timed out") || text.contains("timeout");
        let missing =
            self.store.take().map(|store| roll_call(store, &self.prefix, (self.rank, self.world_size), is_late));
        let Some(missing) = missing.filter(|missing| is_late && !missing.is_empty()) else {
            return stopped(what).cause(error);
        };
        let noun = if missing.len() == 1 { "rank" } else { "ranks" };
        let missing = missing.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let place = match self.step.get() {
            0 => "before the first step".to_owned(),
            step => format!("in step {step}"),
        };
        let seconds = self.timeout.as_secs_f64();
        Error::run(format!("no word from {noun} {missing} for {seconds} s, {place}"))
            .cause(error)
            .hint("that process may be stopped, or its machine out of memory or cut off; see there")
            .hint("`collective_timeout_seconds` is how long ranks wait for each other")
    }
}

/// Ends this process where the ranks take longer to meet than `limit`: of a store whose process stands still some requests
/// never return.
fn within<T>(env: &WorkerEnv, limit: Duration, meet: impl FnOnce() -> T) -> T {
    let (met, waits) = mpsc::channel::<()>();
    let env = env.clone();
    std::thread::spawn(move || {
        if waits.recv_timeout(limit) != Err(mpsc::RecvTimeoutError::Timeout) {
            return;
        }
        let whom = if env.rank == 0 || env.rendezvous.has_store { "the ranks' meeting point" } else { "rank 0" };
        let error = Error::run(format!("no word from {whom} for {} s, before the first step", limit.as_secs()))
            .hint("that process may be stopped, or its machine out of memory or cut off; see there");
        if env.report.is_none() || env.report(&error).is_err() {
            eprintln!("{error}");
        }
        std::process::exit(error.exit_code().into());
    });
    let outcome = meet();
    drop(met);
    outcome
}

/// Tells the other ranks through the store that this one gives up. Where it `waits`, returns those that do not say so
/// themselves: they are not waiting for anybody.
fn roll_call(store: dist::Store, prefix: &str, (rank, world_size): (usize, usize), waits: bool) -> Vec<usize> {
    let (sender, answers) = mpsc::channel();
    let deadline = Instant::now() + ROLL_CALL;
    let prefix = prefix.to_owned();
    // Where the process that serves the store is stopped, this never returns: it is left to the end of ours.
    std::thread::spawn(move || {
        let key = |rank: usize| format!("{prefix}/gives up/{rank}");
        let mut heard = BTreeSet::from([rank]);
        if store.set(&key(rank), &[]).is_err() {
            return;
        }
        while waits && heard.len() < world_size && Instant::now() < deadline {
            for other in 0..world_size {
                match store.check(&key(other)) {
                    Ok(gives_up) if gives_up => drop(heard.insert(other)),
                    Ok(_) => {}
                    Err(_) => return,
                }
            }
            let _ = sender.send(heard.clone());
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let mut last = None;
    while let Ok(heard) = answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        last = Some(heard);
    }
    match last {
        Some(heard) => (0..world_size).filter(|rank| !heard.contains(rank)).collect(),
        // Nobody serves the store.
        None if waits && rank != 0 => vec![0],
        None => vec![],
    }
}

/// Waits at the store until every rank has come; rank 0 says who has not.
fn wait_for_all(store: &dist::Store, prefix: &str, env: &WorkerEnv) -> Result<()> {
    let (rank, world_size, timeout) = (env.rank, env.world_size, env.rendezvous.timeout);
    let lost = |error| stopped("the ranks could not find each other").cause(error);
    let (all_here, came) = (format!("{prefix}/all"), |rank| format!("{prefix}/rank/{rank}"));
    if store.add(&format!("{prefix}/claim/{rank}"), 1).map_err(lost)? > 1 {
        return Err(Error::config(format!("rank {rank} was started twice"))
            .hint("each process of a group needs a `RANK` of its own, from 0 to `WORLD_SIZE` - 1"));
    }
    store.set(&came(rank), world_size.to_string().as_bytes()).map_err(lost)?;
    if rank > 0 {
        let word = store.get(&all_here, timeout + LAST_WORD).map_err(lost)?;
        let _ = store.add(&format!("{prefix}/heard"), 1);
        return if word.is_empty() { Ok(()) } else { Err(stopped(String::from_utf8_lossy(&word))) };
    }
    let started = Instant::now();
    let (mut missing, mut of_others) = (vec![], vec![]);
    for other in 1..world_size {
        let left = timeout.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
        match store.get(&came(other), left) {
            Ok(theirs) if theirs != world_size.to_string().as_bytes() => {
                of_others.push(format!("rank {other} says {}", String::from_utf8_lossy(&theirs)));
            }
            Ok(_) => {}
            Err(_) => missing.push(other),
        }
    }
    let error = if !missing.is_empty() {
        let (who, seconds) = (named(&missing), timeout.as_secs());
        Error::run(format!("{who} of {world_size} did not come within {seconds} s")).hint(
            "see why they were not started, or cannot reach `MASTER_ADDR`; `--rdzv-timeout` is how long ranks wait",
        )
    } else if !of_others.is_empty() {
        let error = Error::config(format!("the ranks disagree on their number: rank 0 says {world_size}"));
        of_others.iter().fold(error, Error::cause).hint("start every rank with the same `WORLD_SIZE`")
    } else {
        return store.set(&all_here, b"").map_err(lost);
    };
    // The store ends with this process: whoever came has to hear of it first.
    store.set(&all_here, error.message.as_bytes()).map_err(lost)?;
    let present = (world_size - 1 - missing.len()) as i64;
    let said = Instant::now();
    while said.elapsed() < LAST_WORD && store.add(&format!("{prefix}/heard"), 0).is_ok_and(|heard| heard < present) {
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(error)
}

fn unreached(env: &WorkerEnv, cause: &host_ffi::FfiError) -> Error {
    let (addr, port, seconds) = (&env.master_addr, env.master_port, env.rendezvous.timeout.as_secs());
    Error::new(Kind::Peer, format!("rank 0 could not be reached at `{addr}:{port}` within {seconds} s"))
        .cause(cause)
        .hint("see that it was started, and that `MASTER_ADDR` and `MASTER_PORT` are its own on every rank")
}

/// `rank 3`, `ranks 1, 3`.
pub fn named(ranks: &[usize]) -> String {
    let list = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    format!("rank{} {list}", if ranks.len() == 1 { "" } else { "s" })
}

/// A rank that has no mistake of its own: another rank reports the cause.
pub fn stopped(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Peer, format!("stopped because {why}"))
}
