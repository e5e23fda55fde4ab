//! The ranks of a run as one group. A world of one is a group of one, not a special case.

use std::path::Path;
use std::time::Duration;

use host::config::plan::CollectivesPlan;
use host::error::{Error, Kind, Result};
use host::worker::WorkerEnv;
use host_ffi::dist;
use tch::{Device, Tensor};

use crate::device;
use crate::torch::TorchContext;

/// How long a collective waits for a peer before the run is given up. A rank may be validating or writing a checkpoint.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// How long the ranks wait for each other to start.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(5 * 60);

pub struct Group {
    pub rank: usize,
    pub world_size: usize,
    inner: dist::Group,
}

impl Group {
    /// Meets the other ranks at the master's address.
    pub fn join(env: &WorkerEnv) -> Result<Self> {
        let (rank, world_size) = (env.rank, env.world_size);
        if world_size == 1 {
            return Ok(Self { rank, world_size, inner: dist::Group::alone() });
        }
        let store = if rank == 0 {
            dist::Store::serve(&env.master_addr, env.master_port, world_size, RENDEZVOUS_TIMEOUT)
                .torch("start the ranks' meeting point")?
        } else {
            dist::Store::connect(&env.master_addr, env.master_port, world_size, RENDEZVOUS_TIMEOUT)
                .map_err(|error| lost_peer("rank 0 could not be reached", error))?
        };
        let inner = dist::Group::join(&store, "ranks", rank, world_size, COLLECTIVE_TIMEOUT)
            .map_err(|error| lost_peer("the ranks could not find each other", error))?;
        Ok(Self { rank, world_size, inner })
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
        self.inner
            .attach(library, index, COLLECTIVE_TIMEOUT)
            .map_err(|error| lost_peer("the ranks' GPUs could not find each other", error))?;
        if self.is_main() {
            tracing::info!("collectives: {library} {version}");
        }
        Ok(())
    }

    /// Which step errors are to name from now on.
    pub fn set_step(&self, step: usize) {
        self.inner.set_step(step);
    }

    /// Whether what was read from the device since is what the ranks agreed on.
    pub fn check(&self) -> Result<()> {
        self.inner.check().map_err(|error| lost_peer("a collective failed", error))
    }

    /// Bytes that collectives have brought to this rank since the last call.
    pub fn take_bytes_received(&self) -> u64 {
        self.inner.take_bytes_received()
    }

    /// Sums `tensor` over all ranks, in place.
    pub fn all_reduce_sum(&self, tensor: &Tensor) -> Result<()> {
        self.inner.all_reduce_sum(tensor).map_err(|error| lost_peer("an all-reduce failed", error))
    }

    /// Starts to fill `whole` with the shards of all ranks.
    pub fn all_gather_into(&self, whole: &Tensor, shard: &Tensor) -> Result<dist::Work> {
        self.inner.all_gather_into(whole, shard).map_err(|error| lost_peer("an all-gather failed", error))
    }

    /// Starts to fill `shard` with this rank's part of the sum of `whole` over all ranks.
    pub fn reduce_scatter_sum(&self, shard: &Tensor, whole: &Tensor) -> Result<dist::Work> {
        self.inner.reduce_scatter_sum(shard, whole).map_err(|error| lost_peer("a reduce-scatter failed", error))
    }

    /// Waits for what was started.
    pub fn wait(&self, work: dist::Work) -> Result<()> {
        work.wait().map_err(|error| lost_peer("a collective failed", error))
    }

    pub fn is_main(&self) -> bool {
        self.rank == 0
    }

    /// The bytes that rank 0 gives, on every rank.
    pub fn from_main(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let broadcast =
            |tensor: &Tensor| self.inner.broadcast(tensor, 0).map_err(|error| lost_peer("a broadcast failed", error));
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
        let all = all.map_err(|error| lost_peer("an all-gather failed", error))?;
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
            |tensor: &Tensor| self.inner.all_gather(tensor).map_err(|error| lost_peer("an all-gather failed", error));
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
}

/// An error that says another rank is the cause: the launcher reports that rank's own error instead.
fn lost_peer(what: &str, error: host_ffi::FfiError) -> Error {
    stopped(what).cause(error)
}

/// A rank that has no mistake of its own: another rank reports the cause.
pub fn stopped(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Peer, format!("stopped because {why}"))
}
